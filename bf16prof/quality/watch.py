"""Watches the step of an engine's real optimizer: what it intended and what took effect, by layer.

It takes memory and time of its own, so it is attached only when these have been measured. Of a
tensor's elements that belong to one parameter at most `SAMPLE` are looked at, evenly spaced; their
intended update and their value are kept in float64 during the step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bf16prof.profiles.optimizers import OptimizerLayout
from bf16prof.quality.casts import Casts, counted
from bf16prof.quality.owners import Span, owners
from bf16prof.quality.sums import SAMPLE, Sums
from bf16prof.quality.update import AdamSettings, intended_update, measured_sums
from bf16prof.rounding import ceil_div
from bf16prof.vocabulary import Component


@dataclass(frozen=True)
class _Pending:
    """A span whose update is about to come: its intended update and its stored value."""

    tensor: Tensor
    span: Span
    intended: Tensor
    before: Tensor


class UpdateWatch:
    """Attached to an engine whose optimizer is an Adam with this layout; adds up what each step
    does until it is taken."""

    def __init__(self, engine: Any, layout: OptimizerLayout) -> None:
        self._optimizer, self._layout = engine.basic_optimizer, layout
        self._owners = owners(engine)
        self._keys = {state.component: state.key for state in layout.states}
        self._sums: dict[str, Sums] = defaultdict(Sums)
        self._casts: dict[str, Casts] = defaultdict(Casts)
        self._step = self._optimizer.step
        self._optimizer.step = self._watched

    def take(self) -> dict[str, Sums]:
        """The sums by layer since the last call."""
        sums, self._sums = dict(self._sums), defaultdict(Sums)
        return sums

    def take_casts(self) -> dict[str, Casts]:
        """What casts would have made of weights, gradients and updates since the last call."""
        casts, self._casts = dict(self._casts), defaultdict(Casts)
        return casts

    def _watched(self, *arguments: Any, **keywords: Any) -> Any:
        pending = [each for group in self._optimizer.param_groups for each in self._before(group)]
        result = self._step(*arguments, **keywords)
        for each in pending:
            after = self._stored(each.tensor, each.span)
            self._sums[each.span.layer] += measured_sums(each.intended, each.before, after)
        return result

    def _before(self, group: Mapping[str, Any]) -> list[_Pending]:
        tensors = [tensor for tensor in group["params"] if tensor.grad is not None]
        adam = self._settings(group, tensors)
        pending = []
        for tensor in tensors:
            state = self._optimizer.state.get(tensor, {})
            moments = [state.get(self._keys[component]) for component in (Component.MOMENTUM, Component.VARIANCE)]
            for span in self._owners[tensor.data_ptr()]:
                stored = self._stored(tensor, span)
                gradient, momentum, variance = (None if t is None else _sample(t, span) for t in (tensor.grad, *moments))
                assert gradient is not None, "tensors without one were left out"
                update = intended_update(stored, gradient, momentum, variance, adam)
                for name, values in (("weights", stored), ("gradients", gradient), ("updates", update)):
                    self._casts[name] += counted(values)
                pending.append(_Pending(tensor, span, update, stored))
        return pending

    def _stored(self, tensor: Tensor, span: Span) -> Tensor:
        """The value that the optimizer keeps: the tensor's, and what it keeps beside it of the
        digits that the tensor has no room for."""
        value = _sample(tensor, span)
        key = self._keys.get(Component.COMPENSATION)
        compensation = self._optimizer.state.get(tensor, {}).get(key) if key else None
        return value if compensation is None else value + _sample(compensation, span)

    def _settings(self, group: Mapping[str, Any], tensors: list[Tensor]) -> AdamSettings:
        """What the coming step is told. Some optimizers count in each tensor's state, some in one
        of them, some in the group."""
        counts = [self._optimizer.state.get(tensor, {}).get("step", 0) for tensor in tensors]
        beta1, beta2 = group.get("betas") or (group["beta1"], group["beta2"])
        return AdamSettings(
            lr=float(group["lr"]),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(group["eps"]),
            weight_decay=float(group["weight_decay"]),
            decoupled=self._is_adamw(group),
            step=1 + max(int(count) for count in (*counts, group.get("step", 0))),
            debiased=self._layout.debiased,
        )

    def _is_adamw(self, group: Mapping[str, Any]) -> bool:
        """DeepSpeed's have a switch, torch's a key of the group; a library's here are."""
        switch = getattr(self._optimizer, "adam_w_mode", None)
        return bool(group.get("decoupled_weight_decay", bool(self._layout.class_)) if switch is None else switch)


def _sample(tensor: Tensor, span: Span) -> Tensor:
    """The elements of a span that are looked at, in float64."""
    every = ceil_div(span.numel, SAMPLE)
    return tensor.detach().reshape(-1)[span.start : span.start + span.numel : every].double()
