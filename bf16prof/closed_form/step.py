"""The optimizer step: what every wrapper allocates and frees between the end of backward and the next forward pass.

References are to DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.gradients import Gradients, Share
from bf16prof.closed_form.layout import kept_groups
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.steady import FP32_BYTES, FP64_BYTES, Engine, persistent_sizes
from bf16prof.engine import labels
from bf16prof.engine.config import (
    BasicOptimizer,
    Wrapper,
    clips_gradients,
    dtype_bytes,
    offloads_optimizer,
    offloads_parameters,
    optimizer_settings,
    optimizer_type,
)
from bf16prof.models.autograd.tape import GRADIENT
from bf16prof.records import Phase
from bf16prof.rounding import round_up


def step(engine: Engine, meter: Meter, gradients: Gradients | Gathers | Share) -> None:
    """The step phase of the last micro-step; ZeRO-3 has let go of gathered parameters already."""
    meter.begin(Phase.STEP)
    if isinstance(gradients, Gathers):
        _zero3(engine, meter)
    elif isinstance(gradients, Share):
        _zero12(engine, meter, gradients)
    else:
        _STAGE_0[engine.facts.wrapper](engine, meter, gradients)
    meter.ends[Phase.STEP] = meter.level


def waiting_norms(engine: Engine, gradients: Gradients | Gathers | Share, block: int) -> int:
    """Bytes at the end of backward of the norms of gradients that have gone to the host, which the step adds up."""
    if not offloads_optimizer(engine.config) or not isinstance(gradients, Gathers | Share):
        return 0
    return len(gradients.own if isinstance(gradients, Share) else engine.own) * round_up(FP64_BYTES, block)


def update(engine: Engine, meter: Meter, gradients: Sequence[int]) -> None:
    """The optimizer updates parameters whose gradients have so many bytes; only PyTorch's unfused kernels take memory for it.

    * torch/optim/adam.py `_multi_tensor_adam`, the default on a GPU where neither `fused` nor `foreach` is given: a list of denominators.
    * `_single_tensor_adam`: the denominator of one parameter, twice while it is divided, beside that of the parameter before.

    With weight decay that is not decoupled there are gradients of the same size, until the denominators are made or beside them.
    """
    meter.updates(len(gradients))
    facts, params = engine.facts, optimizer_settings(engine.config)
    if facts.optimizer is not BasicOptimizer.TORCH_ADAM or facts.fused_kernel:
        return
    foreach = params.get("foreach")
    if foreach or (foreach is None and params.get("fused") is None):
        meter.touch(labels.OPTIMIZER_TEMPORARIES, *gradients)
        return
    is_decoupled = optimizer_type(engine.config) == "adamw" or params.get("adam_w_mode", True)
    times = 3 if params.get("weight_decay") and not is_decoupled else 2
    for before, size in itertools.pairwise([0, *gradients]):
        meter.touch(labels.OPTIMIZER_TEMPORARIES, before, *[size] * times)


def _plain(engine: Engine, meter: Meter, gradients: Gradients) -> None:
    """No wrapper: the gradients of the parameters are used as they are and then dropped."""
    _clip(engine, meter)
    update(engine, meter, list(gradients.kept.values()))
    meter.give(GRADIENT, *gradients.kept.values())


def _clip(engine: Engine, meter: Meter) -> None:
    """utils.py clip_grad_norm_, which the engine calls itself: norms, each of a gradient in fp32 (clipping is on by default)."""
    if not clips_gradients(engine.config):
        return
    numels = engine.numels
    casts = engine.facts.gradient_dtype != "fp32"
    before = numels.index(max(numels)) if casts else len(numels) - 1
    meter.touch(labels.GRADIENT_NORM, *[FP32_BYTES] * (before + 1), FP32_BYTES * max(numels) * casts)


def _fused(engine: Engine, meter: Meter, gradients: Gradients) -> None:
    """fp16/fused_optimizer.py step: an fp32 copy of every gradient, then a flat one; all others go before the update."""
    copies = [FP32_BYTES * n for n in engine.numels]
    flat = FP32_BYTES * sum(engine.numels)
    meter.take(labels.STEP_GRADIENTS, *copies)
    meter.take(labels.STEP_GRADIENTS, flat)
    meter.give(labels.STEP_GRADIENTS, *copies)
    meter.give(GRADIENT, *gradients.kept.values())
    meter.give(labels.STEP_GRADIENTS, flat)


def _unfused(engine: Engine, meter: Meter, gradients: Gradients) -> None:
    """fp16/unfused_optimizer.py step: an fp32 copy of every gradient."""
    copies = [FP32_BYTES * n for n in engine.numels]
    meter.take(labels.STEP_GRADIENTS, *copies)
    update(engine, meter, copies)
    meter.give(labels.STEP_GRADIENTS, *copies)
    meter.give(GRADIENT, *gradients.kept.values())


def _bf16(engine: Engine, meter: Meter, gradients: Gradients) -> None:
    """bf16_optimizer.py step: the master gradients are the ones that have been accumulated."""
    update(engine, meter, [FP32_BYTES * engine.flat_numel // engine.world_size])
    meter.give(GRADIENT, *gradients.kept.values())


def _zero12(engine: Engine, meter: Meter, share: Share) -> None:
    """zero/stage_1_and_2.py step: the norm of every gradient in fp64, one flat copy of them, and another in the master's dtype."""
    facts = engine.facts
    width, master = dtype_bytes(facts.gradient_dtype), dtype_bytes(facts.master_dtype)
    own = list(share.own.values())
    if offloads_optimizer(engine.config):
        meter.touch(labels.GRADIENT_NORM, *[FP64_BYTES] * len(own))
        _drop(meter)
        return
    if engine.zero.compute_grad_norm and own:
        meter.touch(labels.GRADIENT_NORM, FP64_BYTES * max(own))
    partition = share.partition
    copy = _flattened(meter, partition, width, master, is_copied=len(own) > 1 or sum(own) < partition)
    _drop(meter)
    update(engine, meter, [master * partition])
    meter.give(labels.STEP_GRADIENTS, copy)


def _flattened(meter: Meter, numel: int, width: int, master: int, *, is_copied: bool) -> int:
    """Gradients of `width` bytes an element become one flat tensor, unless they are one, in the master's dtype: the bytes that this
    leaves for the optimizer."""
    flat = width * numel if is_copied else 0
    meter.take(labels.STEP_GRADIENTS, flat)
    if master == width:
        return flat
    meter.take(labels.STEP_GRADIENTS, master * numel)
    meter.give(labels.STEP_GRADIENTS, flat)
    return master * numel


def _drop(meter: Meter) -> None:
    meter.give(labels.GRADIENT_PARTITION, meter.held.get(labels.GRADIENT_PARTITION, 0))


def _zero3(engine: Engine, meter: Meter) -> None:
    """zero/stage3.py step: overflow and norms, then sub-group by sub-group a flat copy of the gradients in the master's dtype."""
    facts, world = engine.facts, engine.world_size
    width, master, size = (dtype_bytes(d) for d in (facts.gradient_dtype, facts.master_dtype, facts.parameter_dtype))
    own = engine.own
    kept = persistent_sizes(engine, size)
    meter.give(labels.PERSISTENT_PARAMETERS, *kept)
    if offloads_optimizer(engine.config):
        meter.touch(labels.GRADIENT_NORM, *[FP64_BYTES] * len(own))
        for group in kept_groups(engine.groups, engine.zero.offload_optimizer.ratio):
            meter.touch(labels.OPTIMIZER_TEMPORARIES, master * group)  # of the second optimizer, a torch.optim.AdamW
    else:
        if facts.parameter_dtype == "fp16":
            meter.touch(labels.OVERFLOW_CHECK, sum(own))
        meter.touch(labels.GRADIENT_NORM, FP64_BYTES * max(own), *[FP64_BYTES] * own.index(max(own)))
        for group, count in zip(engine.groups, _counts(own, engine.groups), strict=True):
            copy = _flattened(meter, group, width, master, is_copied=count > 1)
            update(engine, meter, [master * group])
            meter.give(labels.STEP_GRADIENTS, copy)
    copies = [each // world for each in kept] if offloads_parameters(engine.config) and world > 1 else []
    meter.take(labels.GATHERED_PARAMETERS, *copies)
    meter.take(labels.PERSISTENT_PARAMETERS, *kept)
    meter.give(labels.GATHERED_PARAMETERS, *copies)


def _counts(own: Sequence[int], totals: Sequence[int]) -> list[int]:
    """How many partitions are in each sub-group."""
    counts, index = [], 0
    for total in totals:
        first, reached = index, 0
        while reached < total:
            reached, index = reached + own[index], index + 1
        counts.append(index - first)
    return counts


_STAGE_0: Mapping[Wrapper, Callable[[Engine, Meter, Gradients], None]] = {
    Wrapper.PLAIN: _plain,
    Wrapper.FUSED: _fused,
    Wrapper.UNFUSED: _unfused,
    Wrapper.BF16: _bf16,
}
