"""The process that dry-runs a script. Run as `python -m bf16prof.dry_run.script.worker FOLDER`;
leaves a record, a fault, or both.

The record is written as soon as there is one, and the process is ended there and then: nothing that
the script catches, waits for or does in the end can come between.
"""

from __future__ import annotations

import dataclasses
import gc
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

from bf16prof.documents import raw_document
from bf16prof.dry_run.runner import Files
from bf16prof.dry_run.script.task import ScriptTask
from bf16prof.dry_run.task import Fault
from bf16prof.dry_run.worker import ProgressFile, comes_from_checking
from bf16prof.files import write_json
from bf16prof.processes import die_with_parent
from bf16prof.profiles.gpus import find_gpu
from bf16prof.runs import read
from bf16prof.scripts.hooks import hooked, nothing_built
from bf16prof.scripts.main import Ending, run
from bf16prof.whereabouts import Whereabouts, deadline

WITHOUT_VALUES = frozenset({
    "DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode", "UnsupportedOperatorException",
})  # fmt: skip
"""What fake tensors raise where a script depends on values (torch/_subclasses/fake_tensor.py)."""

ENOUGH_STEPS = 2
"""The first step makes the optimizer's states; after the second there is a state between steps to
speak of."""

MEASURE = "bf16prof measure runs it on real ranks"


class Worker:
    """Runs the task's script, once, in this process."""

    def __init__(self, folder: Path) -> None:
        self._files = Files(folder, 0)
        self._task: ScriptTask = read(self._files.task, ScriptTask)
        self._whereabouts = Whereabouts(folder, self._task.rank, deadline())
        self._pid = os.getpid()
        self._exit = os._exit
        self._rank: Any = None
        self._tracker: Any = None
        self._gpu: Any = None

    def run(self) -> NoReturn:
        """Enter the world, run the script, leave."""
        from bf16prof.dry_run.script.invented import Invented
        from bf16prof.dry_run.script.rank import ScriptRank
        from bf16prof.dry_run.script.surroundings import surroundings
        from bf16prof.dry_run.script.tracker import ScriptTracker
        from bf16prof.dry_run.world import world

        warnings.simplefilter("ignore")
        task = self._task
        self._gpu = None if task.gpu is None else find_gpu(task.gpu)
        options: dict[str, Any] = {"expandable_segments": task.expandable_segments, "rank": task.rank}
        with world(task.world_size, self._gpu, **options, kind=ScriptTracker) as tracker:
            assert isinstance(tracker, ScriptTracker)
            tracker.invented = Invented()
            self._tracker = tracker
            if task.snapshot:
                tracker.ledger.keep_trace()
            self._rank = ScriptRank(
                task, self._gpu, tracker, ProgressFile(self._files.progress), self._enough, whereabouts=self._whereabouts
            )
            with surroundings(tracker, self._gpu, task.world_size, task.rank), hooked(self._rank.watch), self._rank.layers.followed():
                os._exit = self._leave  # type: ignore[assignment]
                gc.collect()
                self._rank.watch.begin()
                ending = run(task.script)
                self._end(ending)

    def _enough(self) -> None:
        """As many steps have been run as were asked for."""
        if os.getpid() == self._pid:
            self._end(Ending(0, finished=True))

    def _leave(self, code: int) -> NoReturn:
        """`os._exit`, called by the script or by a process that it has forked."""
        if os.getpid() == self._pid:
            self._end(Ending(code & 0xFF, f"left by os._exit({code})"))
        self._exit(code)

    def _end(self, ending: Ending) -> NoReturn:
        """Write what there is to say, and leave."""
        if os.getpid() == self._pid:
            fault = self._fault(ending)
            if self._rank.steps:
                self._save(ending)
            if fault is not None:
                write_json(self._files.fault, fault)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        self._exit(0)

    def _save(self, ending: Ending) -> None:
        import deepspeed
        import torch

        record = self._rank.record()
        steps, wanted = len(self._rank.steps), self._task.steps
        said = () if ending.finished else (f"{self._task.script.name} {ending.message or 'ended'} after {steps} of {wanted} steps",)
        notes = (
            f"DeepSpeed {deepspeed.__version__}, PyTorch {torch.__version__}",
            f"rank {self._task.rank} of {self._task.world_size}, {steps} steps of the script",
            *(self._gpu.caveats() if self._gpu else ()),
            *said,
            *record.notes,
            *self._tracker.invented.lines(),
            *self._tracker.lower_bounds(),
        )
        if self._task.snapshot:
            from bf16prof.dry_run.snapshot import write_snapshot

            write_snapshot(self._files.snapshot, self._tracker.ledger)
        write_json(self._files.described, self._rank.described())
        write_json(self._files.record, raw_document([dataclasses.replace(record, notes=notes)]))

    def _fault(self, ending: Ending) -> Fault | None:
        """Why the script did not get as far as it was meant to, if that is a fault."""
        name, error, steps = self._task.script.name, ending.error, len(self._rank.steps)
        if ending.finished or (ending.code == 0 and steps):
            return None
        if ending.code == 0:
            built = len(self._rank.watch.engines)
            what = "no optimizer step of its engine was taken" if built else nothing_built()
            return Fault(f"{name} ended: {what}", "", is_input=True)
        if type(error).__name__ in WITHOUT_VALUES:
            return (
                None
                if steps >= ENOUGH_STEPS
                else Fault(f"{name} depends on values of GPU tensors: {ending.message}", MEASURE, is_input=True)
            )
        if isinstance(error, Exception) and comes_from_checking(error):
            return Fault(f"DeepSpeed refuses {name}: {ending.message}", "", is_input=True)
        after = f", after {steps} step{'s' if steps > 1 else ''}" if steps else ""
        for key, why in self._rank.unchecked().items():
            return Fault(f"{name}: {key}: {why}; it {ending.message}{after}", MEASURE, is_input=True)
        return Fault(f"{name} {ending.message}{after}", "", is_input=False)


def main() -> NoReturn:
    """Run the task of the folder."""
    die_with_parent()
    Worker(Path(sys.argv[1])).run()


if __name__ == "__main__":
    main()
