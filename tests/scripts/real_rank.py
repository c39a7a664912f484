"""One real rank of a script: the hooks of `bf16prof.scripts`, the probe of `measure`, and what they
saw, in a file."""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from bf16prof.engine.phases import PhaseMarks
from bf16prof.measuring.batons import use_dying_batons
from bf16prof.measuring.face import ProbeMemory
from bf16prof.measuring.probes.cpu import CpuProbe
from bf16prof.processes import threads_per_rank
from bf16prof.scripts.command import read_script
from bf16prof.scripts.face.worn import cpu_as_gpu, gloo_for_nccl, replaced, worn
from bf16prof.scripts.hooks import hooked
from bf16prof.scripts.main import SeenEnough
from bf16prof.scripts.main import run as run_script
from bf16prof.scripts.watch import Watch


class Rank:
    """An observer that collects steps, and ends the script after so many."""

    def __init__(self, probe: CpuProbe, steps: int) -> None:
        self.allocated: list[int] = []
        self.phases: list[dict[str, tuple[int | None, int | None]]] = []
        self.probe, self._steps = probe, steps
        self.marks = PhaseMarks(probe, probe.settle)

    def built(self, engine: Any, *, zero_init: bool) -> None:
        gc.collect()

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        pass

    def goes_backward(self, loss: Any) -> None:
        pass

    def stepped(self, engine: Any, frame: FrameType) -> None:
        self.probe.settle()
        self.allocated.append(self.probe.allocated_bytes())
        self.phases.append({str(phase): (memory.peak_bytes, memory.end_bytes) for phase, memory in self.marks.take().items()})
        if len(self.allocated) >= self._steps:
            raise SeenEnough


def run(path: Path, words: list[str], steps: int) -> None:
    import torch

    torch.set_num_threads(threads_per_rank(int(os.environ["WORLD_SIZE"])))
    use_dying_batons()
    backend = importlib.import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None  # type: ignore[attr-defined] # collectives over shared memory, which the dry run leaves out as well
    rank = Rank(CpuProbe(), steps)
    watch = Watch(rank.marks, rank)
    gpu = cpu_as_gpu(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), ProbeMemory(rank.probe))
    with hooked(watch), replaced(gloo_for_nccl()), worn(gpu, torch.device("cpu")):
        watch.begin()
        ending = run_script(read_script(words))
    path.write_text(json.dumps({"message": ending.message, "allocated": rank.allocated, "steps": rank.phases}))
    sys.stdout.flush()
    os._exit(0)
