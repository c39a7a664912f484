"""What measuring costs: the same engine's steps without phase marks and with them, `python -m
bf16prof.check.cost` on a GPU.

Steps without marks come first, then `attach` puts the marks on, as `measure` does; both are timed
with one synchronisation at either end.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

STEPS = 10
WARM_UP = 3


def seconds_per_step(step: Any, synchronize: Any) -> float:
    """The mean over some steps after a few that do not count."""
    for _ in range(WARM_UP):
        step()
    synchronize()
    begin = time.perf_counter()
    for _ in range(STEPS):
        step()
    synchronize()
    return (time.perf_counter() - begin) / STEPS


def main() -> None:
    """Print both times in seconds as JSON."""
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"})
    import deepspeed

    from bf16prof.cases import Selection, expand
    from bf16prof.engine.phases import PhaseMarks, attach
    from bf16prof.engine.training import TrainingLoop, build_engine, takes_labels
    from bf16prof.measuring.batches import make_batches
    from bf16prof.measuring.probes import make_probe
    from bf16prof.profiles.load import load_profile
    from bf16prof.vocabulary import Device

    (job,) = expand(Selection(load_profile("gpu-check").profile, [2], [1], ["bf16-fp32-master"], Device.GPU))
    deepspeed.init_distributed()
    probe = make_probe(Device.GPU)
    engine = build_engine(job)
    loop = TrainingLoop(engine, job, make_batches(job, 0, probe.device_type, shifted=not takes_labels(engine.module)))
    plain = seconds_per_step(loop.step, probe.synchronize)
    attach(engine, PhaseMarks(probe))
    marked = seconds_per_step(loop.step, probe.synchronize)
    sys.stdout.write("\n" + json.dumps({"without": plain, "with": marked}) + "\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
