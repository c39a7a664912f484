"""Init: from the model on the device to what is allocated before the first step. What DeepSpeed
adds, its wrapper says (`wrappers/`).

A script that knows nothing of ZeRO-3 builds the whole model first; inside `deepspeed.zero.Init`
each module is cut as soon as it exists.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import other_names
from bf16prof.closed_form.engine import FP32_BYTES, REMEMBERED, Engine, block_bytes
from bf16prof.closed_form.layout import cut_order, partition_numels
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.wrappers import wrapper_of
from bf16prof.engine import labels
from bf16prof.engine.config import BasicOptimizer, offloads_parameters
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.vocabulary import Component, Label, Phase

SMALL: Label = (Component.WORKSPACE, "small tensors of the optimizer")


def initial(engine: Engine, meter: Meter, *, zero_init: bool = False, by_transformers: bool = False) -> None:
    """The init phase, from nothing; `zero_init`: the model is built inside `deepspeed.zero.Init`,
    perhaps by transformers."""
    meter.begin(Phase.INIT)
    wrapper = wrapper_of(engine)
    if zero_init:
        _cut_while_built(engine, meter, wrapper.parameter_bytes, by_transformers=by_transformers)
    else:
        wrapper.take_the_model(meter)
    if engine.facts.optimizer is BasicOptimizer.FUSED_ADAM:
        meter.take(SMALL, FP32_BYTES)
    wrapper.initial(meter)
    meter.ends[Phase.INIT] = meter.level


def after_init(job: Job, engine: Engine, *, zero_init: bool) -> Meter:
    """Levels and peaks of a job's init phase, built inside `deepspeed.zero.Init` or not; not to be
    changed."""
    return _after_init(engine, block_bytes(job), zero_init, isinstance(job.profile.model, HuggingFaceSettings) and zero_init)


@functools.lru_cache(maxsize=REMEMBERED)
def _after_init(engine: Engine, block: int, zero_init: bool, by_transformers: bool) -> Meter:
    meter = Meter(block)
    initial(engine, meter, zero_init=zero_init, by_transformers=by_transformers)
    return meter


def _cut_while_built(engine: Engine, meter: Meter, size: int, *, by_transformers: bool) -> None:
    """zero/partition_parameters.py `Init`: a tensor is made in fp32 and cast
    (`zero_wrapper_for_fp_tensor_constructor`); when the `__init__` of its module returns, and so
    those of modules inside it have, the module's parameters are cut (`_post_init_method`).

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
    """transformers 5, integrations/deepspeed.py `initialize_weights_zero3`: the parameters of a
    module and of those right inside it are gathered, each into a tensor of its own (`_all_gather`),
    from a copy where partitions are in host memory: `copied` bytes an element.

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
