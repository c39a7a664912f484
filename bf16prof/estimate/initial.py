"""Init: from the model on the device to what is allocated before the first step, wrapper by wrapper.

A script that knows nothing of ZeRO-3 builds the whole model first; inside `deepspeed.zero.Init` each module is cut as soon as it exists.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from bf16prof.engine.config import BasicOptimizer, Wrapper, dtype_bytes, offloads_optimizer
from bf16prof.estimate.gathers import GATHERED
from bf16prof.estimate.layout import cut_order, kept_groups, partition_numels
from bf16prof.estimate.passes import Meter
from bf16prof.estimate.steady import FP32_BYTES, Engine, reduce_bucket_sizes
from bf16prof.estimate.step import update
from bf16prof.records import Component, Label, Phase

C = Component
MODEL: Label = (C.PARAMETERS, "the whole model")
FLAT: Label = (C.PARAMETERS, "flat parameters")
PARTITIONED: Label = (C.PARAMETERS, "partitioned parameters")
MASTER: Label = (C.MASTER_PARAMETERS, "master parameters")
FIRST: Label = (C.MASTER_GRADIENTS, "gradients for the first optimizer call")
KEPT: Label = (C.MASTER_GRADIENTS, "master gradients")
GRADIENTS: Label = (C.GRADIENTS, "gradient partition")
BUCKET: Label = (C.BUFFERS, "reduce bucket")
OFFLOADING: Label = (C.BUFFERS, "gradient buffer for offloading")
MOMENTS: tuple[Label, Label] = ((C.MOMENTUM, "optimizer state exp_avg"), (C.VARIANCE, "optimizer state exp_avg_sq"))
SMALL: Label = (C.WORKSPACE, "small tensors of the optimizer")


def initial(engine: Engine, meter: Meter, *, zero_init: bool = False) -> None:
    """The init phase, from nothing; `zero_init`: the model is built inside `deepspeed.zero.Init`."""
    meter.begin(Phase.INIT)
    size = dtype_bytes(engine.facts.parameter_dtype)
    if zero_init:
        _cut_while_built(engine, meter, size)
    else:
        meter.take(MODEL, *(size * n for n in engine.numels))
        if engine.facts.wrapper is Wrapper.ZERO3:
            _cut(engine, meter, size)
    if engine.facts.optimizer is BasicOptimizer.FUSED_ADAM:
        meter.take(SMALL, FP32_BYTES)
    _WRAPPERS[engine.facts.wrapper](engine, meter, size)
    meter.ends[Phase.INIT] = meter.level


def _plain(engine: Engine, meter: Meter, size: int) -> None:
    """The model, and nothing else before the first step."""


def _fused(engine: Engine, meter: Meter, size: int) -> None:
    """fp16/fused_optimizer.py: flat parameters, the master copy, and a first call of the optimizer on zero gradients."""
    total = sum(engine.numels)
    meter.take(FLAT, size * total)
    meter.give(MODEL, *(size * n for n in engine.numels))
    meter.take(MODEL, size * total)  # a clone
    meter.take(MASTER, FP32_BYTES * total)
    meter.give(MODEL, size * total)
    meter.take(FIRST, FP32_BYTES * total)
    for label in MOMENTS:
        meter.take(label, FP32_BYTES * total)
    meter.give(FIRST, FP32_BYTES * total)


def _unfused(engine: Engine, meter: Meter, size: int) -> None:
    """fp16/unfused_optimizer.py: a master copy of each parameter, and a first call of the optimizer on zero gradients of both."""
    sizes = [FP32_BYTES * n for n in engine.numels]
    first = [*(size * n for n in engine.numels), *sizes]
    meter.take(MASTER, *sizes)
    meter.take(FIRST, *first)
    for label in MOMENTS:
        meter.take(label, *sizes)
    update(engine, meter, sizes)
    meter.give(FIRST, *first)


def _bf16(engine: Engine, meter: Meter, size: int) -> None:
    """bf16_optimizer.py: the model is flattened, its partition cast from a clone, and gradients are made for all of it."""
    total = engine.flat_numel
    own = total // engine.world_size
    meter.take(FLAT, size * total)
    meter.give(MODEL, *(size * n for n in engine.numels))
    meter.take(FLAT, size * own)
    meter.take(MASTER, FP32_BYTES * own)
    meter.give(FLAT, size * own)
    meter.take(GRADIENTS, dtype_bytes(engine.facts.gradient_dtype) * total)


def _zero12(engine: Engine, meter: Meter, size: int) -> None:
    """zero/stage_1_and_2.py: the model is flattened on the device; the master partition is cast from a clone."""
    total = engine.flat_numel
    own = total // engine.world_size
    master = dtype_bytes(engine.facts.master_dtype)
    meter.take(FLAT, size * total)
    meter.give(MODEL, *(size * n for n in engine.numels))
    if offloads_optimizer(engine.config):
        meter.touch(FLAT, size * own)
        meter.take(OFFLOADING, size * max(engine.numels))
        return
    if master == size:
        meter.take(MASTER, master * own)
    else:
        meter.take(FLAT, size * own)
        meter.take(MASTER, master * own)
        meter.give(FLAT, size * own)
    meter.touch(FIRST, master * own)


def _cut(engine: Engine, meter: Meter, size: int) -> None:
    """zero/partition_parameters.py `_convert_to_zero_parameters`: the parameters of a whole model are cut one by one."""
    part = size if engine.zero.offload_param.device == "none" else 0
    meter.exchange(MODEL, PARTITIONED, ((size * numel, part * own) for numel, own in zip(engine.numels, engine.own, strict=True)))


def _cut_while_built(engine: Engine, meter: Meter, size: int) -> None:
    """zero/partition_parameters.py `Init`: a tensor is made in fp32 and cast (`zero_wrapper_for_fp_tensor_constructor`); when the
    `__init__` of its module returns, and so those of modules inside it have, the module's parameters are cut (`_post_init_method`).

    A tied head has a weight of its own until the embedding's takes its place.
    """
    part = size if engine.zero.offload_param.device == "none" else 0
    heads = [dataclasses.replace(spec, name="head.weight") for spec in engine.parameters if spec.tied]
    specs = [*engine.parameters, *heads]
    made = iter(specs)
    for index in cut_order([spec.name.rpartition(".")[0] for spec in specs]):
        if index is None:
            numel = next(made).numel
            meter.take(MODEL, FP32_BYTES * numel)
            if size != FP32_BYTES:
                meter.take(MODEL, size * numel)
                meter.give(MODEL, FP32_BYTES * numel)
        else:
            numel = specs[index].numel
            meter.take(PARTITIONED, *(part * own for own in partition_numels([numel], engine.world_size)))
            meter.give(MODEL, size * numel)
    meter.give(PARTITIONED, *(part * s for s in partition_numels([spec.numel for spec in heads], engine.world_size)))


def _zero3(engine: Engine, meter: Meter, size: int) -> None:
    """zero/stage3.py: the partitions are put together, and copied by sub-group."""
    facts, zero, own = engine.facts, engine.zero, engine.own
    if zero.offload_param.device == "none":
        meter.give(PARTITIONED, *(size * part for part in own))
        meter.take(FLAT, size * sum(own))
    groups, master = engine.groups, dtype_bytes(facts.master_dtype)
    if offloads_optimizer(engine.config):
        kept = [master * n for n in kept_groups(groups, zero.offload_optimizer.ratio)]
        _zero3_masters(engine, meter, kept)
        meter.take(KEPT, *kept)
    else:
        _zero3_masters(engine, meter, [master * n for n in groups])
        meter.touch(FIRST, master * max(groups))
    if zero.contiguous_gradients:
        meter.take(BUCKET, *reduce_bucket_sizes(engine))
    if not offloads_optimizer(engine.config):
        meter.take(GRADIENTS, dtype_bytes(facts.gradient_dtype) * sum(own))
    _zero3_hooks(engine, meter, size)


def _zero3_masters(engine: Engine, meter: Meter, groups: list[int]) -> None:
    """`_create_fp32_partitions`: a sub-group is converted, unless its dtype is the master's, and cloned; a conversion stays for a while."""
    converts = engine.facts.master_dtype != engine.facts.parameter_dtype or engine.zero.offload_param.device != "none"
    last = 0
    for group in groups:
        if converts:
            meter.take(MASTER, group)
            meter.give(MASTER, last)
            last = group
        meter.take(MASTER, group)
    meter.give(MASTER, last)


def _zero3_hooks(engine: Engine, meter: Meter, size: int) -> None:
    """`create_reduce_and_remove_grad_hooks` gathers every parameter for a moment, from a copy of what is on the host."""
    world, on_host = engine.world_size, engine.zero.offload_param.device != "none"
    own = size * max(engine.own)
    meter.touch(GATHERED, own * world, own if on_host else 0)


_WRAPPERS: Mapping[Wrapper, Callable[[Engine, Meter, int], None]] = {
    Wrapper.PLAIN: _plain,
    Wrapper.FUSED: _fused,
    Wrapper.UNFUSED: _unfused,
    Wrapper.BF16: _bf16,
    Wrapper.ZERO12: _zero12,
    Wrapper.ZERO3: _zero3,
}
