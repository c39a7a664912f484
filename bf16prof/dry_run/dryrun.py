"""One job through the real engine in a dry run: its record, with the peak and the end of every
phase."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bf16prof.cases import Job
from bf16prof.dry_run.compiler import import_uncompiled
from bf16prof.dry_run.exchanges import Exchanges
from bf16prof.dry_run.flash import flash_attention
from bf16prof.dry_run.hardware.nvme import buffers_note
from bf16prof.dry_run.layers import Layers
from bf16prof.dry_run.ledger import Ledger
from bf16prof.dry_run.micro_steps import MicroSteps
from bf16prof.dry_run.recording import Ran, of_the_device, record_of, until_settled
from bf16prof.dry_run.repeat import repeat_body
from bf16prof.dry_run.shims import library_shims
from bf16prof.dry_run.task import Progress, Task
from bf16prof.dry_run.tracker import GPU, HOST, Tracker
from bf16prof.dry_run.versions import check, installed
from bf16prof.dry_run.world import world
from bf16prof.engine.attribution import attribute, held_by_all
from bf16prof.engine.batch import batch_spec, evaluation_of
from bf16prof.engine.engines import engine_of
from bf16prof.engine.megatron.settings import MODULE, update_note
from bf16prof.engine.phases import PhaseMarks, attach
from bf16prof.engine.training import (
    Batch,
    StepLoop,
    TrainingLoop,
    build_engine,
    build_reference,
    import_libraries,
    parameter_count,
    training_loop,
)
from bf16prof.engine.workload import workload_of
from bf16prof.models.autograd.events import GRADIENT
from bf16prof.models.experts import capacity_note, require_capacities
from bf16prof.records import Item, MemoryRecord, merge_phases
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Phase

OnProgress = Callable[[Progress], None]


def dry_run(
    task: Task, on_progress: OnProgress = lambda _: None, beside: AbstractContextManager[None] | None = None
) -> tuple[MemoryRecord, Ledger]:
    """Run the task's job as one rank of its world (one dry run per process): its record, and the
    ledger that it was read from.

    `beside` is entered once the world is: what a stage of a pipeline is told by the others
    (`stages.told`).
    """
    warnings.simplefilter("ignore")  # PyTorch's and DeepSpeed's own, about private interfaces and CPUs
    job = task.job.job()
    if job.profile.is_for_megatron:
        import_uncompiled(MODULE)
    notes = (f"{engine_of(job).version()}, PyTorch {torch.__version__}", *check(installed([job])), *(job.gpu.caveats() if job.gpu else ()))
    import_libraries(job)
    with (
        flash_attention(job),
        world(job.case.world_size, job.gpu, expandable_segments=task.expandable_segments, rank=task.rank) as tracker,
        beside or nullcontext(),
        _of_megatron(job, tracker, task.rank),
    ):
        if task.snapshot:
            tracker.ledger.keep_trace()
        rank = DryRank(job, tracker, on_progress)
        record = rank.run(task.steps)
        return dataclasses.replace(record, notes=(*notes, *record.notes, *tracker.lower_bounds())), tracker.ledger


def _of_megatron(job: Job, tracker: Tracker, rank: int) -> AbstractContextManager[None]:
    """What megatron-core needs, where it trains."""
    if not job.profile.is_for_megatron:
        return nullcontext()
    from bf16prof.dry_run.megatron import megatron_world

    return megatron_world(job, tracker, rank)


class DryRank:
    """The rank that is run: its phase marks, which label what the engine holds at each of them, and
    its progress."""

    def __init__(self, job: Job, tracker: Tracker, on_progress: OnProgress) -> None:
        self._job, self._tracker, self._ledger = job, tracker, tracker.ledger
        self._marks = PhaseMarks(self._ledger, on_mark=self._on_mark)
        self._on_progress = on_progress
        self._engine: Any = None
        self._others: list[Any] = []
        self._loop: StepLoop | None = None
        self._ledger.before_verdict, self._ledger.on_tick = self._label, self._say
        self._is_repeating = False
        self._left_out = 0
        self._layer, self._numbers = "", dict[int, str]()

    def run(self, steps: int) -> MemoryRecord:
        """Init, the steps, and the record."""
        self._marks.mark(Phase.INIT)
        gc.freeze()  # what has been imported is no garbage; looking at it takes longer than the dry run
        reference = build_reference(self._job)
        self._others = [] if reference is None else [reference]
        self._engine = build_engine(self._job)
        require_capacities(self._engine.module)
        gc.collect()
        self._marks.mark(None)
        phases = self._marks.take()
        attach(self._engine, self._marks)
        self._watch(self._engine.module)
        self._micro_steps = MicroSteps([self._engine, *self._others], self._tracker)
        self._loop = training_loop(self._engine, self._job, self._batches(self._job), self._leave_out, reference)
        exchanges = Exchanges.of(self._job, self._ledger)
        self._tracker.watch = exchanges.see if exchanges else None
        layers = Layers(self._ledger, self._enter)
        for engine in (self._engine, *self._others):
            layers.name(engine.module)
        self._numbers = _numbers_of_layers(self._engine.module)
        workload = self._job.profile.workload
        with library_shims(packed=workload.packed_sequences > 0, padded=workload.has_pairs), layers.followed():
            for _ in range(steps):
                self._ledger.begin_step()
                self._micro_steps.begin_step()
                self._left_out = 0
                if exchanges:
                    exchanges.begin_step()
                self._loop.step()
                phases = merge_phases(phases, self._marks.take())
            phases = self._repeated(phases)
            held = self._held(self._loop)
            phases = merge_phases(phases, self._evaluated(self._loop))
        record = self._record(*held, phases)
        micro_steps = self._job.profile.workload.gradient_accumulation_steps
        found = exchanges.transfers(micro_steps - self._left_out, micro_steps) if exchanges else ()
        notes = [*capacity_note(self._engine.module), *buffers_note(self._engine.optimizer), *update_note(self._job)]
        return dataclasses.replace(record, exchanges=found, notes=(*record.notes, *notes))

    def _leave_out(self, number: int, total: int) -> int:
        """How many micro-steps after this one need not be run: those before the last, if the next
        would do exactly what this one did."""
        following = total - number - 2
        if following < 1 or (body := self._micro_steps.body(number)) is None:
            return 0
        self._is_repeating = True
        for mark in repeat_body(self._ledger, body, following):
            self._marks.mark(mark.phase)
        self._is_repeating = False
        self._left_out = following
        self._micro_steps.move_on(following)
        return following

    def _repeated(self, phases: dict[Phase, PhaseMemory]) -> dict[Phase, PhaseMemory]:
        """The phases over as many further steps as it takes the caching allocator to settle."""
        self._is_repeating = True
        goes_on = self._job.profile.workload.evaluation is not None
        return until_settled(self._ledger, self._marks, phases, goes_on=goes_on)

    def _evaluated(self, loop: StepLoop) -> dict[Phase, PhaseMemory]:
        """What is evaluated when the steps are over, where something is. Its events follow those of
        the last step."""
        if self._job.profile.workload.evaluation is None:
            return {}
        assert isinstance(loop, TrainingLoop), "engine/shared_batches.py refuses the others"
        self._is_repeating, self._tracker.watch = False, None
        self._marks.mark(Phase.EVAL)
        loop.evaluate(self._batches(evaluation_of(self._job)))
        self._marks.mark(None)
        return self._marks.take()

    def _on_mark(self, phase: Phase | None) -> None:
        self._label()
        self._ledger.mark(phase)
        self._say()

    def _label(self) -> None:
        """Let the engine say what it holds."""
        if self._engine is not None and not self._is_repeating:
            self._tracker.claim(held_by_all([self._engine, *self._others], self._loop.kept if self._loop else {}))

    def _enter(self, module: nn.Module) -> None:
        """Say which layer runs."""
        if layer := self._numbers.get(id(module)):
            self._layer = layer
            self._say()

    def _say(self) -> None:
        phase = self._ledger.marks[-1].phase if self._ledger.marks else None
        layer = self._layer if phase in (Phase.FORWARD, Phase.BACKWARD, Phase.EVAL) else ""
        self._on_progress(Progress(phase, self._ledger.step, layer, self._ledger.allocated_bytes()))

    def _watch(self, model: nn.Module) -> None:
        """Label gradients as soon as they are there."""
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            hook = parameter.register_post_accumulate_grad_hook(self._claim_gradient)  # type: ignore[no-untyped-call]
            hooks: Any = parameter._post_accumulate_grad_hooks
            hooks.move_to_end(hook.id, last=False)  # before DeepSpeed's, which take the gradient away

    def _claim_gradient(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._tracker.claim([(GRADIENT, parameter.grad)])

    def _batches(self, job: Job) -> Callable[[], Batch]:
        """Batches without values, of a job's shape, on its device."""
        spec = batch_spec(job)
        return lambda: {
            name: torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype), device=self._home) for name, tensor in spec.items()
        }

    @property
    def _home(self) -> torch.device:
        return HOST if self._job.gpu is None else GPU

    def _held(self, loop: StepLoop) -> tuple[list[Item], int]:
        """What is held between steps: by name, and in all."""
        items, _ = attribute([self._engine, *self._others], loop.kept, self._home)
        return [*items, *of_the_device(self._ledger)], self._ledger.allocated_bytes()

    def _record(self, items: list[Item], allocated_bytes: int, phases: dict[Phase, PhaseMemory]) -> MemoryRecord:
        job, ledger = self._job, self._ledger
        ran = Ran(
            case=job.case,
            gpu=job.gpu,
            workload=workload_of(job),
            parameters=parameter_count(self._engine),
            items=items,
            allocated_bytes=allocated_bytes,
            phases=phases,
            step=ledger.step,
        )
        return record_of(ran, self._tracker)


def _numbers_of_layers(model: nn.Module) -> dict[int, str]:
    """The layers of the longest list of modules in the model, by their ids, each with its
    number."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    longest = max(lists, key=len, default=nn.ModuleList())
    return {id(layer): f"layer {index + 1} of {len(longest)}" for index, layer in enumerate(longest)}
