"""The record that all sources emit, and the case that it is about.

All sources (`estimate`, `simulate`, `measure`, `import`) emit the same `MemoryRecord`; the
reconciler and the reports read nothing else. Bytes are integers; `None` means "not known by this
source" and is never replaced by a guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from annotated_types import Interval

from bf16prof.parallelism import MOST_RANKS, Parallelism
from bf16prof.step_records import LossSummary, PhaseMemory, QualityStep, StepRecord, StepWork, Transfer
from bf16prof.vocabulary import (
    STRICT,
    TRAINING,
    Amount,
    Bytes,
    Component,
    Device,
    Offload,
    Phase,
    Share,
    Size,
    Source,
    Verdict,
    require_size,
)


@dataclass(frozen=True)
class Case:
    """One thing to predict or to measure. Records of the same case are compared with each other.

    `workload` is a digest of everything else that decides the memory: the model, the workload, the
    optimizer and the DeepSpeed settings (`profiles/identity.py`). So records of different workloads
    are never joined. It is empty where nobody knows what was trained. `sequence_parallel`: ranks
    that share each sequence; `tensor_parallel`: those that share each layer; `pipeline_parallel`:
    those that have some of the layers each. What is left of `world_size` is data parallel
    (`parallelism`); `expert_parallel` of those have experts of their own.
    """

    __pydantic_config__ = STRICT

    profile: str
    zero_stage: Annotated[int, Interval(ge=0, le=3)]
    world_size: Annotated[int, Interval(ge=1, le=MOST_RANKS)]
    recipe: str
    offload: Offload = Offload.NONE
    workload: str = ""
    sequence_parallel: Annotated[int, Interval(ge=1, le=MOST_RANKS)] = 1
    tensor_parallel: Annotated[int, Interval(ge=1, le=MOST_RANKS)] = 1
    pipeline_parallel: Annotated[int, Interval(ge=1, le=MOST_RANKS)] = 1
    expert_parallel: Annotated[int, Interval(ge=1, le=MOST_RANKS)] = 1

    def __post_init__(self) -> None:
        if self.world_size % self._shared:
            raise ValueError(f"{self.world_size} ranks cannot be cut into groups of {self._shared}")
        if self.world_size // self._shared % self.expert_parallel:
            raise ValueError(
                f"experts cannot be spread over {self.expert_parallel} of {self.world_size // self._shared} data parallel ranks"
            )

    @property
    def parallelism(self) -> Parallelism:
        """How the ranks share the work."""
        sizes = self.sequence_parallel, self.tensor_parallel, self.pipeline_parallel, self.expert_parallel
        return Parallelism(self.world_size // self._shared, *sizes)

    @property
    def _shared(self) -> int:
        return self.sequence_parallel * self.tensor_parallel * self.pipeline_parallel

    @property
    def label(self) -> str:
        """A short name, unique within a profile and usable as a folder name: `zero3-w2-bf16-full`,
        `zero3-w4-sp2-bf16-full`."""
        tail = "" if self.offload is Offload.NONE else f"-offload-{self.offload}"
        return f"zero{self.zero_stage}-w{self.world_size}{self.parallelism.tail}-{self.recipe}{tail}"


@dataclass(frozen=True)
class Workload:
    """What was asked of a source, so that an answer can say what it is about.

    * `model`: its type: transformers' `model_type`, one of our families, or the function that makes
      it.
    * `sequence_length` in tokens (`None` for a model that takes none), `micro_batch_size` in
      sequences per rank and forward pass, `gradient_accumulation_steps` forward passes per
      optimizer step.
    * `activation_checkpointing`: layers are recomputed in backward. `attention`: the implementation
      that was asked for, `None` where the model's code chooses. `optimizer`: what updates the
      weights, in words.
    * `zero_init`: the model is built inside `deepspeed.zero.Init` (ZeRO-3 only). `keeps_outputs`:
      the training loop holds the model's outputs until the next forward pass.
    * `deepspeed`: the DeepSpeed configuration with ZeRO's defaults filled in; empty where another
      engine trains.
    * `engine`: who trains. `megatron`: the options that the job sets of megatron-core.
    * `adapter`: what is trained in the place of the model's own parameters, in words; `None` where
      those are trained.
    * `liger`: which of Liger-Kernel's replacements the model has.
    * `tiled_mlp`: MLPs are computed in tiles of the sequence.
    * `fused_loss`: who computes head and loss without the whole logits, beside Liger.
    * `packed_sequences`: sequences that fill each row of `sequence_length` tokens; 0 where a row is
      a sequence.
    * `dpo`: preference optimization, `reference` with a second model or `precomputed` without.
      `reward`: a reward model is trained.
    * `evaluation`: what is evaluated when the steps are over, in words.
    * `assumed`: which of all this nobody said, in a word each.
    """

    __pydantic_config__ = STRICT

    model: str
    sequence_length: Size | None
    micro_batch_size: Size
    gradient_accumulation_steps: Size
    activation_checkpointing: bool
    attention: str | None
    optimizer: str
    zero_init: bool
    keeps_outputs: bool
    deepspeed: dict[str, Any] = field(hash=False)
    assumed: tuple[str, ...] = ()
    adapter: str | None = None
    liger: str = "none"
    tiled_mlp: bool = False
    evaluation: str | None = None
    packed_sequences: Size = 0
    dpo: str = "none"
    reward: bool = False
    fused_loss: str = "none"
    engine: str = "deepspeed"
    megatron: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Item:
    """One named tensor, or one named kind of tensor, inside a component.

    `bytes` are the bytes of its storages; `source` says where they are allocated (DeepSpeed's file
    and function, or PyTorch's).
    """

    __pydantic_config__ = STRICT

    component: Component
    name: str
    bytes: Size
    source: str = ""

    def __post_init__(self) -> None:
        require_size(self.name, self.bytes)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes of one component that one layer of the model allocated while it ran ("model.layers.3",
    "lm_head")."""

    __pydantic_config__ = STRICT

    layer: str
    component: Component
    bytes: Size


@dataclass(frozen=True)
class PhaseStart:
    """A phase begins before this event of a timeline."""

    __pydantic_config__ = STRICT

    phase: Phase
    event: Size


@dataclass(frozen=True)
class Timeline:
    """Bytes by component over one optimizer step, after each of the `events` (numbers of
    allocations and frees since the step began).

    `changes`: of each event the bytes that it allocated (or freed, below zero), and the index in
    `names` of what that was; empty where nobody knows.
    """

    __pydantic_config__ = STRICT

    events: tuple[Size, ...]
    phases: tuple[PhaseStart, ...]
    components: dict[Component, tuple[Size, ...]]
    names: tuple[str, ...] = ()
    changes: tuple[tuple[Bytes, Size], ...] = ()

    def __post_init__(self) -> None:
        for component, sizes in self.components.items():
            require_size(component, min(sizes, default=0))
            if len(sizes) != len(self.events):
                raise ValueError(f"{component} has {len(sizes)} values, the timeline has {len(self.events)} events")
        if self.changes and len(self.changes) != len(self.events):
            raise ValueError(f"{len(self.changes)} changes, the timeline has {len(self.events)} events")
        if any(name >= len(self.names) for _, name in self.changes):
            raise ValueError(f"a change names more than the {len(self.names)} names of the timeline")

    @property
    def totals(self) -> list[int]:
        """Bytes of all components after each event."""
        return [sum(sizes) for _, *sizes in zip(self.events, *self.components.values(), strict=True)]

    def thinned(self, points: int) -> Timeline:
        """The same in at most so many points: of neighbours the highest is kept."""
        totals = self.totals
        if len(totals) <= points:
            return self
        bounds = [i * len(totals) // points for i in range(points + 1)]
        kept = [max(range(*pair), key=totals.__getitem__) for pair in itertools.pairwise(bounds)]
        components = {component: tuple(sizes[k] for k in kept) for component, sizes in self.components.items()}
        changes = [self.changes[k] for k in kept] if self.changes else []
        used = {name: number for number, name in enumerate(dict.fromkeys(name for _, name in changes))}
        return Timeline(
            tuple(self.events[k] for k in kept),
            self.phases,
            components,
            tuple(self.names[name] for name in used),
            tuple((size, used[name]) for size, name in changes),
        )


@dataclass(frozen=True)
class OutOfMemory:
    """Where a job first asks for more than its GPU has.

    * `phase`, `step` (from 0, `None` before the first), `tensor`: what is being allocated when, as
      far as it is known.
    * `requested_bytes`, beyond the `allocated_bytes` and `reserved_bytes` at that moment;
      `limit_bytes` is what the allocator may reserve.
    * `holders`: the bytes that are allocated then, by component, biggest first; empty where nobody
      knows.
    * `total_bytes` of the GPU, of which `free_bytes` were free, on `rank`: as torch's message says
      them.
    """

    __pydantic_config__ = STRICT

    phase: Phase | None
    step: Size | None
    tensor: str
    requested_bytes: Size
    allocated_bytes: Size
    reserved_bytes: Size
    limit_bytes: Size
    holders: dict[Component, Size]
    free_bytes: Size | None = None
    total_bytes: Size | None = None
    rank: Size | None = None

    def __post_init__(self) -> None:
        _require_sizes(self.holders)


@dataclass(frozen=True)
class RankSummary:
    """What one rank of a measured case held and how long it took, and where it ran.

    * `host`, `node` (its number) and `device` ("cuda:3", "cpu").
    * `allocated_bytes` between steps, `peak_allocated_bytes` in training steps,
      `run_peak_allocated_bytes` with init, `reserved_bytes`.
    * `step_time_s` and `phase_time_s`: medians of the measured steps. Ranks wait for each other, so
      that steps take the same time on all of them; who holds up the others has the longest forward.
    """

    __pydantic_config__ = STRICT

    rank: Size
    host: str
    node: Size
    device: str
    allocated_bytes: Size | None = None
    peak_allocated_bytes: Size | None = None
    run_peak_allocated_bytes: Size | None = None
    reserved_bytes: Size | None = None
    step_time_s: Amount | None = None
    phase_time_s: dict[Phase, Amount] = field(default_factory=dict)


@dataclass(frozen=True)
class MemoryRecord:
    """What one source says of one case, on one device of the job (bytes on the rank that holds
    most; of rank 0 in a dry run).

    * `workload`: what was asked; `None` where the source does not know (a log of which nobody says
      what was trained).
    * `allocated_bytes`: live tensors between two steps (steady state). `components` add up to it;
      `items` name its parts.
    * `peak_allocated_bytes`: the highest during training steps and evaluation, set in `peak_phase`;
      `run_peak_allocated_bytes` includes init. `peak_components` and `peak_items` say what is alive
      at that moment; they add up to it. `peak_layers` says which layer allocated it, as far as one
      did while it ran; empty where the source does not follow modules.
    * `reserved_bytes`: the most that the caching allocator has held (an estimate: what its replay
      holds); `fragmentation_bytes` of it were not allocated at that moment. `device_bytes`: used on
      the device: by the process, as NVML sees it (measured), or by all that use it (imported); in a
      dry run the reserved bytes and the `device_items`, which are assumed to come on top of them.
    * `reserved_floor_bytes`: what the caching allocator has reserved at least, where the rest
      depends on fragmentation and is not known.
    * `verdict`: whether it fits its GPU; `None` where the source cannot tell. `limit_bytes` is what
      the caching allocator may reserve there and `margin` the share of it that has to stay free,
      because the source does not know everything that takes memory.
    * `inside_zero_init_bytes`: where only init does not fit, the whole-run peak of the same job
      built inside `deepspeed.zero.Init`.
    * `out_of_memory`: where the job would run out of its GPU's memory; `None` if it fits or if the
      source does not know.
    * `timeline`: bytes by component over the last step, and over the evaluation that follows it.
    * `host_bytes`: held in host memory on behalf of the device (offloading), by one rank;
      `host_bytes_per_node` by all ranks of a node.
    * `step_time_s`: median seconds of one optimizer step, `step_time_iqr_s` its interquartile
      range; `tokens_per_s` of the whole job.
    * `work`: what one rank has to do in a step; `step_time_floor_s`: no step on that GPU is faster
      (a bound, not a prediction).
    * `exchanges`: what ranks that share a batch send each other in a step, beside what `work`
      counts of ZeRO.
    * `step_time_error_s`: half the width of a calibrated prediction's error bar; `host_overhead_s`:
      the part of it that launching costs, as the calibration measured it.
    * `mfu`, `hfu` (0 to 1): model and hardware FLOPs utilisation, against the GPU's peak in the
      dtype of the matrix products.
    * `loss`: of the last step. `loss_summary`: of a curve that is known by its statistics only.
    * `allocator_retries`: allocations that succeeded only after the cache was freed.
    * `gpu_utilisation` (0 to 1), `power_w`: means of NVML's samples.
    * `quality`: lost updates and effective descent quality, by step, where they were measured.
    * `ranks`: every rank that was measured; in a dry run of a pipeline one of each stage.
    * `rounding`: by how many bytes a quantity may differ because a log printed it rounded, by the
      reconciler's name of the quantity.
    * `at_least`: the quantities, by the same names, that are lower bounds: a log proves so much,
      and says nothing of what is above it.
    """

    __pydantic_config__ = STRICT

    source: Source
    case: Case
    device: Device
    parameters: Size | None
    gpu: str | None = None
    workload: Workload | None = None
    allocated_bytes: Size | None = None
    components: dict[Component, Size] = field(default_factory=dict)
    items: tuple[Item, ...] = ()
    peak_allocated_bytes: Size | None = None
    peak_phase: Phase | None = None
    run_peak_allocated_bytes: Size | None = None
    peak_components: dict[Component, Size] = field(default_factory=dict)
    peak_items: tuple[Item, ...] = ()
    peak_layers: tuple[LayerBytes, ...] = ()
    phases: dict[Phase, PhaseMemory] = field(default_factory=dict)
    reserved_bytes: Size | None = None
    reserved_floor_bytes: Size | None = None
    fragmentation_bytes: Size | None = None
    device_bytes: Size | None = None
    device_items: tuple[Item, ...] = ()
    verdict: Verdict | None = None
    limit_bytes: Size | None = None
    margin: Share | None = None
    inside_zero_init_bytes: Size | None = None
    out_of_memory: OutOfMemory | None = None
    host_bytes: Size | None = None
    host_bytes_per_node: Size | None = None
    step_time_s: Amount | None = None
    step_time_iqr_s: Amount | None = None
    tokens_per_s: Amount | None = None
    step_time_floor_s: Amount | None = None
    step_time_error_s: Amount | None = None
    host_overhead_s: Amount | None = None
    mfu: Amount | None = None
    hfu: Amount | None = None
    work: StepWork | None = None
    exchanges: tuple[Transfer, ...] = ()
    loss: float | None = None
    allocator_retries: Size | None = None
    gpu_utilisation: Amount | None = None
    power_w: Amount | None = None
    steps: tuple[StepRecord, ...] = ()
    ranks: tuple[RankSummary, ...] = ()
    timeline: Timeline | None = None
    rounding: dict[str, Size] = field(default_factory=dict)
    at_least: tuple[str, ...] = ()
    quality: tuple[QualityStep, ...] = ()
    loss_summary: LossSummary | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _require_sizes(self.components)
        _require_sizes(self.peak_components)
        _require_sum("components", self.components, "allocated_bytes", self.allocated_bytes)
        _require_sum("peak_components", self.peak_components, "peak_allocated_bytes", self.peak_allocated_bytes)
        for component in {part.component for part in self.peak_layers}:
            of_layers, alive = sum(p.bytes for p in self.peak_layers if p.component is component), self.peak_components.get(component, 0)
            if of_layers > alive:
                raise ValueError(f"peak_layers: {of_layers} bytes of {component}, of which there are {alive}")


def _require_sizes(parts: Mapping[Component, int]) -> None:
    for component, size in parts.items():
        require_size(component, size)


def _require_sum(name: str, parts: Mapping[Component, int], total_name: str, total: int | None) -> None:
    if parts and total is not None and sum(parts.values()) != total:
        raise ValueError(f"{name} add up to {sum(parts.values())}, {total_name} is {total}")


def merge_phases(before: Mapping[Phase, PhaseMemory], now: Mapping[Phase, PhaseMemory]) -> dict[Phase, PhaseMemory]:
    """The phases of both: of each the highest peak, and the end of `now` where it has one."""
    merged = dict(before)
    for phase, memory in now.items():
        known = before.get(phase, PhaseMemory())
        merged[phase] = PhaseMemory(max(known.peak_bytes or 0, memory.peak_bytes or 0), memory.end_bytes)
    return merged


def peak_phase(phases: Mapping[Phase, PhaseMemory]) -> Phase | None:
    """The phase of a step, or the evaluation, with the highest peak; `None` when no peak is
    known."""
    known = [phase for phase in (*TRAINING, Phase.EVAL) if phase in phases and phases[phase].peak_bytes is not None]
    return max(known, key=lambda phase: phases[phase].peak_bytes or 0) if known else None


def with_other(items: Sequence[Item], allocated_bytes: int) -> tuple[tuple[Item, ...], str | None]:
    """The items, and what they leave unexplained of the allocated bytes as one more.

    Items of more bytes than are allocated explain nothing: all is `other` then, and the second
    value says so for the record's notes.
    """
    named = sum(item.bytes for item in items)
    if named > allocated_bytes:
        whole = Item(Component.OTHER, "not told apart", allocated_bytes, "more is held by the engine than is allocated")
        return (whole,), f"components are not known: the engine holds {named:,} B of tensors, {allocated_bytes:,} B are allocated"
    other = allocated_bytes - named
    rest = [Item(Component.OTHER, "not held by the engine", other, "allocated less everything attributed")] if other else []
    return (*items, *rest), None


def by_component(items: Sequence[Item]) -> dict[Component, int]:
    """Bytes of every component, 0 where it has no item."""
    return {component: sum(item.bytes for item in items if item.component is component) for component in Component}
