"""Init: from the model on the device to what is allocated before the first step, wrapper by wrapper.

A script that knows nothing of ZeRO-3 builds the whole model first; inside `deepspeed.zero.Init` each module is cut as soon as it exists.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import other_names
from bf16prof.closed_form.layout import cut_order, kept_groups, partition_numels
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.steady import FP32_BYTES, REMEMBERED, Engine, block_bytes, reduce_bucket_sizes
from bf16prof.closed_form.step import update
from bf16prof.engine import labels
from bf16prof.engine.config import BasicOptimizer, Wrapper, dtype_bytes, offloads_optimizer, offloads_parameters
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.records import Component, Device, Label, Phase

MOMENTS = labels.optimizer_state(Component.MOMENTUM, "exp_avg"), labels.optimizer_state(Component.VARIANCE, "exp_avg_sq")
SMALL: Label = (Component.WORKSPACE, "small tensors of the optimizer")


def initial(engine: Engine, meter: Meter, *, zero_init: bool = False, by_transformers: bool = False) -> None:
    """The init phase, from nothing; `zero_init`: the model is built inside `deepspeed.zero.Init`, perhaps by transformers."""
    meter.begin(Phase.INIT)
    size = dtype_bytes(engine.facts.parameter_dtype)
    if zero_init:
        _cut_while_built(engine, meter, size, by_transformers=by_transformers)
    else:
        meter.take(labels.THE_MODEL, *(size * n for n in engine.all_numels))
        if engine.facts.wrapper is Wrapper.ZERO3:
            _cut(engine, meter, size)
    if engine.facts.optimizer is BasicOptimizer.FUSED_ADAM:
        meter.take(SMALL, FP32_BYTES)
    _WRAPPERS[engine.facts.wrapper](engine, meter, size)
    meter.ends[Phase.INIT] = meter.level


def after_init(job: Job, engine: Engine, *, zero_init: bool) -> Meter:
    """Levels and peaks of a job's init phase, built inside `deepspeed.zero.Init` or not; not to be changed."""
    return _after_init(engine, block_bytes(job), zero_init, isinstance(job.profile.model, HuggingFaceSettings) and zero_init)


@functools.lru_cache(maxsize=REMEMBERED)
def _after_init(engine: Engine, block: int, zero_init: bool, by_transformers: bool) -> Meter:
    meter = Meter(block)
    initial(engine, meter, zero_init=zero_init, by_transformers=by_transformers)
    return meter


def _plain(engine: Engine, meter: Meter, size: int) -> None:
    """The model, and nothing else before the first step."""


def _fused(engine: Engine, meter: Meter, size: int) -> None:
    """fp16/fused_optimizer.py: flat parameters, the master copy, and a first call of the optimizer on zero gradients."""
    total = sum(engine.numels)
    meter.take(labels.FLAT_PARAMETERS, size * total)
    meter.give(labels.THE_MODEL, *(size * n for n in engine.numels))
    meter.take(labels.THE_MODEL, size * total)  # a clone
    meter.take(labels.MASTER_PARAMETERS, FP32_BYTES * total)
    meter.give(labels.THE_MODEL, size * total)
    meter.take(labels.FIRST_GRADIENTS, FP32_BYTES * total)
    for label in MOMENTS:
        meter.take(label, FP32_BYTES * total)
    meter.give(labels.FIRST_GRADIENTS, FP32_BYTES * total)


def _unfused(engine: Engine, meter: Meter, size: int) -> None:
    """fp16/unfused_optimizer.py: a master copy of each parameter, and a first call of the optimizer on zero gradients of both."""
    sizes = [FP32_BYTES * n for n in engine.numels]
    first = [*(size * n for n in engine.numels), *sizes]
    meter.take(labels.MASTER_PARAMETERS, *sizes)
    meter.take(labels.FIRST_GRADIENTS, *first)
    assert engine.facts.layout is not None, "only optimizers whose layout is known have a closed form (gap.py)"
    for state in engine.facts.layout.states:
        meter.take(labels.optimizer_state(state.component, state.key), *state.sizes("fp32", engine.shapes))
    update(engine, meter, sizes)
    meter.give(labels.FIRST_GRADIENTS, *first)


def _bf16(engine: Engine, meter: Meter, size: int) -> None:
    """bf16_optimizer.py: the model is flattened, its partition cast from a clone, and gradients are made for all of it."""
    total = engine.flat_numel
    own = total // engine.world_size
    meter.take(labels.FLAT_PARAMETERS, size * total)
    meter.give(labels.THE_MODEL, *(size * n for n in engine.numels))
    meter.take(labels.FLAT_PARAMETERS, size * own)
    meter.take(labels.MASTER_PARAMETERS, FP32_BYTES * own)
    meter.give(labels.FLAT_PARAMETERS, size * own)
    meter.take(labels.GRADIENT_PARTITION, dtype_bytes(engine.facts.gradient_dtype) * total)


def _zero12(engine: Engine, meter: Meter, size: int) -> None:
    """zero/stage_1_and_2.py: the model is flattened on the device; the master partition is cast from a clone."""
    total = engine.flat_numel
    own = total // engine.world_size
    master = dtype_bytes(engine.facts.master_dtype)
    meter.empty_cache()
    meter.take(labels.FLAT_PARAMETERS, size * total)
    meter.give(labels.THE_MODEL, *(size * n for n in engine.numels))
    if offloads_optimizer(engine.config):
        meter.touch(labels.FLAT_PARAMETERS, size * own)
        meter.take(labels.OFFLOADING_BUFFER, size * max(engine.numels))
        return
    if master == size:
        meter.take(labels.MASTER_PARAMETERS, master * own)
    else:
        meter.take(labels.FLAT_PARAMETERS, size * own)
        meter.take(labels.MASTER_PARAMETERS, master * own)
        meter.give(labels.FLAT_PARAMETERS, size * own)
    meter.touch(labels.FIRST_GRADIENTS, master * own)


def _cut(engine: Engine, meter: Meter, size: int) -> None:
    """zero/partition_parameters.py `_convert_to_zero_parameters`: the parameters of a whole model are cut one by one."""
    part = 0 if offloads_parameters(engine.config) else size
    pairs = zip(engine.all_numels, partition_numels(engine.all_numels, engine.world_size), strict=True)
    meter.exchange(labels.THE_MODEL, labels.PARTITIONED_PARAMETERS, ((size * numel, part * own) for numel, own in pairs))


def _cut_while_built(engine: Engine, meter: Meter, size: int, *, by_transformers: bool) -> None:
    """zero/partition_parameters.py `Init`: a tensor is made in fp32 and cast (`zero_wrapper_for_fp_tensor_constructor`); when the
    `__init__` of its module returns, and so those of modules inside it have, the module's parameters are cut (`_post_init_method`).

    A tied head has a weight of its own until the embedding's takes its place.
    """
    part = 0 if offloads_parameters(engine.config) else size
    heads = [dataclasses.replace(spec, name=name) for spec in engine.parameters for name in other_names(spec)]
    specs = [*engine.parameters, *heads]
    made = iter(specs)
    for index in cut_order([spec.name.rpartition(".")[0] for spec in specs]):
        if index is None:
            numel = next(made).numel
            meter.take(labels.THE_MODEL, FP32_BYTES * numel)
            if size != FP32_BYTES:
                meter.take(labels.THE_MODEL, size * numel)
                meter.give(labels.THE_MODEL, FP32_BYTES * numel)
        else:
            numel = specs[index].numel
            meter.take(labels.PARTITIONED_PARAMETERS, *(part * own for own in partition_numels([numel], engine.world_size)))
            meter.give(labels.THE_MODEL, size * numel)
    if by_transformers:
        _fill_gathered(specs, meter, engine.world_size, size, size - part)
    meter.give(labels.PARTITIONED_PARAMETERS, *(part * s for s in partition_numels([spec.numel for spec in heads], engine.world_size)))


def _fill_gathered(specs: Sequence[ParameterSpec], meter: Meter, world_size: int, size: int, copied: int) -> None:
    """transformers 5, integrations/deepspeed.py `initialize_weights_zero3`: the parameters of a module and of those right inside it are
    gathered, each into a tensor of its own (`_all_gather`), from a copy where partitions are in host memory: `copied` bytes an element.

    On one rank several are not gathered, but for that copy (`_no_gather_coalesced`).
    """
    gathered: dict[str, list[int]] = {}
    for spec in specs:
        module = spec.name.rpartition(".")[0]
        for owner in {module, module.rpartition(".")[0]}:
            gathered.setdefault(owner, []).extend(partition_numels([spec.numel], world_size))
    needs = (
        [*(size * own * world_size for own in group if world_size > 1 or len(group) == 1), *(copied * own for own in group)]
        for group in gathered.values()
    )
    meter.touch(labels.GATHERED_PARAMETERS, *max(needs, key=sum))


def _zero3(engine: Engine, meter: Meter, size: int) -> None:
    """zero/stage3.py: the partitions are put together, and copied by sub-group."""
    facts, zero, own = engine.facts, engine.zero, engine.own
    if not offloads_parameters(engine.config):
        meter.give(labels.PARTITIONED_PARAMETERS, *(size * part for part in own))
        meter.empty_cache()  # zero/utils.py `defragment`
        meter.take(labels.FLAT_PARAMETERS, size * sum(own))
    groups, master = engine.groups, dtype_bytes(facts.master_dtype)
    if offloads_optimizer(engine.config):
        kept = [master * n for n in kept_groups(groups, zero.offload_optimizer.ratio)]
        _zero3_masters(engine, meter, kept)
        meter.take(labels.MASTER_GRADIENTS, *kept)
    else:
        _zero3_masters(engine, meter, [master * n for n in groups])
        meter.touch(labels.FIRST_GRADIENTS, master * max(groups))
    if zero.contiguous_gradients:
        meter.take(labels.REDUCE_BUCKET, *reduce_bucket_sizes(engine))
    if not offloads_optimizer(engine.config):
        meter.take(labels.GRADIENT_PARTITION, dtype_bytes(facts.gradient_dtype) * sum(own))
    _zero3_hooks(engine, meter, size)


def _zero3_masters(engine: Engine, meter: Meter, groups: list[int]) -> None:
    """`_create_fp32_partitions`: a sub-group is converted, unless its dtype is the master's, and cloned; a conversion stays for a while."""
    converts = engine.facts.master_dtype != engine.facts.parameter_dtype or offloads_parameters(engine.config)
    last = 0
    for group in groups:
        if converts:
            meter.take(labels.MASTER_PARAMETERS, group)
            meter.give(labels.MASTER_PARAMETERS, last)
            last = group
        meter.take(labels.MASTER_PARAMETERS, group)
    meter.give(labels.MASTER_PARAMETERS, last)


def _zero3_hooks(engine: Engine, meter: Meter, size: int) -> None:
    """`create_reduce_and_remove_grad_hooks` gathers every parameter for a moment, from a copy of what is on the host."""
    world, on_host = engine.world_size, offloads_parameters(engine.config)
    own = size * max(engine.own)
    copied = own * world if engine.device is Device.CPU and world > 1 else own if on_host else 0  # gloo gathers into a flat tensor first
    meter.touch(labels.GATHERED_PARAMETERS, own * world, copied)


_WRAPPERS: Mapping[Wrapper, Callable[[Engine, Meter, int], None]] = {
    Wrapper.PLAIN: _plain,
    Wrapper.FUSED: _fused,
    Wrapper.UNFUSED: _unfused,
    Wrapper.BF16: _bf16,
    Wrapper.ZERO12: _zero12,
    Wrapper.ZERO3: _zero3,
}
