"""`DeepSpeedZeroOptimizer_Stage3` (zero/stage3.py): everything is partitioned, and parameters are
gathered where they are used."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.anatomy import Anatomy
from bf16prof.closed_form.engine import FP32_BYTES, FP64_BYTES
from bf16prof.closed_form.gather_settings import GatherSettings
from bf16prof.closed_form.gathers import padding_bytes
from bf16prof.closed_form.layout import kept_groups, partition_numels, persistent, persistent_places, sub_groups
from bf16prof.closed_form.optimizer import optimizer_states, update
from bf16prof.closed_form.passes import REMEMBERED, Meter
from bf16prof.closed_form.transfers import GATHER_STREAM, REDUCE_STREAM, HostLink, Ranks, gathered, reduced
from bf16prof.closed_form.wrappers.wrapper import OptimizerWrapper, global_norm
from bf16prof.engine import labels
from bf16prof.engine.config import dtype_bytes, offloads_parameters
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.optimizers import all_optimizers
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.rounding import ceil_div
from bf16prof.step_records import Transfer
from bf16prof.vocabulary import Collective, Device, Label, Phase

if TYPE_CHECKING:
    from bf16prof.cases import Job
    from bf16prof.closed_form.strategy import Strategy
    from bf16prof.closed_form.walks import Walked

SOURCE = "zero/stage3.py"
BUFFERS = f"{SOURCE} _setup_for_real_optimizer"

NEGLIGIBLE = 2**16
"""Bytes of padding that do not tell one number of ranks from another."""

SWITCHES = {
    "memory_efficient_linear": "memory_efficient_linear",
    "stage3_use_all_reduce_for_fetch_params": "use_all_reduce_for_fetch_params",
    "stage3_allgather_sequential": "allgather_sequential",
    "stage3_module_granularity_threshold": "module_granularity_threshold",
    "zero_hpz_partition_size": "zero_hpz_partition_size",
}
"""Keys that take stage 3 through code of its own, and their names here."""


class Zero3Optimizer(OptimizerWrapper):
    """Partitions are flat and belong to sub-groups, which the optimizer updates one after the
    other."""

    hides_communication: ClassVar[bool] = True
    streams: ClassVar[Mapping[Label, int]] = {
        labels.GATHERED_PARAMETERS: GATHER_STREAM,
        labels.ALL_GATHER_BUCKETS: GATHER_STREAM,
        labels.REDUCE_SCATTER_BUFFER: REDUCE_STREAM,
        labels.GRADIENT_NORM: REDUCE_STREAM,
    }
    """`__allgather_stream` and `reduce_and_partition_stream`."""

    @functools.cached_property
    def partitions(self) -> list[int]:
        """Elements of the partition of each parameter that is trained."""
        return partition_numels(self.engine.numels, self.engine.world_size)

    @functools.cached_property
    def sub_groups(self) -> list[int]:
        """Elements of the sub-groups."""
        return sub_groups(self.partitions, self.zero.sub_group_size)

    @property
    def partition_numel(self) -> int:
        """Elements of all partitions."""
        return sum(self.partitions)

    @functools.cached_property
    def offloads_parameters(self) -> bool:
        """Whether partitions of parameters are in host memory."""
        return offloads_parameters(self.config)

    @functools.cached_property
    def persistent_sizes(self) -> list[int]:
        """Bytes of the small parameters that stay gathered beside their partitions.

        On one rank a gathered parameter is its partition and costs nothing, unless that is in
        another memory.
        """
        is_elsewhere = self.offloads_parameters and self.engine.device is Device.GPU
        world = self.engine.world_size
        if world == 1 and not is_elsewhere:
            return []
        return [self.parameter_bytes * world * n for n in partition_numels(persistent(self.engine.all_numels, self.zero), world)]

    def states(self) -> list[Storages]:
        """Partitions of parameters, of gradients and of what the optimizer updates and keeps; a
        reduce bucket; what stays gathered."""
        partition = self.partition_numel
        flat = f"{SOURCE} _create_fp16_partitions_with_defragmentation"
        gradients = f"{BUFFERS}: grad_partitions_flat_buffer"
        return [
            allocation(labels.FLAT_PARAMETERS, self.parameter_bytes * partition, flat, on_host=self.offloads_parameters),
            *self._persistent_parameters(),
            allocation(labels.GRADIENT_PARTITION, self.gradient_bytes * partition, gradients, on_host=self.offloads),
            *self._reduce_buckets(),
            *self._optimized(),
            global_norm(size=FP32_BYTES if self.offloads else FP64_BYTES, on_host=self.offloads),
            allocation(labels.OVERFLOW_FLAG, 1, f"{SOURCE} __init__", on_host=self.offloads),
        ]

    def frozen_parameters(self) -> list[Storages]:
        """Parameters that are not trained are cut like all others (zero/partition_parameters.py),
        but are in no flat buffer."""
        if not self.engine.frozen:
            return []
        sizes = [self.parameter_bytes * n for n in partition_numels(self.engine.frozen, self.engine.world_size)]
        source = "zero/partition_parameters.py _partition_param"
        return [allocation(labels.PARTITIONED_PARAMETERS, sizes, source, on_host=self.offloads_parameters)]

    def _persistent_parameters(self) -> list[Storages]:
        if not self.persistent_sizes:
            return []
        return [allocation(labels.PERSISTENT_PARAMETERS, self.persistent_sizes, f"{SOURCE} _post_step: gathered again after every step")]

    def _reduce_buckets(self) -> list[Storages]:
        """Allocated at init, and kept."""
        if not self.zero.contiguous_gradients:
            return []
        return [allocation(labels.REDUCE_BUCKET, self._reduce_bucket_sizes(), f"{BUFFERS}: ipg_buckets")]

    def _reduce_bucket_sizes(self) -> list[int]:
        """Bytes of the reduce buckets, one for each communication dtype."""
        facts = self.facts
        dtypes = {facts.communication_dtype}
        if facts.autocast_dtype != "none":
            trained = [p for p in self.engine.parameters if p.trainable]
            dtypes = {facts.autocast_dtype if p.cast_by_autocast else facts.parameter_dtype for p in trained}
        return [dtype_bytes(d) * self.zero.reduce_bucket_size for d in sorted(dtypes)]

    def _optimized(self) -> list[Storages]:
        """Master parameters, moments and, when offloading, master gradients by sub-group; `ratio`
        keeps the first sub-groups on the device."""
        groups, ratio = self.sub_groups, self.zero.offload_optimizer.ratio
        kept = len(kept_groups(groups, ratio)) if self.offloads else len(groups)
        out = []
        for numels, on_host in ((groups[:kept], False), (groups[kept:], True)):
            if not numels:
                continue
            sizes = [self.master_bytes * n for n in numels]
            out.append(allocation(labels.MASTER_PARAMETERS, sizes, f"{SOURCE} _create_fp32_partitions", on_host=on_host))
            if self.offloads:
                source = f"{SOURCE} initialize_optimizer_states: kept when offloading"
                out.append(allocation(labels.MASTER_GRADIENTS, sizes, source, on_host=on_host))
            is_second = self.offloads and not on_host and self.engine.device is Device.GPU
            out += optimizer_states(self.engine, numels, on_host=on_host, layout=all_optimizers()["torch.optim"] if is_second else None)
        return [*out, *self._placeholder(kept)] if ratio < 1 and self.offloads else out

    def _placeholder(self, kept: int) -> list[Storages]:
        """What the torch.optim.AdamW of the sub-groups that stay was made with, while it has none
        to do.

        On CPU ranks every sub-group counts as offloaded: its device has the same name as the host
        (_optimizer_step).
        """
        if kept and self.engine.device is Device.GPU:
            return []
        return [allocation(labels.PLACEHOLDER, self.parameter_bytes, f"{SOURCE} __init__: backup_gpu_tensor")]

    def take_the_model(self, meter: Meter) -> None:
        """The parameters of a whole model are cut one by one (zero/partition_parameters.py
        `_convert_to_zero_parameters`)."""
        super().take_the_model(meter)
        part = 0 if self.offloads_parameters else self.parameter_bytes
        pairs = zip(self.engine.all_numels, partition_numels(self.engine.all_numels, self.engine.world_size), strict=True)
        sizes = ((self.parameter_bytes * numel, part * partition) for numel, partition in pairs)
        meter.exchange(labels.THE_MODEL, labels.PARTITIONED_PARAMETERS, sizes)

    def initial(self, meter: Meter) -> None:
        """The partitions are put together, and copied by sub-group."""
        size, master, groups = self.parameter_bytes, self.master_bytes, self.sub_groups
        if not self.offloads_parameters:
            meter.give(labels.PARTITIONED_PARAMETERS, *(size * part for part in self.partitions))
            meter.empty_cache()  # zero/utils.py `defragment`
            meter.take(labels.FLAT_PARAMETERS, size * self.partition_numel)
        if self.offloads:
            kept = [master * n for n in kept_groups(groups, self.zero.offload_optimizer.ratio)]
            self._copy_to_master(meter, kept)
            meter.take(labels.MASTER_GRADIENTS, *kept)
        else:
            self._copy_to_master(meter, [master * n for n in groups])
            meter.touch(labels.FIRST_GRADIENTS, master * max(groups))
        if self.zero.contiguous_gradients:
            meter.take(labels.REDUCE_BUCKET, *self._reduce_bucket_sizes())
        if not self.offloads:
            meter.take(labels.GRADIENT_PARTITION, self.gradient_bytes * self.partition_numel)
        self._make_hooks(meter)

    def _copy_to_master(self, meter: Meter, groups: Sequence[int]) -> None:
        """`_create_fp32_partitions`: a sub-group is converted, unless its dtype is the master's,
        and cloned; a conversion stays until the next."""
        converts = self.facts.master_dtype != self.facts.parameter_dtype or self.offloads_parameters
        last = 0
        for group in groups:
            if converts:
                meter.take(labels.MASTER_PARAMETERS, group)
                meter.give(labels.MASTER_PARAMETERS, last)
                last = group
            meter.take(labels.MASTER_PARAMETERS, group)
        meter.give(labels.MASTER_PARAMETERS, last)

    def _make_hooks(self, meter: Meter) -> None:
        """`create_reduce_and_remove_grad_hooks` gathers every parameter for a moment, from a copy
        of what is on the host."""
        world, partition = self.engine.world_size, self.parameter_bytes * max(self.partitions)
        copied = partition if self.offloads_parameters else 0
        if self.engine.device is Device.CPU and world > 1:
            copied = partition * world  # gloo gathers into a flat tensor first
        meter.touch(labels.GATHERED_PARAMETERS, partition * world, copied)

    def strategy_settings(self, job: Job) -> GatherSettings:
        """What the coordinator of gathers and the reduce buckets go by."""
        engine, zero = self.engine, self.zero
        return GatherSettings(
            world_size=_like(engine.anatomy, engine.world_size),
            prefetch_bucket=zero.prefetch_bucket_size,
            max_live=zero.max_live_parameters,
            max_reuse_distance=zero.max_reuse_distance,
            reduce_bucket=zero.reduce_bucket_size,
            contiguous=zero.contiguous_gradients,
            itemsize=self.parameter_bytes,
            gradient=self.gradient_bytes,
            persistent=frozenset(engine.anatomy.keys[place] for place in persistent_places(engine.all_numels, zero)),
            on_host=self.offloads_parameters,
            offloads=self.offloads,
            scatters=zero.reduce_scatter,
            copies=job.device is Device.CPU and engine.world_size > 1,
        )

    def autocast_communication(self) -> bool:
        """There is a bucket for each dtype."""
        return True

    @property
    def waiting_norms(self) -> int:
        """One of each gradient."""
        return len(self.partitions) if self.offloads else 0

    def step(self, meter: Meter, gradients: Strategy) -> None:
        """Overflow and norms, then sub-group by sub-group a flat copy of the gradients in the
        master's dtype. Gathered parameters have been let go of already."""
        partitions = self.partitions
        meter.give(labels.PERSISTENT_PARAMETERS, *self.persistent_sizes)
        if self.offloads:
            meter.touch(labels.GRADIENT_NORM, *[FP64_BYTES] * len(partitions))
            for group in kept_groups(self.sub_groups, self.zero.offload_optimizer.ratio):
                meter.touch(labels.OPTIMIZER_TEMPORARIES, self.master_bytes * group)  # of the second optimizer, a torch.optim.AdamW
        else:
            if self.facts.parameter_dtype == "fp16":
                meter.touch(labels.OVERFLOW_CHECK, sum(partitions))
            largest = max(partitions)
            meter.touch(labels.GRADIENT_NORM, FP64_BYTES * largest, *[FP64_BYTES] * partitions.index(largest))
            for group, count in zip(self.sub_groups, _counts(partitions, self.sub_groups), strict=True):
                copy = self.flattened(meter, group, is_copied=count > 1)
                update(self.engine, meter, [self.master_bytes * group])
                meter.give(labels.STEP_GRADIENTS, copy)
        self._gather_persistent(meter)

    def _gather_persistent(self, meter: Meter) -> None:
        """`_post_step`, from copies of what is on the host."""
        world = self.engine.world_size
        copies = [each // world for each in self.persistent_sizes] if self.offloads_parameters and world > 1 else []
        meter.take(labels.GATHERED_PARAMETERS, *copies)
        meter.take(labels.PERSISTENT_PARAMETERS, *self.persistent_sizes)
        meter.give(labels.GATHERED_PARAMETERS, *copies)

    def collectives(self, done: Walked, ranks: Ranks) -> Iterable[Transfer]:
        """Parameters are gathered and gradients scattered in every micro-step, both padded to whole
        pieces of a parameter per rank.

        Without `reduce_scatter`, gradients in the bucket's buffer are all-reduced instead; one that
        is too large for it is not in it.
        """
        zero = self.zero
        source = "zero/partitioned_param_coordinator.py fetch_sub_module"
        how = self.parameter_bytes if zero.use_all_reduce_for_fetch_params else 0, zero.allgather_sequential
        for (phase, kind), (calls, total) in gathered(done, ranks.count, *how).items():
            yield ranks.transfer(f"parameters in {phase}", kind, phase, calls, total, source)
        most = zero.reduce_bucket_size if zero.contiguous_gradients and not zero.reduce_scatter else 0
        source = f"{SOURCE} __reduce_and_partition_ipg_grads"
        for kind, (calls, total) in reduced(done, ranks.count, most).items():
            yield ranks.transfer("gradients", kind, Phase.BACKWARD, calls, total, source)
        sizes = self.persistent_sizes
        yield ranks.transfer("persistent parameters", Collective.ALL_GATHER, Phase.STEP, len(sizes), sum(sizes), f"{SOURCE} _post_step")

    def host_link(self, done: Walked) -> HostLink:
        """Offloaded parameters go up whenever they are gathered, and after the step those that stay
        gathered."""
        link = super().host_link(done)
        if not self.offloads_parameters:
            return link
        world = self.engine.world_size
        parts = {key: ceil_div(n, world) for key, n in done.numels.items()}
        up = sum(times * parts[key] for times, launched in done.launched for _, keys in launched.gathered for key in keys)
        after = sum(partition_numels(persistent(self.engine.all_numels, self.zero), world))
        return HostLink(link.down, self.parameter_bytes * up, self.parameter_bytes * after)

    def gap(self) -> str | None:
        """Some keys take it through other code."""
        return self._switched(SWITCHES)

    def work_gap(self) -> str | None:
        """Two of them change what is gathered."""
        return self._switched(("stage3_module_granularity_threshold", "zero_hpz_partition_size"))

    def _switched(self, keys: Iterable[str]) -> str | None:
        """One of these keys that is not as usual."""
        usual = ZeroSettings()
        changed = (key for key in keys if getattr(self.zero, SWITCHES[key]) != getattr(usual, SWITCHES[key]))
        return next((f"zero_optimization.{key} is not modelled" for key in changed), None)


def _counts(partitions: Sequence[int], groups: Sequence[int]) -> list[int]:
    """How many partitions are in each sub-group."""
    counts, index = [], 0
    for total in groups:
        first, reached = index, 0
        while reached < total:
            reached, index = reached + partitions[index], index + 1
        counts.append(index - first)
    return counts


@functools.lru_cache(maxsize=REMEMBERED)
def _like(anatomy: Anatomy, world_size: int) -> int:
    """A number of ranks for which ZeRO-3 gathers and reduces the same bytes, but for `NEGLIGIBLE`
    padding: 2 if possible.

    Parameters are gathered whole; what differs is the padding, and whether a single gradient can be
    reduced in place.
    """
    if world_size <= 2:
        return world_size
    numels = list(anatomy.numels.values())
    padding = sum(padding_bytes(n, world_size, dtype_bytes("fp32"), ALLOCATOR_BLOCK_BYTES) for n in numels)
    alike = all((n % world_size == 0) == (n % 2 == 0) for n in set(numels))
    return 2 if alike and padding <= NEGLIGIBLE else world_size
