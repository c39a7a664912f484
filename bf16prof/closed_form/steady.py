"""What is allocated between two optimizer steps: every persistent tensor of every optimizer wrapper of DeepSpeed, and of
megatron-core's two, as they lay them out.

DeepSpeed has no persistent master gradients anywhere on the device: wrappers build them inside the step and drop them. References are to
DeepSpeed 0.19.8 (`runtime/` unless said otherwise).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.cases import Job
from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.anatomy import Anatomy, anatomy_of
from bf16prof.closed_form.layout import (
    buffer_spans,
    flat_numel,
    flat_spans,
    kept_groups,
    partition_numels,
    persistent,
    sub_groups,
    touched_numel,
)
from bf16prof.engine import labels
from bf16prof.engine.config import (
    EngineFacts,
    Wrapper,
    deepspeed_config,
    dtype_bytes,
    engine_facts,
    offloads_optimizer,
    offloads_parameters,
    zero_settings,
)
from bf16prof.engine.megatron.settings import megatron_facts, settings_of
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.optimizers import OptimizerLayout, all_optimizers
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.records import Component, Device

FP32_BYTES = 4
FP64_BYTES = 8


REMEMBERED = 256
"""So many engines, and what follows from each, are remembered."""

MEGATRON_BUFFERS = "megatron/core/distributed/param_and_grad_buffer.py _ParamAndGradBuffer"

_MICRO_BATCH = "train_micro_batch_size_per_gpu"
_ENGINES: dict[Hashable, Engine] = {}


@dataclass(frozen=True, eq=False)
class Engine:
    """A DeepSpeed configuration over the parameters of a model, ready to be laid out. An optimizer is given those that are trained.

    One object for all micro-batches and lengths, which change nothing of it, so that what follows from it can be remembered.
    """

    config: Mapping[str, Any]
    parameters: Sequence[ParameterSpec]
    world_size: int
    device: Device = Device.GPU
    given: Anatomy | None = None
    made: EngineFacts | None = None

    @classmethod
    def of(cls, job: Job) -> Engine:
        """The engine of a job whose model's parameters are known."""
        anatomy, on_megatron = anatomy_of(job), job.profile.is_for_megatron
        config = {"engine": job.profile.engine, **settings_of(job)} if on_megatron else deepspeed_config(job)
        config.pop(_MICRO_BATCH, None)
        key = (anatomy, job.case.world_size, job.device, json.dumps(config, default=str))
        if key not in _ENGINES:
            if len(_ENGINES) >= REMEMBERED:
                _ENGINES.clear()
            made = megatron_facts(job) if on_megatron else None
            _ENGINES[key] = cls(config, anatomy.parameters, job.case.world_size, job.device, anatomy, made)
        return _ENGINES[key]

    @functools.cached_property
    def anatomy(self) -> Anatomy:
        """The model that has these parameters."""
        return self.given or Anatomy(self.parameters)

    @functools.cached_property
    def facts(self) -> EngineFacts:
        """What DeepSpeed makes of the configuration, or megatron-core of the job."""
        return self.made or engine_facts(self.config)

    @functools.cached_property
    def zero(self) -> ZeroSettings:
        """Its ZeRO settings."""
        return zero_settings(self.config)

    @functools.cached_property
    def numels(self) -> list[int]:
        """Elements of each parameter that is trained."""
        return [p.numel for p in self.parameters if p.trainable]

    @functools.cached_property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each parameter that is trained."""
        return [p.shape for p in self.parameters if p.trainable]

    @functools.cached_property
    def all_numels(self) -> list[int]:
        """Elements of each parameter, trained or not."""
        return [p.numel for p in self.parameters]

    @functools.cached_property
    def frozen(self) -> list[int]:
        """Elements of each parameter that is not trained: no optimizer knows it, and it stays where the model has it."""
        return [p.numel for p in self.parameters if not p.trainable]

    @functools.cached_property
    def flat_numel(self) -> int:
        """Elements of the flat buffer of stages 1 and 2. BF16_Optimizer has one without ZeRO's settings (bf16_optimizer.py,
        _setup_for_real_optimizer)."""
        zero = ZeroSettings() if self.facts.wrapper is Wrapper.BF16 else self.zero
        return flat_numel(self.numels, self.world_size, zero, dtype_bytes(self.facts.parameter_dtype))

    @functools.cached_property
    def own(self) -> list[int]:
        """Elements of the partition of each trained parameter at stage 3."""
        return partition_numels(self.numels, self.world_size)

    @functools.cached_property
    def groups(self) -> list[int]:
        """Elements of the sub-groups at stage 3."""
        return sub_groups(self.own, self.zero.sub_group_size)


def block_bytes(job: Job) -> int:
    """What the allocator rounds to."""
    return ALLOCATOR_BLOCK_BYTES if job.device is Device.GPU else 1


@functools.lru_cache(maxsize=REMEMBERED)
def model_states(engine: Engine) -> Sequence[Storages]:
    """Everything that DeepSpeed holds between steps, from the second step on (moments are created lazily in the first)."""
    return (*LAYOUTS[engine.facts.wrapper](engine), *_frozen(engine))


def _frozen(engine: Engine) -> list[Storages]:
    """Parameters that are not trained: whole, or at stage 3 cut like all others (zero/partition_parameters.py), but in no flat buffer."""
    size = dtype_bytes(engine.facts.parameter_dtype)
    if not engine.frozen:
        return []
    if engine.facts.wrapper is not Wrapper.ZERO3:
        return [allocation(labels.PARAMETERS, [size * n for n in engine.frozen], "the model's own tensors, which are not trained")]
    sizes = [size * n for n in partition_numels(engine.frozen, engine.world_size)]
    source = "zero/partition_parameters.py _partition_param"
    return [allocation(labels.PARTITIONED_PARAMETERS, sizes, source, on_host=offloads_parameters(engine.config))]


def _plain(engine: Engine) -> list[Storages]:
    facts, numels = engine.facts, engine.numels
    size = dtype_bytes(facts.parameter_dtype)
    parameters = allocation(labels.PARAMETERS, [size * n for n in numels], "the model's own tensors")
    return [parameters, *_optimizer_states(facts, numels, shapes=engine.shapes)]


def _fused(engine: Engine) -> list[Storages]:
    facts, total = engine.facts, sum(engine.numels)
    source = "fp16/fused_optimizer.py __init__"
    return [
        allocation(labels.FLAT_PARAMETERS, dtype_bytes(facts.parameter_dtype) * total, source),
        allocation(labels.MASTER_PARAMETERS, FP32_BYTES * total, source),
        *_optimizer_states(facts, [total]),
    ]


def _unfused(engine: Engine) -> list[Storages]:
    facts, numels = engine.facts, engine.numels
    size = dtype_bytes(facts.parameter_dtype)
    return [
        allocation(labels.PARAMETERS, [size * n for n in numels], "the model's own tensors"),
        allocation(labels.MASTER_PARAMETERS, [FP32_BYTES * n for n in numels], "fp16/unfused_optimizer.py __init__"),
        *_optimizer_states(facts, numels, shapes=engine.shapes),
    ]


def _bf16(engine: Engine) -> list[Storages]:
    facts, total = engine.facts, engine.flat_numel
    source = "bf16_optimizer.py _setup_for_real_optimizer"
    return [
        allocation(labels.FLAT_PARAMETERS, dtype_bytes("bf16") * total, source),
        allocation(labels.MASTER_PARAMETERS, FP32_BYTES * total // engine.world_size, source),
        allocation(labels.GRADIENT_PARTITION, dtype_bytes(facts.gradient_dtype) * total, f"{source}: full size, not partitioned"),
        *_optimizer_states(facts, [total // engine.world_size]),
        _grad_norm(FP32_BYTES),
    ]


def _zero12(engine: Engine) -> list[Storages]:
    facts, zero = engine.facts, engine.zero
    size, master = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.master_dtype)
    total = engine.flat_numel
    own = total // engine.world_size
    offload = offloads_optimizer(engine.config)
    source = "zero/stage_1_and_2.py __init__"
    out = [
        allocation(labels.FLAT_PARAMETERS, size * total, f"{source}: bit16_groups_flat"),
        allocation(labels.MASTER_PARAMETERS, master * own, f"{source}: single_partition_of_fp32_groups", on_host=offload),
        *_optimizer_states(facts, [own], on_host=offload),
    ]
    if offload:
        out += _zero12_offload(engine, own)
    return [*out, _grad_norm(FP32_BYTES, on_host=offload)] if zero.compute_grad_norm else out


def _zero12_offload(engine: Engine, own: int) -> list[Storages]:
    """What stages 1 and 2 keep beside the states when the optimizer works on the host."""
    facts = engine.facts
    size, largest = dtype_bytes(facts.parameter_dtype), max(engine.numels)
    master_gradients = dtype_bytes(facts.master_dtype) * own
    source = "zero/stage_1_and_2.py"
    host = functools.partial(allocation, on_host=True)
    return [
        host(labels.MASTER_GRADIENTS, master_gradients, f"{source} initialize_optimizer_states"),
        host(labels.OFFLOADED_PARAMETERS, size * own, f"{source} param_buffer_of_bit16_for_cpu_offload_groups"),
        host(labels.OFFLOADING_HOST_BUFFER, size * largest, f"{source} temp_grad_buffer_for_cpu_offload"),
        allocation(labels.OFFLOADING_BUFFER, size * largest, f"{source} temp_grad_buffer_for_gpu_offload"),
        *_zero2_accumulated(engine, own),
    ]


def _zero2_accumulated(engine: Engine, own: int) -> list[Storages]:
    """Stage 2 with an offloaded fp32 master keeps, once it has accumulated, the gradients of all parameters that touch its partition."""
    facts = engine.facts
    accumulates = engine.config["gradient_accumulation_steps"] > 1
    if engine.config["zero_optimization"]["stage"] != 2 or not accumulates or facts.master_dtype != "fp32":
        return []
    size = dtype_bytes(facts.parameter_dtype)
    numel = touched_numel(flat_spans(engine.numels, engine.world_size, engine.zero, size), own)
    source = "zero/stage_1_and_2.py async_accumulate_grad_in_cpu_via_gpu: accumulated_grads_in_cpu"
    return [allocation(labels.ACCUMULATED_GRADIENTS, size * numel, source, on_host=True)]


def _zero3(engine: Engine) -> list[Storages]:
    facts = engine.facts
    size, gradient = dtype_bytes(facts.parameter_dtype), dtype_bytes(facts.gradient_dtype)
    own = sum(engine.own)
    offload = offloads_optimizer(engine.config)
    flat = "zero/stage3.py _create_fp16_partitions_with_defragmentation"
    buffers = "zero/stage3.py _setup_for_real_optimizer"
    return [
        allocation(labels.FLAT_PARAMETERS, size * own, flat, on_host=offloads_parameters(engine.config)),
        *_persistent_parameters(engine, size),
        allocation(labels.GRADIENT_PARTITION, gradient * own, f"{buffers}: grad_partitions_flat_buffer", on_host=offload),
        *_reduce_buckets(engine, buffers),
        *_zero3_states(engine),
        _grad_norm(FP32_BYTES if offload else FP64_BYTES, on_host=offload),
        allocation(labels.OVERFLOW_FLAG, 1, "zero/stage3.py __init__", on_host=offload),
    ]


def _zero3_states(engine: Engine) -> list[Storages]:
    """Master parameters, moments and, when offloading, master gradients by sub-group; `ratio` keeps the first sub-groups on the device."""
    facts, zero = engine.facts, engine.zero
    master = dtype_bytes(facts.master_dtype)
    groups = engine.groups
    offload = offloads_optimizer(engine.config)
    kept = len(kept_groups(groups, zero.offload_optimizer.ratio)) if offload else len(groups)
    out = []
    for numels, host in ((groups[:kept], False), (groups[kept:], True)):
        if not numels:
            continue
        sizes = [master * n for n in numels]
        out.append(allocation(labels.MASTER_PARAMETERS, sizes, "zero/stage3.py _create_fp32_partitions", on_host=host))
        if offload:
            source = "zero/stage3.py initialize_optimizer_states: kept when offloading"
            out.append(allocation(labels.MASTER_GRADIENTS, sizes, source, on_host=host))
        hybrid = offload and not host and engine.device is Device.GPU
        out += _optimizer_states(facts, numels, on_host=host, layout=all_optimizers()["torch.optim"] if hybrid else None)
    return [*out, *_placeholder(engine, kept)] if zero.offload_optimizer.ratio < 1 and offload else out


def _placeholder(engine: Engine, kept: int) -> list[Storages]:
    """What the torch.optim.AdamW of the sub-groups that stay was made with, while it has none to do.

    On CPU ranks every sub-group counts as offloaded: its device has the same name as the host (zero/stage3.py _optimizer_step).
    """
    if kept and engine.device is Device.GPU:
        return []
    size = dtype_bytes(engine.facts.parameter_dtype)
    return [allocation(labels.PLACEHOLDER, size, "zero/stage3.py __init__: backup_gpu_tensor")]


def _persistent_parameters(engine: Engine, size: int) -> list[Storages]:
    sizes = persistent_sizes(engine, size)
    if not sizes:
        return []
    return [allocation(labels.PERSISTENT_PARAMETERS, sizes, "zero/stage3.py _post_step: gathered again after every step")]


def persistent_sizes(engine: Engine, size: int) -> list[int]:
    """Bytes of the small parameters that stay gathered beside their partitions, at `size` bytes an element.

    On one rank a gathered parameter is its partition and costs nothing, unless that is in another memory.
    """
    is_elsewhere = offloads_parameters(engine.config) and engine.device is Device.GPU
    if engine.world_size == 1 and not is_elsewhere:
        return []
    return [size * engine.world_size * s for s in partition_numels(persistent(engine.all_numels, engine.zero), engine.world_size)]


def _reduce_buckets(engine: Engine, source: str) -> list[Storages]:
    """Stage 3 allocates its reduce bucket at init and keeps it."""
    if not engine.zero.contiguous_gradients:
        return []
    return [allocation(labels.REDUCE_BUCKET, reduce_bucket_sizes(engine), f"{source}: ipg_buckets")]


def reduce_bucket_sizes(engine: Engine) -> list[int]:
    """Bytes of stage 3's reduce buckets, one per communication dtype."""
    facts = engine.facts
    dtypes = {facts.communication_dtype}
    if facts.autocast_dtype != "none":
        dtypes = {facts.autocast_dtype if p.cast_by_autocast else facts.parameter_dtype for p in engine.parameters if p.trainable}
    return [dtype_bytes(d) * engine.zero.reduce_bucket_size for d in sorted(dtypes)]


def _optimizer_states(
    facts: EngineFacts,
    numels: Sequence[int],
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    on_host: bool = False,
    layout: OptimizerLayout | None = None,
) -> list[Storages]:
    """The states of each updated tensor, and the optimizer's own small tensors; `layout` is the engine's unless another is given.

    `shapes`: of the updated tensors, where they are not flat.
    """
    shapes = [(n,) for n in numels] if shapes is None else shapes
    layout = layout or facts.layout
    assert layout is not None, "only optimizers whose layout is known have a closed form (gap.py)"
    states = [
        allocation(
            labels.optimizer_state(state.component, state.key),
            state.sizes(facts.master_dtype, shapes),
            layout.source,
            on_host=on_host,
        )
        for state in layout.states
    ]
    counters = [
        allocation((Component.WORKSPACE, c.name), [FP32_BYTES] * c.count(len(numels)), layout.source, on_host=on_host or c.on_host)
        for c in layout.counters
    ]
    return [*states, *counters]


def _grad_norm(size: int, *, on_host: bool = False) -> Storages:
    return allocation(labels.GLOBAL_NORM, size, "engine.py _take_model_step", on_host=on_host)


def _megatron(engine: Engine) -> list[Storages]:
    """megatron-core without its distributed optimizer: gradients are views of one buffer, the rest is per parameter."""
    facts, numels = engine.facts, engine.numels
    buffer = dtype_bytes(facts.gradient_dtype) * sum(numels)
    return [
        allocation(labels.PARAMETERS, [dtype_bytes(facts.parameter_dtype) * n for n in numels], "the model's own tensors"),
        allocation(labels.GRADIENT_BUFFERS, buffer, MEGATRON_BUFFERS),
        *_megatron_states(facts, numels, "megatron/core/optimizer/optimizer.py Float16OptimizerWithFloat16Params"),
    ]


def _megatron_distributed(engine: Engine) -> list[Storages]:
    """With it, parameters are views of a buffer too, and the first rank has states of what lies in the first part of the buffers."""
    facts = engine.facts
    spans, total = buffer_spans(engine.numels, engine.world_size)
    own = total // engine.world_size
    shards = [min(end, own) - start for start, end in spans if start < own]
    return [
        allocation(labels.FLAT_PARAMETERS, dtype_bytes(facts.parameter_dtype) * total, MEGATRON_BUFFERS),
        allocation(labels.GRADIENT_BUFFERS, dtype_bytes(facts.gradient_dtype) * total, MEGATRON_BUFFERS),
        *_megatron_states(facts, shards, "megatron/core/optimizer/distrib_optimizer.py DistributedOptimizer"),
    ]


def _megatron_states(facts: EngineFacts, numels: Sequence[int], source: str) -> list[Storages]:
    """fp32 gradients that are made of others stay until the next step begins (`_copy_model_grads_to_main_grads`, `zero_grad`)."""
    sizes = [FP32_BYTES * n for n in numels]
    copied = [] if facts.gradient_dtype == "fp32" else [allocation(labels.MASTER_GRADIENTS, sizes, source)]
    return [
        allocation(labels.MASTER_PARAMETERS, sizes, source),
        *copied,
        *_optimizer_states(facts, list(numels)),
        allocation(labels.held_by(facts.wrapper, "_scale_one"), FP32_BYTES, source),
    ]


LAYOUTS: dict[Wrapper, Callable[[Engine], list[Storages]]] = {
    Wrapper.PLAIN: _plain,
    Wrapper.FUSED: _fused,
    Wrapper.UNFUSED: _unfused,
    Wrapper.BF16: _bf16,
    Wrapper.ZERO12: _zero12,
    Wrapper.ZERO3: _zero3,
    Wrapper.MEGATRON: _megatron,
    Wrapper.MEGATRON_DISTRIBUTED: _megatron_distributed,
}
