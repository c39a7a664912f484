"""First on PYTHONPATH of a measurement, this does in every rank what `INSIDE` says: nothing in
bf16prof knows of it.

* `witness`: count all live tensors that Python's garbage collector knows, but for the tables that a
  library made when it was imported, and write them to `witness<RANK>.json` beside the rank's
  result. This shares nothing with bf16prof's allocator and attribution.
* `raise`: let rank 1 raise in its second step.
* `hang in init`, `hang in backward`: let rank 1 do that and not come back.
* `os._exit`, `sys.exit`, `SIGTERM`, `garble`, `no memory`: let rank 1 leave like that then, or with
  a file that nobody can read.
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any


def witness() -> None:
    import torch

    from bf16prof.engine import attribution

    attribute = attribution.attribute

    def witnessed(engines: Any, *arguments: Any) -> Any:
        tables = {id(value) for name, module in sys.modules.items() if name.startswith("bitsandbytes") for value in vars(module).values()}
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and o.device.type == "cpu" and id(o) not in tables]
        storages = [tensor.untyped_storage() for tensor in tensors]
        unique = {storage.data_ptr(): storage.nbytes() for storage in storages}
        path = Path(sys.argv[2]) / f"witness{os.environ['RANK']}.json"
        path.write_text(json.dumps({"live_bytes": sum(unique.values()), "wrapper": type(engines[0].optimizer).__name__}), encoding="utf-8")
        return attribute(engines, *arguments)

    attribution.attribute = witnessed  # type: ignore[assignment]


def _raise() -> None:
    raise ValueError("the test says so\nin two lines")


def _garble() -> None:
    Path(sys.argv[2], "rank1.json").write_text("{", encoding="utf-8")
    os._exit(0)


def _no_memory() -> None:
    import torch

    torch.empty(2**60, dtype=torch.uint8)


FAULTS = {
    "raise": _raise,
    "os._exit": lambda: os._exit(7),
    "sys.exit": lambda: sys.exit(0),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "garble": _garble,
    "no memory": _no_memory,
}


def fail_in_rank_1() -> None:
    from bf16prof.engine.training import TrainingLoop

    step = TrainingLoop.step

    def failing(loop: Any) -> float:
        if loop.loss is not None and os.environ["RANK"] == "1":
            FAULTS[os.environ["INSIDE"]]()
        return step(loop)

    TrainingLoop.step = failing  # type: ignore[method-assign, assignment]


def hang() -> None:
    signal.pause()


def hang_in_init() -> None:
    from bf16prof.engine import training

    if os.environ["RANK"] == "1":
        training.build_engine = lambda *_: hang()


def hang_in_backward() -> None:
    import torch

    if os.environ["RANK"] == "1":
        torch.Tensor.backward = lambda *_, **__: hang()  # type: ignore[method-assign]


OTHERS = {"witness": witness, "hang in init": hang_in_init, "hang in backward": hang_in_backward}

if "RANK" in os.environ:
    OTHERS.get(os.environ["INSIDE"], fail_in_rank_1)()
