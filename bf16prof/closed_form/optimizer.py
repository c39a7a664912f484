"""What the basic optimizer adds to a wrapper: the states that it keeps, and the memory that its
update takes.

References are to PyTorch 2.13 (`torch/optim/`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import FP32_BYTES, Engine
from bf16prof.closed_form.passes import Meter
from bf16prof.engine import labels
from bf16prof.engine.config import BasicOptimizer, optimizer_settings, optimizer_type
from bf16prof.profiles.optimizers import OptimizerLayout
from bf16prof.vocabulary import Component


def layout_of(engine: Engine) -> OptimizerLayout:
    """What the engine's optimizer keeps."""
    assert engine.facts.layout is not None, "only optimizers whose layout is known have a closed form (gap.py)"
    return engine.facts.layout


def optimizer_states(
    engine: Engine,
    numels: Sequence[int],
    *,
    shapes: Sequence[tuple[int, ...]] | None = None,
    on_host: bool = False,
    layout: OptimizerLayout | None = None,
) -> list[Storages]:
    """The states of each updated tensor, and the optimizer's own small tensors; `layout` is the
    engine's unless another is given.

    `shapes`: of the updated tensors, where they are not flat.
    """
    shapes = [(n,) for n in numels] if shapes is None else shapes
    layout = layout or layout_of(engine)
    states = [
        allocation(
            labels.optimizer_state(state.component, state.key),
            state.sizes(engine.facts.master_dtype, shapes),
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


def update(engine: Engine, meter: Meter, gradients: Sequence[int]) -> None:
    """The optimizer updates parameters whose gradients have so many bytes; only PyTorch's unfused
    kernels take memory for it.

    * `adam.py _multi_tensor_adam`, the default on a GPU where neither `fused` nor `foreach` is
      given: a list of denominators.
    * `_single_tensor_adam`: the denominator of one parameter, twice while it is divided, beside
      that of the parameter before.

    With weight decay that is not decoupled there are gradients of the same size, until the
    denominators are made or beside them.
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
