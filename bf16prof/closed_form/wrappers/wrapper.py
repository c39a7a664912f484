"""What every optimizer wrapper of DeepSpeed is asked for: one class for each, in a file of its own
beside this one.

| question | answered by |
|---|---|
| What is allocated between two steps? | `states` |
| What does DeepSpeed allocate while it is built? | `initial` |
| Where do gradients go in forward and backward? | `strategy_settings` |
| What does the optimizer's step allocate for a while? | `step` |
| What does a rank send, and move over its host link? | `transfers`, `host_link` |
| What does the optimizer read and write? | `optimizer_traffic` |
| What of it is not modelled? | `gap`, `work_gap` |

Sizes are bytes and numbers of elements on one rank. References are to DeepSpeed 0.19.8 (`runtime/`
unless said otherwise).
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES, Engine
from bf16prof.closed_form.optimizer import layout_of
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.transfers import HostLink, Ranks
from bf16prof.engine import labels
from bf16prof.engine.config import dtype_bytes, offloads_optimizer
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Label

if TYPE_CHECKING:
    from bf16prof.cases import Job
    from bf16prof.closed_form.requests import BucketsOfPartition
    from bf16prof.closed_form.strategy import Strategy, StrategySettings
    from bf16prof.closed_form.walks import Walked


class OptimizerWrapper(ABC):
    """The wrapper that an engine has around its basic optimizer."""

    keeps_a_copy: ClassVar[bool] = True
    """Whether the model computes with other tensors than the optimizer updates."""
    hides_communication: ClassVar[bool] = False
    """Whether `overlap_comm` lets communication run beside backward."""
    streams: ClassVar[Mapping[Label, int]] = {}
    """What is allocated on a stream of DeepSpeed's own in forward and backward, where communication
    overlaps. The allocator does not give blocks of one stream to another."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.config, self.facts, self.zero = engine, engine.config, engine.facts, engine.zero

    @property
    def parameter_bytes(self) -> int:
        """Bytes of an element of the parameters that the model computes with."""
        return dtype_bytes(self.facts.parameter_dtype)

    @property
    def gradient_bytes(self) -> int:
        """Bytes of an element of the gradients that are kept."""
        return dtype_bytes(self.facts.gradient_dtype)

    @property
    def master_bytes(self) -> int:
        """Bytes of an element of what the optimizer updates."""
        return dtype_bytes(self.facts.master_dtype)

    @property
    def communication_bytes(self) -> int:
        """Bytes of an element of a gradient while it is reduced."""
        return dtype_bytes(self.facts.communication_dtype)

    @functools.cached_property
    def offloads(self) -> bool:
        """Whether the optimizer works in host memory."""
        return offloads_optimizer(self.config)

    @property
    @abstractmethod
    def partition_numel(self) -> int:
        """Elements that the optimizer of one rank updates, padding included."""

    @functools.cached_property
    def model_states(self) -> Sequence[Storages]:
        """Everything that DeepSpeed holds between steps, from the second step on: the optimizer
        makes its states in the first.

        No wrapper keeps master gradients on the device: they are built inside the step and dropped.
        """
        return (*self.states(), *self.frozen_parameters())

    @abstractmethod
    def states(self) -> list[Storages]:
        """What it holds of the parameters that are trained."""

    def frozen_parameters(self) -> list[Storages]:
        """Parameters that are not trained: no optimizer knows them, and they stay whole where the
        model has them."""
        return whole_frozen_parameters(self.engine)

    def take_the_model(self, meter: Meter) -> None:
        """Init begins with a model that was built whole."""
        meter.take(labels.THE_MODEL, *(self.parameter_bytes * n for n in self.engine.all_numels))

    @abstractmethod
    def initial(self, meter: Meter) -> None:
        """What it allocates and frees while it is built, from the model on."""

    @abstractmethod
    def strategy_settings(self, job: Job) -> StrategySettings:
        """How gradients are kept and reduced, and at stage 3 parameters gathered."""

    def autocast_communication(self) -> bool:
        """Whether gradients of parameters that autocast casts are reduced in autocast's dtype,
        those of others in their own."""
        return False

    def with_partition(self, done: Walked) -> Meter:
        """The levels and peaks of a walk through forward and backward, with what depends on the
        number of ranks filled in."""
        return done.meter

    def buckets(self, done: Walked) -> BucketsOfPartition | None:
        """What the same adds to the requests of a replay; `None` where nothing depends on the
        number of ranks."""
        return None

    @property
    def waiting_norms(self) -> int:
        """How many norms of gradients that have gone to the host wait at the end of backward for
        the step, which adds them up."""
        return 0

    @abstractmethod
    def step(self, meter: Meter, gradients: Strategy) -> None:
        """What the optimizer's step allocates and frees, from the end of backward to the next
        forward pass."""

    def flattened(self, meter: Meter, numel: int, *, is_copied: bool) -> int:
        """In the step gradients become one flat tensor, unless they are one already, in the
        master's dtype: the bytes that this leaves for the optimizer."""
        flat = self.gradient_bytes * numel if is_copied else 0
        meter.take(labels.STEP_GRADIENTS, flat)
        if self.master_bytes == self.gradient_bytes:
            return flat
        meter.take(labels.STEP_GRADIENTS, self.master_bytes * numel)
        meter.give(labels.STEP_GRADIENTS, flat)
        return self.master_bytes * numel

    def transfers(self, done: Walked, ranks: Ranks) -> tuple[Transfer, ...]:
        """All collectives of one optimizer step of one rank; none on a single rank."""
        return () if ranks.count == 1 else tuple(each for each in self.collectives(done, ranks) if each.size_bytes)

    @abstractmethod
    def collectives(self, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
        """The same on several ranks, perhaps of no bytes."""

    def optimizer_traffic(self) -> tuple[int, int]:
        """Bytes read and bytes written by the optimizer of one rank in one step, each tensor once,
        in its own dtype.

        Per element: the gradient, the master parameter and the optimizer's states (Adam has two
        moments: Kingma and Ba 2015, algorithm 1) are read; all but the gradient, and the parameter
        that the model computes with where it is another tensor, are written. It is a lower bound:
        wrappers also read gradients for their norm, clip them and copy them, and every such pass
        costs more.
        """
        numel = self.partition_numel
        states = sum(sum(state.sizes(self.facts.master_dtype, [(numel,)])) for state in layout_of(self.engine).states)
        copy = self.parameter_bytes if self.keeps_a_copy else 0
        return numel * (self.gradient_bytes + self.master_bytes) + states, numel * (self.master_bytes + copy) + states

    def host_link(self, done: Walked) -> HostLink:
        """What offloading moves: gradients down with every micro-step in which they are reduced,
        updated parameters up after the step."""
        numel = self.partition_numel if self.offloads else 0
        reductions = sum(times for times, launched in done.launched if launched.reduced)
        return HostLink(down=numel * reductions * self.gradient_bytes, after=self.parameter_bytes * numel)

    def gap(self) -> str | None:
        """A way to keep or to reduce gradients whose peaks are not known; `None` if they are."""
        return None

    def work_gap(self) -> str | None:
        """The same of what a step has to do."""
        return None


def whole_frozen_parameters(engine: Engine) -> list[Storages]:
    """Parameters that are not trained, whole: they stay where the model has them."""
    sizes = [dtype_bytes(engine.facts.parameter_dtype) * n for n in engine.frozen]
    return [allocation(labels.PARAMETERS, sizes, "the model's own tensors, which are not trained")] if sizes else []


def global_norm(*, size: int = FP32_BYTES, on_host: bool = False) -> Storages:
    """The norm of all gradients, which the engine keeps until the next step."""
    return allocation(labels.GLOBAL_NORM, size, "engine.py _take_model_step", on_host=on_host)
