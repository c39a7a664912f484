"""DeepSpeed's optimizer wrappers: `wrapper_of` says which one an engine has, and the wrapper
answers everything that depends on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from bf16prof.closed_form.allocation import Storages
from bf16prof.closed_form.engine import REMEMBERED, Engine
from bf16prof.closed_form.wrappers.bf16 import Bf16Optimizer
from bf16prof.closed_form.wrappers.fused import FusedOptimizer
from bf16prof.closed_form.wrappers.plain import PlainOptimizer
from bf16prof.closed_form.wrappers.unfused import UnfusedOptimizer
from bf16prof.closed_form.wrappers.wrapper import OptimizerWrapper
from bf16prof.closed_form.wrappers.zero3 import Zero3Optimizer
from bf16prof.closed_form.wrappers.zero12 import Zero12Optimizer
from bf16prof.engine.config import Wrapper

CLASSES: Mapping[Wrapper, type[OptimizerWrapper]] = {
    Wrapper.PLAIN: PlainOptimizer,
    Wrapper.FUSED: FusedOptimizer,
    Wrapper.UNFUSED: UnfusedOptimizer,
    Wrapper.BF16: Bf16Optimizer,
    Wrapper.ZERO12: Zero12Optimizer,
    Wrapper.ZERO3: Zero3Optimizer,
}


@functools.lru_cache(maxsize=REMEMBERED)
def wrapper_of(engine: Engine) -> OptimizerWrapper:
    """The wrapper of an engine; one object, so that what follows from it can be remembered."""
    assert engine.facts.wrapper in CLASSES, "megatron-core's wrappers have a closed form between steps alone (`megatron.py`)"
    return CLASSES[engine.facts.wrapper](engine)


def model_states(engine: Engine) -> Sequence[Storages]:
    """Everything that DeepSpeed holds between steps, from the second step on."""
    return wrapper_of(engine).model_states
