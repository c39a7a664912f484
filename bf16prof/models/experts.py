"""Layers whose experts are spread over ranks: DeepSpeed's MoE, which a model of the user's own
brings."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError

if TYPE_CHECKING:
    from torch import nn

NAME = "parallel.expert"

MODULE = "deepspeed.moe.layer"

GROUP = "ep_size_"
"""How DeepSpeed names the groups over which experts are spread, before their number of ranks
(moe/layer.py)."""


def require_experts(model: nn.Module, ranks: int) -> None:
    """Raise `InputError` unless the model's MoE layers spread their experts over so many ranks: the
    layers say it, not a configuration."""
    sizes = {int(layer.ep_size) for layer in mixtures(model)}
    if ranks > 1 and not sizes:
        raise InputError(f"{NAME}: --ep {ranks}, and {type(model).__name__} has no layer of {MODULE}.MoE")
    if sizes - {ranks}:
        raise InputError(
            f"{NAME}: the model's MoE layers have ep_size {', '.join(map(str, sorted(sizes)))}, and --ep is {ranks}",
            hint=f"--ep {max(sizes)}, or build them with ep_size={ranks}",
        )


def require_capacities(model: nn.Module) -> None:
    """Raise `InputError` where what an expert takes follows from what the gate has chosen, which
    nobody knows before it runs."""
    if any(not layer.deepspeed_moe.gate.drop_tokens for layer in mixtures(model)):
        raise InputError(
            "an MoE layer with drop_tokens=False: each expert takes as many tokens as the fullest one, which a dry run does not know",
            hint="drop_tokens=True with the capacity_factor that you expect; bf16prof measure runs it as it is",
        )


def capacity_note(model: nn.Module) -> list[str]:
    """How many tokens an expert is taken to get, in words; none for a model without such layers."""
    found = {(gate.capacity_factor, gate.k, gate.min_capacity) for gate in (layer.deepspeed_moe.gate for layer in mixtures(model))}
    return [
        f"experts: room for {factor:g} x {k} x tokens / experts each, {least} at least, as the layer says; what is beyond is dropped"
        for factor, k, least in sorted(found)
    ]


def ranks_of_experts(parameter: Any) -> int:
    """Over how many ranks an expert's parameter is one of as many: DeepSpeed names its group after
    that (moe/layer.py). 1 of all others."""
    group = str(getattr(parameter, "group_name", ""))
    return int(group.removeprefix(GROUP)) if group.startswith(GROUP) else 1


def mixtures(model: nn.Module) -> Iterator[Any]:
    """The MoE layers of DeepSpeed's in a model; a model that has some has imported their module."""
    if module := sys.modules.get(MODULE):
        yield from (layer for layer in model.modules() if isinstance(layer, module.MoE))
