"""One real rank of a script: the hooks of `bf16prof.scripts`, the probe of `measure`, and what they saw, in a file."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from bf16prof.engine.phases import PhaseMarks
from bf16prof.measure.probes.cpu import CpuProbe
from bf16prof.processes import threads_per_rank
from bf16prof.records import Phase, PhaseMemory, merge_phases
from bf16prof.scripts.command import read_script
from bf16prof.scripts.hooks import hooked
from bf16prof.scripts.main import Finished
from bf16prof.scripts.main import run as run_script
from bf16prof.scripts.watch import Watch


class Rank:
    """An observer that collects steps, and ends the script after so many."""

    def __init__(self, probe: CpuProbe, steps: int) -> None:
        self.allocated: list[int] = []
        self.phases: dict[Phase, PhaseMemory] = {}
        self._probe, self._steps = probe, steps
        self.marks = PhaseMarks(probe, probe.settle)

    def built(self, engine: Any, *, zero_init: bool) -> None:
        gc.collect()

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        pass

    def stepped(self, engine: Any, frame: FrameType) -> None:
        self._probe.settle()
        self.allocated.append(self._probe.allocated_bytes())
        self.phases = merge_phases(self.phases, self.marks.take())
        if len(self.allocated) >= self._steps:
            raise Finished


def run(path: Path, words: list[str], steps: int) -> None:
    import deepspeed.comm.torch
    import torch

    torch.set_num_threads(threads_per_rank(int(os.environ["WORLD_SIZE"])))
    deepspeed.comm.torch.build_shm_op = lambda: None  # DeepSpeed's collectives over shared memory, which the dry run leaves out as well
    rank = Rank(CpuProbe(), steps)
    watch = Watch(rank.marks, rank)
    with hooked(watch):
        watch.begin()
        ending = run_script(read_script(words))
    phases = {str(phase): [memory.peak_bytes, memory.end_bytes] for phase, memory in rank.phases.items()}
    path.write_text(json.dumps({"message": ending.message, "allocated": rank.allocated, "phases": phases}))
    sys.stdout.flush()
    os._exit(0)
