"""`with bf16prof.watch(engine): ...`: the same measurement from within a script or a notebook, of
engines that exist already."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bf16prof.measuring.probes import Probe
from bf16prof.measuring.results import GuestTask
from bf16prof.runs import Status
from bf16prof.scripts.command import Script
from bf16prof.scripts.watch import in_backward

BEFORE = "what was allocated before bf16prof.watch began is counted as far as the engine held it then"


@contextlib.contextmanager
def watch(engine: Any, output_dir: str | Path | None = None, *, warmup: int = 3, steps: int = 10, force: bool = False) -> Iterator[Path]:
    """Measure the training steps that this engine makes inside, and write this rank's result into
    the run directory, which it yields.

    All ranks have to enter it. `bf16prof report RUN` joins what they have written. The first
    `warmup` steps are watched closely, the next `steps` are timed, and nobody looks at those that
    follow. Raises `InputError` where the run directory has a result of this rank already.
    """
    from bf16prof.measuring.script.probes import make_guest_probe
    from bf16prof.measuring.script.rank import GuestRank
    from bf16prof.measuring.script.running import claimed_rank, own_extensions

    run_folder = Path(output_dir) if output_dir is not None else _agreed_folder()
    folder = claimed_rank(run_folder, replace=force)
    with own_extensions():
        probe, shown = make_guest_probe()
    held = _held(engine)
    task = GuestTask(Script(path=sys.argv[0] or "notebook"), warmup, steps)
    rank = GuestRank(task, folder, probe if probe.device_type == "cuda" else LateProbe(probe, held))
    assert not in_backward(), "inside a backward pass"
    with shown, rank.watching():
        rank.adopted(engine)
        if probe.device_type != "cuda":
            rank.note(BEFORE)
        try:
            yield run_folder
        except BaseException as error:
            rank.end(Status.FAILED, f"{type(error).__name__}: {error}".splitlines()[0], stopped_at=time.monotonic())
            raise
        done = bool(rank.result.steps)
        rank.end(Status.FINISHED if done else Status.REFUSED, "" if done else "no optimizer step was taken inside bf16prof.watch")


def _agreed_folder() -> Path:
    """A new run directory, the same on all ranks."""
    import torch

    from bf16prof.claims import new_folder

    if folder := os.environ.get("BF16PROF_OUTPUT_DIR"):
        return Path(folder)
    names: list[Any] = [str(new_folder("watch"))] if int(os.environ.get("RANK", "0")) == 0 else [None]
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(names, src=0)
    return Path(names[0])


def _held(engine: Any) -> int:
    """The bytes on the CPU that an engine holds now."""
    from bf16prof.engine.attribution import attribute

    items, _ = attribute([engine], {}, "cpu")
    return sum(item.bytes for item in items)


class LateProbe:
    """A CPU probe that was installed late: what was held by then comes on top of what it counts."""

    def __init__(self, probe: Probe, held: int) -> None:
        self._probe, self._held = probe, held
        self.name, self.device, self.device_type = probe.name, probe.device, probe.device_type

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now."""
        return self._probe.allocated_bytes() + self._held

    def take_phase_peak(self) -> int:
        """The highest since the last call."""
        return self._probe.take_phase_peak() + self._held

    def run_peak_bytes(self) -> int:
        """The highest since the probe was made."""
        return self._probe.run_peak_bytes() + self._held

    def reserved_bytes(self) -> int | None:
        """As the probe says."""
        return self._probe.reserved_bytes()

    def retries(self) -> int | None:
        """As the probe says."""
        return self._probe.retries()

    def free_workspaces(self) -> int:
        """As the probe says."""
        return self._probe.free_workspaces()

    def settle(self) -> None:
        """As the probe says."""
        self._probe.settle()

    def synchronize(self) -> None:
        """As the probe says."""
        self._probe.synchronize()
