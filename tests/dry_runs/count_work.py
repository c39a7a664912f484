"""Dry-run jobs and print, for the second step of each, DeepSpeed's collectives and PyTorch's count
of operations, as JSON lines.

Run as `python count_work.py < JOBS`, one `JobFile` per line; one job per process, so each is
forked. Collectives are counted where DeepSpeed hands them to torch.distributed.
"""

from __future__ import annotations

import collections
import json
import os
import sys
from typing import Any

NAMES = {
    "all_reduce": ("all-reduce", 0),
    "reduce": ("reduce", 0),
    "reduce_scatter_tensor": ("reduce-scatter", 1),
    "all_gather_into_tensor": ("all-gather", 0),
}
"""Methods of DeepSpeed's backend, what they are called, and which of their tensors is the whole
one."""

SCALARS = 64
"""Collectives of fewer bytes carry norms and flags."""


def main() -> None:
    """All jobs."""
    import bf16prof.dry_run.dryrun  # noqa: F401 - imported once for all forks

    for line in sys.stdin:
        if os.fork() == 0:
            _run(line)
        _, status = os.wait()
        if status:
            raise SystemExit(1)


def _run(line: str) -> None:
    import pydantic

    from bf16prof.cases import JobFile

    job = pydantic.TypeAdapter(JobFile).validate_json(line).job()
    found = _count(job)
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()
    os._exit(0)


def _count(job: Any) -> dict[str, Any]:
    import warnings

    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from bf16prof.dry_run.dryrun import DryRank
    from bf16prof.dry_run.world import world
    from bf16prof.engine.phases import PhaseMarks, attach
    from bf16prof.engine.training import TrainingLoop, build_engine

    warnings.simplefilter("ignore")
    with world(job.case.world_size, job.gpu) as tracker:
        counts: collections.Counter[str] = collections.Counter()
        phase = ["init"]
        marks = PhaseMarks(tracker.ledger, on_mark=lambda p: phase.__setitem__(0, str(p)))
        engine = build_engine(job)
        attach(engine, marks)
        _watch(counts, phase)
        batches = DryRank(job, tracker, lambda _: None)._batches(job)
        loop = TrainingLoop(engine, job, batches)
        loop.step()
        counts.clear()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
            loop.step()
        return {"label": job.case.label, "counts": dict(sorted(counts.items())), "flops": flops.get_total_flops()}


def _watch(counts: collections.Counter[str], phase: list[str]) -> None:
    from deepspeed.comm import comm

    backend: Any = comm.cdb
    for name, (kind, whole) in NAMES.items():
        real = getattr(backend, name)

        def call(*args: Any, real: Any = real, kind: str = kind, whole: int = whole, **kwargs: Any) -> Any:
            tensor = args[whole] if len(args) > whole else list(kwargs.values())[whole]
            size = tensor.numel() * tensor.element_size()
            if size >= SCALARS:
                counts[f"{phase[0]} {kind} bytes"] += size
                counts[f"{phase[0]} {kind} calls"] += 1
            return real(*args, **kwargs)

        setattr(backend, name, call)


if __name__ == "__main__":
    main()
