"""What megatron-core holds between steps: its two optimizers over the buffers of its
DistributedDataParallel.

What it holds within a step is left to the dry run. References are to megatron-core 0.16.1
(`megatron/core/`).
"""

from __future__ import annotations

from collections.abc import Sequence

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES, Engine
from bf16prof.closed_form.optimizer import optimizer_states
from bf16prof.closed_form.wrappers.wrapper import whole_frozen_parameters
from bf16prof.engine import labels
from bf16prof.engine.config import Wrapper, dtype_bytes
from bf16prof.engine.megatron.layout import buffer_spans, fullest_rank, shards

BUFFERS = "distributed/param_and_grad_buffer.py _ParamAndGradBuffer"


def megatron_states(engine: Engine) -> list[Storages]:
    """Everything that the rank which holds most has between steps, from the second step on."""
    states = _distributed(engine) if engine.facts.wrapper is Wrapper.MEGATRON_DISTRIBUTED else _whole(engine)
    return [*states, *whole_frozen_parameters(engine)]


def _whole(engine: Engine) -> list[Storages]:
    """Without its distributed optimizer: gradients are views of one buffer, the rest is per
    parameter."""
    numels, parameter, gradient = engine.numels, *_sizes(engine)
    return [
        allocation(labels.PARAMETERS, [parameter * n for n in numels], "the model's own tensors"),
        allocation(labels.GRADIENT_BUFFERS, gradient * sum(numels), BUFFERS),
        *_states(engine, numels, "optimizer/optimizer.py Float16OptimizerWithFloat16Params"),
    ]


def _distributed(engine: Engine) -> list[Storages]:
    """With it, parameters are views of a buffer too, and a rank has the states of what lies in its
    part of the buffers."""
    (parameter, gradient), numels, ranks = _sizes(engine), engine.numels, engine.world_size
    _, total = buffer_spans(numels, ranks)
    own = shards(numels, ranks, fullest_rank(numels, ranks))
    return [
        allocation(labels.FLAT_PARAMETERS, parameter * total, BUFFERS),
        allocation(labels.GRADIENT_BUFFERS, gradient * total, BUFFERS),
        *_states(engine, own, "optimizer/distrib_optimizer.py DistributedOptimizer"),
    ]


def _sizes(engine: Engine) -> tuple[int, int]:
    """Bytes of an element of parameters and of gradients."""
    return dtype_bytes(engine.facts.parameter_dtype), dtype_bytes(engine.facts.gradient_dtype)


def _states(engine: Engine, numels: Sequence[int], source: str) -> list[Storages]:
    """fp32 gradients that are made of others stay until the next step begins
    (`_copy_model_grads_to_main_grads`, `zero_grad`)."""
    sizes = [FP32_BYTES * n for n in numels]
    copied = [] if engine.facts.gradient_dtype == "fp32" else [allocation(labels.MASTER_GRADIENTS, sizes, source)]
    return [
        allocation(labels.MASTER_PARAMETERS, sizes, source),
        *copied,
        *optimizer_states(engine, numels),
        allocation(labels.held_by(engine.facts.wrapper, "_scale_one"), FP32_BYTES, source),
    ]
