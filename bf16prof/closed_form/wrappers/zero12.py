"""`DeepSpeedZeroOptimizer` (zero/stage_1_and_2.py): ZeRO stages 1 and 2. Gradients go through
buckets into the partition of a rank."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.anatomy import Anatomy
from bf16prof.closed_form.engine import FP64_BYTES
from bf16prof.closed_form.gradients import GradientReduction, Share, partitioned
from bf16prof.closed_form.layout import dealt_out, flat_spans, touched_numel
from bf16prof.closed_form.optimizer import optimizer_states, update
from bf16prof.closed_form.passes import REMEMBERED, Meter
from bf16prof.closed_form.requests import BucketsOfPartition
from bf16prof.closed_form.transfers import REDUCE_STREAM, Ranks, reduced
from bf16prof.closed_form.wrappers.flat import FlatOptimizer
from bf16prof.closed_form.wrappers.wrapper import global_norm
from bf16prof.engine import labels
from bf16prof.engine.config import overlaps_communication
from bf16prof.models.autograd.events import ParameterKey
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Label, Phase

if TYPE_CHECKING:
    from bf16prof.cases import Job
    from bf16prof.closed_form.strategy import Strategy
    from bf16prof.closed_form.walks import Walked

SOURCE = "zero/stage_1_and_2.py"


class Zero12Optimizer(FlatOptimizer):
    """Parameters are flat and whole; master copies and the optimizer's states are partitioned, at
    stage 2 gradients as well."""

    hides_communication: ClassVar[bool] = True
    updated_by: ClassVar[str] = f"{SOURCE} step"
    streams: ClassVar[Mapping[Label, int]] = {
        labels.GRADIENT_PARTITION: REDUCE_STREAM,
        labels.ALL_REDUCE_BUFFER: REDUCE_STREAM,
        labels.GRADIENT_NORM: REDUCE_STREAM,
    }
    """`reduction_stream`."""

    @property
    def stage(self) -> int:
        """1 or 2."""
        return int(self.config["zero_optimization"]["stage"])

    @functools.cached_property
    def share(self) -> Share:
        """The flat buffer, seen by the first rank."""
        ranks = self.engine.world_size if self.zero.round_robin_gradients else 1
        return Share(_spans(self.engine.anatomy, ranks, self.zero, self.parameter_bytes), self.partition_numel)

    def states(self) -> list[Storages]:
        """Flat parameters, and a partition of the master copy and of the optimizer's states,
        perhaps in host memory."""
        out = [
            allocation(labels.FLAT_PARAMETERS, self.parameter_bytes * self.flat_numel, f"{SOURCE} __init__: bit16_groups_flat"),
            allocation(
                labels.MASTER_PARAMETERS,
                self.master_bytes * self.partition_numel,
                f"{SOURCE} __init__: single_partition_of_fp32_groups",
                on_host=self.offloads,
            ),
            *optimizer_states(self.engine, [self.partition_numel], on_host=self.offloads),
        ]
        if self.offloads:
            out += self._offloaded()
        return [*out, global_norm(on_host=self.offloads)] if self.zero.compute_grad_norm else out

    def _offloaded(self) -> list[Storages]:
        """What is there beside the states when the optimizer works on the host."""
        size, largest, partition = self.parameter_bytes, max(self.engine.numels), self.partition_numel
        host = functools.partial(allocation, on_host=True)
        return [
            host(labels.MASTER_GRADIENTS, self.master_bytes * partition, f"{SOURCE} initialize_optimizer_states"),
            host(labels.OFFLOADED_PARAMETERS, size * partition, f"{SOURCE} param_buffer_of_bit16_for_cpu_offload_groups"),
            host(labels.OFFLOADING_HOST_BUFFER, size * largest, f"{SOURCE} temp_grad_buffer_for_cpu_offload"),
            allocation(labels.OFFLOADING_BUFFER, size * largest, f"{SOURCE} temp_grad_buffer_for_gpu_offload"),
            *self._accumulated(),
        ]

    def _accumulated(self) -> list[Storages]:
        """Stage 2 with an offloaded fp32 master keeps, once it has accumulated, gradients of all
        parameters that touch its partition."""
        if self.stage != 2 or self.config["gradient_accumulation_steps"] == 1 or self.facts.master_dtype != "fp32":
            return []
        spans = flat_spans(self.engine.numels, self.engine.world_size, self.zero, self.parameter_bytes)
        size = self.parameter_bytes * touched_numel(spans, self.partition_numel)
        source = f"{SOURCE} async_accumulate_grad_in_cpu_via_gpu: accumulated_grads_in_cpu"
        return [allocation(labels.ACCUMULATED_GRADIENTS, size, source, on_host=True)]

    def initial(self, meter: Meter) -> None:
        """The model is flattened on the device; the master partition is cast from a clone."""
        size, master, partition = self.parameter_bytes, self.master_bytes, self.partition_numel
        meter.empty_cache()
        self.flatten_the_model(meter)
        if self.offloads:
            meter.touch(labels.FLAT_PARAMETERS, size * partition)
            meter.take(labels.OFFLOADING_BUFFER, size * max(self.engine.numels))
            return
        clone = size * partition if master != size else 0
        meter.take(labels.FLAT_PARAMETERS, clone)
        meter.take(labels.MASTER_PARAMETERS, master * partition)
        meter.give(labels.FLAT_PARAMETERS, clone)
        meter.touch(labels.FIRST_GRADIENTS, master * partition)

    def strategy_settings(self, job: Job) -> GradientReduction:
        """Stage 1 reduces with the last micro-step, stage 2 in each."""
        overlap, is_second = overlaps_communication(self.config), self.stage == 2
        return GradientReduction(
            bucket_size=self.zero.reduce_bucket_size,
            buffers=1 + overlap,
            contiguous=self.zero.contiguous_gradients,
            itemsize=self.parameter_bytes,
            early=is_second or overlap,
            always=is_second,
            master=self.master_bytes if self.offloads else 0,
            scatters=self.zero.reduce_scatter,
        )

    def autocast_communication(self) -> bool:
        """There is a bucket for each dtype."""
        return True

    def with_partition(self, done: Walked) -> Meter:
        """What the partition takes, and which gradients are gone because they have been copied to
        it."""
        return partitioned(done.meter, done.numels, _settings(done), self.share)

    def buckets(self, done: Walked) -> BucketsOfPartition:
        """Requests for it, in their order."""
        return BucketsOfPartition(self.engine.anatomy.trained, _settings(done), self.share)

    @property
    def waiting_norms(self) -> int:
        """One of each gradient that has gone to the host."""
        return len(self.share.parts) if self.offloads else 0

    def step(self, meter: Meter, gradients: Strategy) -> None:
        """Gradients are in the partition by now."""
        self.step_of(self.share, meter)

    def step_of(self, share: Share, meter: Meter) -> None:
        """The step of a rank: the norm of every gradient in fp64, one flat copy of them, and
        another in the master's dtype."""
        parts = list(share.parts.values())
        if self.offloads:
            meter.touch(labels.GRADIENT_NORM, *[FP64_BYTES] * len(parts))
            _drop_partition(meter)
            return
        if self.zero.compute_grad_norm and parts:
            meter.touch(labels.GRADIENT_NORM, FP64_BYTES * max(parts))
        is_copied = len(parts) > 1 or sum(parts) < share.partition
        copy = self.flattened(meter, share.partition, is_copied=is_copied)
        _drop_partition(meter)
        update(self.engine, meter, [self.master_bytes * share.partition])
        meter.give(labels.STEP_GRADIENTS, copy)

    def collectives(self, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
        """Buckets of gradients, then the updated parameters."""
        to_owners = self.zero.reduce_scatter and not self.zero.use_multi_rank_bucket_allreduce
        kind = Collective.REDUCE if to_owners else Collective.ALL_REDUCE
        calls, total = reduced(done, 1, sys.maxsize)[Collective.ALL_REDUCE]
        if self.zero.reduce_scatter:
            calls += self._more_reductions(done, to_owners=to_owners)
        yield ranks.transfer("gradients", kind, Phase.BACKWARD, calls, total, f"{SOURCE} average_tensor")
        yield self.updated_parameters(ranks)

    def _more_reductions(self, done: Walked, *, to_owners: bool) -> int:
        """Collectives beyond one per bucket: one for each owner of a part of it, or, as a parameter
        that is too large for a bucket is alone in one, one for each piece of it."""
        share, size = self.share, self.zero.reduce_bucket_size
        if to_owners:
            return sum(times * (len({rank for key in keys for rank in share.ranks(key)}) - 1) for times, keys in done.reduced)
        return sum(times * (len(list(share.chunks(keys, size))) - 1) for times, keys in _too_large(done, size))

    def gap(self) -> str | None:
        """Some settings take gradients another way."""
        if self.facts.parameter_dtype != self.facts.gradient_dtype:
            return "gradients that stages 1 and 2 accumulate in another dtype than the parameters' are not modelled"
        if self.offloads and not self.zero.contiguous_gradients:
            return "zero_optimization.contiguous_gradients=false with an offloaded optimizer is not modelled at stages 1 and 2"
        if self.zero.reduce_scatter and not self.zero.use_multi_rank_bucket_allreduce and self.engine.world_size > 1:
            return (
                "zero_optimization.use_multi_rank_bucket_allreduce=false, which reduces the slices of one rank at a time, is not modelled"
            )
        return None


def _settings(done: Walked) -> GradientReduction:
    assert isinstance(done.plan.strategy_settings, GradientReduction), "as `strategy_settings` says"
    return done.plan.strategy_settings


def _drop_partition(meter: Meter) -> None:
    meter.give(labels.GRADIENT_PARTITION, meter.held.get(labels.GRADIENT_PARTITION, 0))


@functools.lru_cache(maxsize=REMEMBERED)
def _spans(anatomy: Anatomy, ranks: int, zero: ZeroSettings, itemsize: int) -> dict[ParameterKey, tuple[int, int]]:
    """Where every parameter is in the flat buffer, in its order there (`layout.flat_spans`)."""
    numels = anatomy.trained
    return dict(zip(dealt_out(list(numels), ranks), flat_spans(list(numels.values()), ranks, zero, itemsize), strict=True))


@functools.lru_cache(maxsize=REMEMBERED)
def _too_large(done: Walked, bucket_size: int) -> Sequence[tuple[int, Sequence[ParameterKey]]]:
    return [(times, keys) for times, keys in done.reduced if len(keys) == 1 and done.numels[keys[0]] > bucket_size]
