"""What the state of an optimizer is for: an average of gradients, of their squares, a correction, a
counter.

An optimizer keeps its state in `optimizer.state`, by tensor and by key. The keys of PyTorch's and
DeepSpeed's optimizers are in `KEYS`, with what their update equations do with them. An optimizer
that nobody listed is read by the words of its keys. No state is `other`.
"""

from __future__ import annotations

import re
from typing import Any

from bf16prof.engine import labels
from bf16prof.profiles.optimizers import state_components
from bf16prof.vocabulary import Component, Label

C = Component

KEYS: dict[str, Component] = {
    **state_components(),
    "momentum_buffer": C.MOMENTUM,  # torch SGD, RMSprop, Muon; deepspeed/runtime/zero/muon
    "grad_avg": C.MOMENTUM,  # torch RMSprop, centered: the mean of gradients, whose square is taken off
    "prev": C.MOMENTUM,  # torch Rprop: the last gradient
    "ax": C.MOMENTUM,  # torch ASGD: the mean of the parameters over the steps
    "sum": C.VARIANCE,  # torch Adagrad: the sum of squared gradients
    "square_avg": C.VARIANCE,  # torch RMSprop, Adadelta
    "acc_delta": C.VARIANCE,  # torch Adadelta: the mean of squared updates
    "exp_inf": C.VARIANCE,  # torch Adamax: the largest gradient, decayed, in the place of the root of the variance
    "max_exp_avg_sq": C.VARIANCE,  # AMSGrad
    "exp_avg_sq_fresh": C.VARIANCE,  # deepspeed/runtime/fp16/onebit/lamb.py
    "step_size": C.VARIANCE,  # torch Rprop: a step width for each element
    "row_var": C.VARIANCE,  # torch Adafactor, and below: a variance in factors
    "col_var": C.VARIANCE,
    "variance": C.VARIANCE,
    "worker_error": C.COMPENSATION,  # deepspeed/runtime/fp16/onebit: what compression lost
    "server_error": C.COMPENSATION,
}
"""States by the key under which an optimizer keeps them."""

WORDS: tuple[tuple[Component, str], ...] = (
    (C.COMPENSATION, r"comp|error|residual|kahan"),
    (C.VARIANCE, r"sq|var|square|second|inf|hess|precond|nu$|^v$|^sum|denom|state2|scale|absmax|qmap"),
)
"""Parts of keys of optimizers that nobody listed. What says neither is an average of gradients."""


def state_label(key: str, value: Any) -> Label:
    """The label of a state: by its key, and a single number, such as a step count or a product of
    decay rates, as a counter."""
    if key == "step" or (key not in KEYS and getattr(value, "numel", lambda: 0)() == 1):
        return labels.STEP_COUNTERS
    return labels.optimizer_state(component_of(key), key)


def component_of(key: str) -> Component:
    """The component of a state that is kept under this key."""
    if key in KEYS:
        return KEYS[key]
    return next((component for component, words in WORDS if re.search(words, key.lower())), C.MOMENTUM)
