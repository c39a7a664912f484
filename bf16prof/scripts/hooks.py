"""Where a script's engines come from and what they call: replaced before the script's first import,
put back at the end.

`deepspeed.initialize` is called by attribute by everybody: native scripts, accelerate, the Trainer,
TRL. So one hook covers them all.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

from bf16prof.scripts.watch import Watch
from bf16prof.vocabulary import Phase

PHASES_OF_INSTRUCTIONS = {"ForwardPass": Phase.FORWARD, "BackwardPass": Phase.BACKWARD, "OptimizerStep": Phase.STEP}
"""Instructions of a pipeline engine (`runtime/pipe/schedule.py`) that begin a phase."""


def nothing_built() -> str:
    """What to say of a script that has made no engine, in this process: which it trains with, where
    that is another."""
    other = ": it trains with megatron-core, which --engine megatron-core runs without a script" if "megatron.core" in sys.modules else ""
    return f"deepspeed.initialize was never called{other}"


@contextlib.contextmanager
def hooked(watch: Watch) -> Iterator[None]:
    """Let every engine that is built inside be watched."""
    import deepspeed
    import torch
    from deepspeed.runtime.pipe.engine import PipelineEngine

    real_initialize, real_backward = deepspeed.initialize, torch.autograd.backward

    @functools.wraps(real_initialize)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        watch.building()
        zero_init = _is_partitioned(kwargs.get("model", args[1] if len(args) > 1 else None))
        built = real_initialize(*args, **kwargs)
        watch.built(built[0], zero_init=zero_init)
        return built

    @functools.wraps(real_backward)
    def backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        watch.backward_begins(tensors)
        return real_backward(tensors, *args, **kwargs)

    instructions = {
        instruction: watch.instruction(PHASES_OF_INSTRUCTIONS[instruction.__name__], method)
        for instruction, method in PipelineEngine._INSTRUCTION_MAP.items()
        if instruction.__name__ in PHASES_OF_INSTRUCTIONS
    }
    with (
        mock.patch.object(deepspeed, "initialize", initialize),
        mock.patch.object(torch.autograd, "backward", backward),
        mock.patch.dict(PipelineEngine._INSTRUCTION_MAP, instructions),
    ):
        yield


def _is_partitioned(model: Any) -> bool:
    """Whether a model was built inside `deepspeed.zero.Init`."""
    return any(hasattr(parameter, "ds_tensor") for parameter in getattr(model, "parameters", tuple)())
