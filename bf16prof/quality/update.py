"""The update that Adam intends, computed in float64 from the gradient and the states that the
optimizer has, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bf16prof.quality.sums import Sums


@dataclass(frozen=True)
class AdamSettings:
    """One step of Adam: learning rate, decay rates, epsilon, weight decay, whether that is
    decoupled (AdamW), and the number of the step, from 1. `debiased`: the moments are kept with
    their correction for the first steps applied.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    step: int
    debiased: bool = False


def intended_update(parameter: Tensor, gradient: Tensor, momentum: Tensor | None, variance: Tensor | None, adam: AdamSettings) -> Tensor:
    """What a step adds to the parameter, all tensors of one shape, in float64; moments are those
    before the step, `None` before the first.

    Kingma and Ba 2015 (arXiv 1412.6980), algorithm 1; Loshchilov and Hutter 2019 (arXiv
    1711.05101), algorithm 2.
    """
    value, gradient = parameter.double(), gradient.double()
    if not adam.decoupled:
        gradient = gradient + adam.weight_decay * value
    first = adam.beta1 * _biased(momentum, adam.beta1, adam) + (1 - adam.beta1) * gradient
    second = adam.beta2 * _biased(variance, adam.beta2, adam) + (1 - adam.beta2) * gradient.square()
    first, second = (moment / (1 - beta**adam.step) for moment, beta in ((first, adam.beta1), (second, adam.beta2)))
    update = -adam.lr * first / (second.sqrt() + adam.eps)
    return update - adam.lr * adam.weight_decay * value if adam.decoupled else update


def _biased(moment: Tensor | None, beta: float, adam: AdamSettings) -> Tensor | float:
    """The moment as algorithm 1 keeps it."""
    if moment is None:
        return 0.0
    return moment.double() * ((1 - beta ** (adam.step - 1)) if adam.debiased else 1.0)


def measured_sums(intended: Tensor, before: Tensor, after: Tensor) -> Sums:
    """What became of an intended update, from the stored values before and after it; elements where
    either is not finite are left out."""
    effective = after.double() - before.double()
    finite = intended.isfinite() & effective.isfinite()
    intended, effective = intended[finite], effective[finite]
    wanted = intended != 0
    return Sums(
        intended.numel(),
        int(wanted.sum()),
        int((wanted & (effective == 0)).sum()),
        float(torch.dot(intended, effective)),
        float(torch.dot(intended, intended)),
    )
