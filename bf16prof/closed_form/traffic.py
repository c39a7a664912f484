"""Memory traffic of one optimizer step on one rank: what Adam has to read and to write, each tensor once, in its own dtype.

It is a lower bound: wrappers also read gradients for their norm, clip them and copy them (DeepSpeed 0.19.8, step in
`runtime/zero/stage_1_and_2.py` and `stage3.py`), and every such pass costs more. Where states are bf16, each of these reads and writes is
half of fp32's.
"""

from __future__ import annotations

from typing import NamedTuple

from bf16prof.closed_form.layout import partition_numels, persistent
from bf16prof.closed_form.steady import Engine
from bf16prof.closed_form.training import Walked
from bf16prof.engine.config import EngineFacts, Wrapper, dtype_bytes, offloads_optimizer, offloads_parameters
from bf16prof.rounding import ceil_div


def optimizer_traffic(engine: Engine) -> tuple[int, int]:
    """Bytes read and bytes written by the optimizer of one rank in one step.

    Per element: the gradient, the master parameter and the optimizer's states (Adam has two moments: Kingma and Ba 2015, algorithm 1) are
    read; all but the gradient, and the parameter that the model computes with where it is another tensor, are written.
    """
    facts = engine.facts
    own = partition_numel(engine)
    gradient = dtype_bytes(facts.gradient_dtype)
    master = dtype_bytes(facts.master_dtype)
    states = sum(sum(state.sizes(facts.master_dtype, [(own,)])) for state in facts.layout.states) if facts.layout else 0
    copy = dtype_bytes(facts.parameter_dtype) if keeps_a_copy(facts) else 0
    return own * (gradient + master) + states, own * (master + copy) + states


def partition_numel(engine: Engine) -> int:
    """Elements that the optimizer of one rank updates, padding included."""
    facts = engine.facts
    if facts.wrapper is Wrapper.ZERO3:
        return sum(engine.own)
    if facts.wrapper in (Wrapper.ZERO12, Wrapper.BF16):
        return engine.flat_numel // engine.world_size
    return sum(engine.numels)


def keeps_a_copy(facts: EngineFacts) -> bool:
    """Whether the model computes with another tensor than the optimizer updates: always, but for plain fp32."""
    return facts.wrapper is not Wrapper.PLAIN


class HostLink(NamedTuple):
    """Bytes between device and host in one step: down and up while forward and backward run, and up when the optimizer is done."""

    down: int = 0
    up: int = 0
    after: int = 0


def host_link(engine: Engine, done: Walked) -> HostLink:
    """What offloading moves: gradients down, updated parameters up; offloaded parameters up whenever they are gathered.

    Gradients go down with every micro-step in which they are reduced (stage 1: the last; `zero/stage_1_and_2.py`
    async_accumulate_grad_in_cpu_via_gpu, `stage3.py` partition_grads).
    """
    facts, world = engine.facts, engine.world_size
    own = partition_numel(engine) if offloads_optimizer(engine.config) else 0
    width = dtype_bytes(facts.parameter_dtype)
    reductions = sum(times for times, launched in done.launched if launched.reduced)
    down = own * reductions * dtype_bytes(facts.gradient_dtype)
    if engine.facts.wrapper is not Wrapper.ZERO3 or not offloads_parameters(engine.config):
        return HostLink(down, after=width * own)
    own_numels = {key: ceil_div(n, world) for key, n in done.numels.items()}
    up = sum(times * own_numels[key] for times, launched in done.launched for _, keys in launched.gathered for key in keys)
    return HostLink(down, width * up, width * sum(partition_numels(persistent(engine.all_numels, engine.zero), world)))
