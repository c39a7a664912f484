"""The vocabulary of `bf16prof plan`: plans, what one change of them is worth, and what follows for
a number of GPUs.

`planning` makes these, the reports show them. Bytes are of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bf16prof.records import Case, Item
from bf16prof.verdict import room_bytes
from bf16prof.vocabulary import Bytes, Component, Phase, Size, Verdict

EQUAL = 0.13
"""Bounds of throughput this close are told apart by no bound: one model on one cluster, trained in
three layouts, came between 38 and 43 % of the peak (The Llama 3 Herd of Models, arXiv 2407.21783,
table 4), and 43 / 38 = 1.13."""


@dataclass(frozen=True)
class Room:
    """What a job may allocate on its GPU.

    * `beside`: what the process holds outside the allocator (CUDA context, NCCL's buffers;
      assumptions).
    * `margin`: the share of the rest that is kept free: what a replay of the allocator does not
      know.
    * `expandable`: whether the allocator has expandable segments, of which it gives back every free
      page.
    """

    gpu: str
    memory_bytes: Size
    beside: tuple[Item, ...]
    margin: float
    expandable: bool = False

    @property
    def allocator_bytes(self) -> int:
        """What the caching allocator may reserve."""
        return max(0, self.memory_bytes - sum(item.bytes for item in self.beside))

    @property
    def bytes(self) -> int:
        """What the allocator may reserve for a plan."""
        return room_bytes(self.allocator_bytes, self.margin)


@dataclass(frozen=True)
class Plan:
    """One way to train, judged.

    * `micro_batch_size` in sequences, per rank; `train_batch_size` of the whole job and step.
    * `largest_micro_batch_size`: the largest of those that were tried that fits, all else equal;
      all smaller ones do.
    * `zero_init`: the model is built inside `deepspeed.zero.Init` (ZeRO-3); where nobody asked for
      it, because it does not fit as a whole.
    * `learning`: the class of the recipe (`Recipe.learning`).
    * `peak_bytes`: the predicted whole-run peak, reached in `peak_phase`. `reserved_bytes`: what
      the allocator reserves for it; `None` where the verdict does not turn on it.
    * `verdict`: as of every record (`verdict.judge`): of the estimate, or of the dry run where
      `is_tried`.
    * `free_bytes`: what is left of the room beside what is reserved (allocated, where that is not
      known); negative: what lacks.
    * `inside_zero_init_bytes`: where only init does not fit, the peak of the same job built inside
      `zero.Init`.
    * `host_bytes`: in host memory, per rank; `host_bytes_per_node`: of all ranks of a node.
    * `step_time_floor_s`, `tokens_per_s_at_most`: no step on that GPU is faster, so no such job
      trains more tokens in a second. Bounds, not predictions. With offloading the CPU's share of
      the time is not in them. `None` for a GPU whose speed is not known.
    * `step_time_s`, `tokens_per_s`: calibrated on a measured run; `None` without one, or where it
      does not tell.
    * `chosen`: the flags of what a search of the dimensions chose besides: how ranks share a batch,
      what keeps activations small.
    """

    case: Case
    sequence_length: Size
    micro_batch_size: Size
    largest_micro_batch_size: Size
    gradient_accumulation_steps: Size
    train_batch_size: Size
    activation_checkpointing: bool
    zero_init: bool
    learning: str
    peak_bytes: Size
    peak_phase: Phase
    free_bytes: Bytes
    host_bytes: Size
    host_bytes_per_node: Size
    step_time_floor_s: float | None
    tokens_per_s_at_most: float | None
    step_time_s: float | None = None
    tokens_per_s: float | None = None
    verdict: Verdict | None = None
    reserved_bytes: Size | None = None
    inside_zero_init_bytes: Size | None = None
    is_tried: bool = False
    chosen: tuple[str, ...] = ()

    @property
    def throughput(self) -> float:
        """Tokens per second by which it is ranked: calibrated, else at most; 1 for all where the
        GPU's speed is not known."""
        known = (rate for rate in (self.tokens_per_s, self.tokens_per_s_at_most) if rate is not None)
        return next(known, 1.0)

    @property
    def fits(self) -> bool:
        """Whether it fits, as it was judged."""
        return self.verdict is Verdict.FITS


@dataclass(frozen=True)
class Change:
    """What is changed in a plan, the flags that say it, and the plan it gives; `saved_bytes` of the
    peak; `things`: how many change."""

    what: str
    flag: str
    plan: Plan
    saved_bytes: Bytes
    things: int = 1


@dataclass(frozen=True)
class Difference:
    """Bytes of one kind of tensor at the training peaks of two plans."""

    component: Component
    name: str
    before_bytes: Bytes
    after_bytes: Bytes

    @property
    def more_bytes(self) -> int:
        """What the second holds more of it; negative: less."""
        return self.after_bytes - self.before_bytes


@dataclass(frozen=True)
class StageComparison:
    """ZeRO-2 and ZeRO-3, all else equal: what differs at their training peaks, what ZeRO-3 adds
    first.

    * `more_bytes`: how much higher the training peak of ZeRO-3 is; negative: lower.
    * `second_copy_bytes`: of the parameters that are fp32 themselves (fp32, autocast), the second
      fp32 copy that ZeRO keeps as masters.
    * `changes`: where it is higher, DeepSpeed's keys (and recipes) that lower the whole-run peak of
      ZeRO-3.
    """

    zero2: Plan
    zero3: Plan
    more_bytes: Bytes
    differences: tuple[Difference, ...]
    second_copy_bytes: Size = 0
    changes: tuple[Change, ...] = ()


@dataclass(frozen=True)
class Limits:
    """How far things go.

    * `fewest`: for each kind of offloading that was asked for, a plan on the fewest GPUs on which
      one fits (whole nodes, where one is not enough); more offloading only where it needs fewer.
      Empty if none fits on as many as were tried.
    * `same_gpus`: the fewest GPUs, counted likewise, on which the first choice fits as it is.
    * `micro_batch_size`, `sequence_length`: the largest that fit for the first choice, all else as
      it is. `longest`: the sequence is as long as the model allows. `are_known`: whether other
      numbers of GPUs were looked at.
    """

    fewest: tuple[Plan, ...]
    same_gpus: int | None = None
    micro_batch_size: int | None = None
    sequence_length: int | None = None
    longest: bool = False
    are_known: bool = True


@dataclass(frozen=True)
class Outlook:
    """What can be done on a number of GPUs.

    * `plans`: of each combination of stage, recipe, offloading and checkpointing that fits the best
      micro-batch, the first choice first. `complete`: these are all; otherwise the search ended
      with as many as were wanted.
    * `combinations`: how many DeepSpeed runs and are judged. `left_out`: why some that it runs are
      not, `unjudged` how many.
    * `tried`: the first choices that were dry-run and failed, each with the verdict on it.
    * `nearest`: where none fits, the one that lacks least, and `changes` what each change of it is
      worth, those that fit first: single ones, then the smallest sets that work together.
    * `beyond`: how people train such a model where nothing here fits, as far as this tool cannot
      express it.
    """

    world_size: int
    room: Room
    plans: tuple[Plan, ...]
    complete: bool
    combinations: int
    left_out: tuple[str, ...]
    limits: Limits
    nearest: Plan | None = None
    changes: tuple[Change, ...] = ()
    stages: StageComparison | None = None
    tried: tuple[Plan, ...] = ()
    beyond: tuple[str, ...] = ()
    unjudged: int = 0

    def up_to(self, most: int | None) -> Outlook:
        """The same with the `most` first plans (all if not given)."""
        plans = self.plans[:most]
        return replace(self, plans=plans, complete=self.complete and len(plans) == len(self.plans))
