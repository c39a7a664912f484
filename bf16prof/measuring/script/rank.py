"""The observer of a script's engines on a real rank: it collects steps, and writes what it saw as
the rank's result."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from bf16prof.engine.attribution import attribute
from bf16prof.engine.labels import CUBLAS_WORKSPACES
from bf16prof.engine.training import parameter_count
from bf16prof.measuring.probes import Probe
from bf16prof.measuring.results import GuestTask, OfScript, RankWriter
from bf16prof.measuring.script.device import DeviceView
from bf16prof.measuring.script.losses import Losses
from bf16prof.measuring.script.steps import SeenSteps
from bf16prof.measuring.worker import started_result
from bf16prof.records import Item
from bf16prof.runs import Status
from bf16prof.scripts.holders import are_outputs, held_by_frames
from bf16prof.scripts.hooks import hooked
from bf16prof.scripts.watch import Watch
from bf16prof.scripts.workload import Calls, case_of_engine, main_engine, workload_of_engine
from bf16prof.vocabulary import Phase
from bf16prof.whereabouts import Whereabouts

OURS = str(Path(__file__).parents[2])


class GuestRank:
    """This process as a rank of a script's job. `enough` is called when all steps that were asked
    for have been seen.

    `whereabouts`: where the rank says what it is about, if anybody wants to know.
    """

    def __init__(
        self, task: GuestTask, folder: Path, probe: Probe, enough: Callable[[], None] = lambda: None, whereabouts: Whereabouts | None = None
    ) -> None:
        self._task, self._folder, self._probe, self._enough, self._whereabouts = task, folder, probe, enough, whereabouts
        self._pid, self._writer = os.getpid(), RankWriter(folder)
        rank, self._world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._steps = SeenSteps(probe, None if whereabouts is None else self._say_where)
        self.watch = Watch(self._steps.marks, self)
        self._calls: dict[int, Calls] = {}
        self._zero_init = self._keeps_outputs = False
        self._said: list[str] = []
        self._losses = Losses(probe)
        self._device = DeviceView(probe.device_type)
        of_script = OfScript(task.script, self._world_size)
        self.result = dataclasses.replace(started_result(rank, probe), of_script=of_script)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context in which every engine that is built is watched."""
        with hooked(self.watch):
            yield

    def _say_where(self, phase: Phase | None) -> None:
        if self._whereabouts is not None:
            self._whereabouts.enter(phase, len(self._steps))

    # What the watch tells.

    def built(self, engine: Any, *, zero_init: bool) -> None:
        """An engine is ready; init is over with the first one."""
        self._device.begin()
        gc.collect()
        self._zero_init = self._zero_init or zero_init
        self._steps.marks.mark(Phase.INIT)
        self._steps.is_init_over()
        self.save(parameters=sum(parameter_count(each) for each in self.watch.engines), device_name=self._probe.name)
        self._steps.begins()

    def adopted(self, engine: Any) -> None:
        """An engine that was built before anybody watched."""
        self.watch.add(engine)
        self._device.begin()
        self._steps.marks.mark(None)
        self.save(parameters=sum(parameter_count(each) for each in self.watch.engines), device_name=self._probe.name)
        self._steps.begins()

    def note(self, text: str) -> None:
        """Something that there is to say in any case."""
        self._said.append(text)

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """A forward pass begins."""
        self._calls.setdefault(id(engine), Calls()).see(arguments, keywords)

    def goes_backward(self, loss: Any) -> None:
        """A loss, perhaps."""
        self._losses.see(loss)

    def stepped(self, engine: Any, frame: FrameType) -> None:
        """A step is over."""
        if os.getpid() != self._pid:
            return
        number = len(self._steps)
        is_warmup = number < self._task.warmup
        is_last = number + 1 >= self._task.warmup + self._task.steps
        allocated = self._steps.ends(is_warmup=is_warmup, is_last=is_last)
        self._losses.step_ends(wait=is_warmup)
        if is_warmup or is_last:
            self._attribute(allocated, frame)
        self._steps.marks.is_timed = number + 1 >= self._task.warmup
        is_decisive = is_warmup or is_last or not number
        if is_decisive or self._writer.is_due:  # what is written grows with the steps
            self.save(force=is_decisive, steps=self._losses.of(self._steps.records()))
        if is_last:
            self.listen_no_more()
            self._enough()
        self._steps.begins()

    # What becomes of it.

    def listen_no_more(self) -> None:
        """From now on the script runs as if nobody were here."""
        self.watch.end()
        self.result = dataclasses.replace(self.result, **self._device.end())
        if self._whereabouts is not None:
            self._whereabouts.say(f"past the {len(self._steps)} steps that were watched")

    def save(self, *, force: bool = True, **changes: Any) -> None:
        """Update the result and write it; without `force`, only if the last write is long ago, and
        a full disk does not matter yet."""
        outside = self._steps.outside
        changes["init"], changes["evaluation"] = outside.get(Phase.INIT, self.result.init), outside.get(Phase.EVAL)
        changes = {"run_peak_bytes": self._probe.run_peak_bytes(), "reserved_bytes": self._probe.reserved_bytes(), **changes}
        self.result = dataclasses.replace(self.result, **changes)
        self._writer.write(self.result, force=force)

    def end(self, status: Status, message: str = "", **changes: Any) -> None:
        """The last word: what is known at the end only, and how the script ended."""
        if os.getpid() != self._pid:
            return
        with suppress(Exception):  # a device that has failed cannot be asked
            self._steps.is_script_over()
        self.listen_no_more()
        with suppress(Exception):
            self._know_times()
            self.result = dataclasses.replace(self.result, **self._of_the_device())
        self.save(status=status, message=message, **changes)

    def _attribute(self, allocated: int, frame: FrameType) -> None:
        """What engines and loop hold now, by name; and the case, as the engine that trains most has
        it."""
        kept = held_by_frames(frame, (OURS,))
        items, host_items = attribute(self.watch.engines, kept, self._probe.device_type)
        self._keeps_outputs = are_outputs(kept)
        del kept
        self.result = dataclasses.replace(
            self.result, allocated_bytes=allocated, items=tuple(items), host_items=tuple(host_items), of_script=self._of_script()
        )

    def _of_script(self) -> OfScript:
        engine = main_engine(self.watch.engines, self._calls)
        calls = self._calls.get(id(engine), Calls())
        workload = workload_of_engine(engine, calls, zero_init=self._zero_init, keeps_outputs=self._keeps_outputs)
        case = case_of_engine(self._task.script, engine, self._world_size, calls)
        return OfScript(self._task.script, self._world_size, case, workload, tuple(self._notes(calls)))

    def _notes(self, calls: Calls) -> list[str]:
        notes = list(self._said)
        if len(self.watch.engines) > 1:
            names = ", ".join(f"{number}: {type(each.module).__name__}" for number, each in enumerate(self.watch.engines, 1))
            notes.append(f"{len(self.watch.engines)} engines ({names}); the case and the workload are those of the one that trains most")
        if len(calls.sequence_lengths) > 1:
            notes.append(f"sequences of {min(calls.sequence_lengths)} to {max(calls.sequence_lengths)} tokens were seen")
        return notes

    def _know_times(self) -> None:
        """Times of phases by the device's own clock, which could not be asked while the script
        ran."""
        self._probe.synchronize()
        self._losses.wait()
        self.result = dataclasses.replace(self.result, steps=self._losses.of(self._steps.timed_records()))

    def _of_the_device(self) -> dict[str, Any]:
        """What cuBLAS holds inside the allocator, and how often that had to try again."""
        freed = self._probe.free_workspaces()
        workspaces = (Item(*CUBLAS_WORKSPACES, freed, "measured: what freeing them gave back"),) if freed and self.result.items else ()
        return {"items": (*self.result.items, *workspaces), "allocator_retries": self._probe.retries()}
