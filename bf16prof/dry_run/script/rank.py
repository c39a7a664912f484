"""The rank that runs the script: it watches the script's engines, and makes the record of what it
saw."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

from torch import Tensor

from bf16prof.dry_run.layers import Layers
from bf16prof.dry_run.recording import Ran, of_the_device, record_of, until_settled
from bf16prof.dry_run.script.task import ScriptTask
from bf16prof.dry_run.script.tracker import ScriptTracker
from bf16prof.dry_run.task import Progress
from bf16prof.dry_run.tracker import GPU, HOST
from bf16prof.engine.attribution import attribute, held_by_all
from bf16prof.engine.phases import PhaseMarks
from bf16prof.engine.training import parameter_count
from bf16prof.models.autograd.events import GRADIENT
from bf16prof.profiles.gpus import Gpu
from bf16prof.records import Item, MemoryRecord, merge_phases
from bf16prof.scripts.described import Described, described
from bf16prof.scripts.holders import are_outputs, held_by_frames
from bf16prof.scripts.watch import Watch
from bf16prof.scripts.workload import Calls, case_of_engine, main_engine, unchecked, workload_of_engine
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Component, Phase
from bf16prof.whereabouts import Whereabouts

BATCH_WORDS = "batches or shapes differ from step to step"


@dataclass(frozen=True)
class JobStep:
    """A step of the job that is over: what is allocated after it, its phases, and what the engines
    and the loop hold."""

    allocated_bytes: int
    phases: dict[Phase, PhaseMemory]
    items: tuple[Item, ...]


class ScriptRank:
    """An observer (`scripts.watch`) that feeds the tracker with labels and collects the steps."""

    def __init__(
        self,
        task: ScriptTask,
        gpu: Gpu | None,
        tracker: ScriptTracker,
        on_progress: Callable[[Progress], None],
        enough: Callable[[], None],
        *,
        whereabouts: Whereabouts,
    ) -> None:
        """`enough` is called when as many steps have been run as the task asks for."""
        self._task, self._gpu, self._tracker, self._ledger = task, gpu, tracker, tracker.ledger
        self._on_progress, self._whereabouts, self._enough = on_progress, whereabouts, enough
        self._marks = PhaseMarks(self._ledger, on_mark=self._on_mark)
        self.watch = Watch(self._marks, self)
        self._ledger.before_verdict, self._ledger.on_tick = self._label, self._say
        self._calls: dict[int, Calls] = {}
        self._zero_init = self._keeps_outputs = False
        self._is_repeating = False
        self._phases: dict[Phase, PhaseMemory] = {}
        self.steps: list[JobStep] = []
        self.layers = Layers(self._ledger)

    def built(self, engine: Any, *, zero_init: bool) -> None:
        """An engine is ready: init is over with the first."""
        self.layers.name(engine.module)
        gc.collect()
        if len(self.watch.engines) == 1:
            self._zero_init = zero_init
            self._ledger.begin_step()
        for parameter in filter(lambda p: p.requires_grad, engine.module.parameters()):
            hook = parameter.register_post_accumulate_grad_hook(self._claim_gradient)
            parameter._post_accumulate_grad_hooks.move_to_end(hook.id, last=False)  # before DeepSpeed's, which take the gradient away

    def called(self, engine: Any, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        """A forward pass begins."""
        self._calls.setdefault(id(engine), Calls()).see(arguments, keywords)

    def goes_backward(self, loss: Any) -> None:
        """Losses have no values."""

    def stepped(self, engine: Any, frame: FrameType) -> None:
        """A step is over: what is held now is what is held between steps."""
        phases = self._marks.take()
        self._phases = merge_phases(self._phases, phases)
        kept = {name: [each for each in held if not self._tracker.is_left_out(each)] for name, held in held_by_frames(frame).items()}
        engines = self.watch.engines
        self._tracker.claim(held_by_all(engines, kept))
        items, _ = attribute(engines, kept, self._home)
        self._keeps_outputs = are_outputs(kept)
        del kept
        self.steps.append(JobStep(self._ledger.allocated_bytes(), phases, (*items, *of_the_device(self._ledger))))
        self._say()
        if len(self.steps) >= self._task.steps:
            self._is_repeating = True
            self._phases = until_settled(self._ledger, self._marks, self._phases)
            self._enough()
        self._ledger.begin_step()

    def record(self) -> MemoryRecord:
        """The record of the steps so far; there must be one."""
        last, engine = self.steps[-1], main_engine(self.watch.engines, self._calls)
        calls = self._calls.get(id(engine), Calls())
        if self._marks.phase is Phase.EVAL:  # the last thing that the script has done
            self._marks.mark(None)
        self._phases = merge_phases(self._phases, self._marks.take())
        between = self._highest_between_steps()
        ran = Ran(
            case=case_of_engine(self._task.script, engine, self._task.world_size, calls),
            gpu=self._gpu,
            workload=workload_of_engine(engine, calls, zero_init=self._zero_init, keeps_outputs=self._keeps_outputs),
            parameters=sum(parameter_count(each) for each in self.watch.engines),
            items=last.items,
            allocated_bytes=last.allocated_bytes,
            phases={phase: self._phases[phase] for phase in Phase if phase in self._phases},
            step=self._last_whole_step(),
        )
        record = record_of(ran, self._tracker)
        return replace(record, notes=(*record.notes, *between, *self._notes(calls)))

    def described(self) -> Described:
        """The model of the engine that the record is about, in the words of `estimate`."""
        engine = main_engine(self.watch.engines, self._calls)
        return described(engine, self._calls.get(id(engine), Calls()))

    def _highest_between_steps(self) -> list[str]:
        """What a script does between steps belongs to the step before, where it holds more than any
        phase; said if so."""
        between = self._marks.between
        if between <= max(memory.peak_bytes or 0 for phase, memory in self._phases.items() if phase is not Phase.INIT):
            return []
        self._phases = merge_phases(self._phases, {Phase.STEP: replace(self._phases[Phase.STEP], peak_bytes=between)})
        return [f"the script holds {between:,} bytes between two steps, more than in any phase: counted as the step's"]

    def _last_whole_step(self) -> int:
        """The step whose timeline is shown: the last one of the ledger, unless that has only been
        begun."""
        return self._ledger.step if self._is_repeating else len(self.steps) - 1

    def _notes(self, calls: Calls) -> list[str]:
        engines = [f"{number}: {type(each.module).__name__}" for number, each in enumerate(self.watch.engines, 1)]
        lengths = sorted(calls.sequence_lengths)
        notes = [f"{len(engines)} engines ({', '.join(engines)}); the case and the workload are those of the one that trains most"]
        notes = notes if len(engines) > 1 else []
        if len(lengths) > 1:
            peaks = ", ".join(f"{step.phases[Phase.FORWARD].peak_bytes:,}" for step in self.steps if Phase.FORWARD in step.phases)
            notes.append(f"sequences of {lengths[0]} to {lengths[-1]} tokens were seen; forward peaks by step: {peaks}")
        on = [f"{key} is on, which has not been held against real ranks: {why}" for key, why in self.unchecked().items()]
        return [*notes, *on, *spread(self.steps)]

    def unchecked(self) -> dict[str, str]:
        """Features of DeepSpeed's that are on and whose memory nobody has checked; by key, why."""
        return {key: why for engine in self.watch.engines for key, why in unchecked(engine).items()}

    def _on_mark(self, phase: Phase | None) -> None:
        self._whereabouts.enter(phase, len(self.steps))
        self._label()
        self._ledger.mark(phase)
        self._say()

    def _label(self) -> None:
        """Let the engines say what they hold."""
        if not self._is_repeating:
            self._tracker.claim(held_by_all(self.watch.engines, {}))

    def _say(self) -> None:
        phase = self._ledger.marks[-1].phase if self._ledger.marks else None
        self._on_progress(Progress(phase, self._ledger.step, "", self._ledger.allocated_bytes()))

    def _claim_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._tracker.claim([(GRADIENT, parameter.grad)])

    @property
    def _home(self) -> Any:
        return HOST if self._gpu is None else GPU


def spread(steps: Sequence[JobStep]) -> list[str]:
    """What differs between the steps after the first, in which optimizer states and ZeRO-3's trace
    are made.

    Compared are the bytes of what is held; where the caching allocator finds room for it differs
    from step to step in any case.
    """
    held = [sum(item.bytes for item in step.items if item.component is not Component.ROUNDING) for step in steps[1:]]
    if len(set(held)) < 2:
        return []
    return [f"from {min(held):,} to {max(held):,} bytes are held between steps: {BATCH_WORDS}; these are the last step's"]
