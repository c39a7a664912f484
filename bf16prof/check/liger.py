"""What Liger-Kernel's Triton kernels allocate and keep, as autograd functions that compute nothing:
written from the behaviour of liger-kernel 0.2.1 (cross entropy, RMS norm, SwiGLU) and 0.4.2 (the
head with its loss), `src/liger_kernel/ops`.

A kernel that works in place is nothing here, or `mul_(1)`, so that no memory is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

IGNORE_INDEX = -100


class LigerCrossEntropy(torch.autograd.Function):
    """The gradient is written over the logits in forward; backward only hands it on where the
    incoming gradient is 1."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        """The mean loss."""
        losses = torch.zeros(logits.shape[0], dtype=logits.dtype, device=logits.device)
        counted = (target != IGNORE_INDEX).sum().item() or 1
        loss = torch.sum(losses) / counted
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """What was written over the logits."""
        (logits,) = ctx.saved_tensors
        _one(grad)
        return logits, None


class LigerRmsNorm(torch.autograd.Function):
    """Keeps the input and a reciprocal root mean square per row. The input's gradient is written
    over the incoming one; of the weight's there is one row for each row of the input, before they
    are summed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """The normalised rows."""
        ctx.save_for_backward(x, weight, torch.empty(x.shape[0], dtype=torch.float32, device=x.device))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients of input and weight."""
        x, weight, _ = ctx.saved_tensors
        rows = torch.empty_like(x, dtype=weight.dtype)
        return grad.view(grad.shape), torch.sum(rows, dim=0).to(weight.dtype)


class LigerSiluMul(torch.autograd.Function):
    """Keeps both factors, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """The product."""
        ctx.save_for_backward(a, b)
        return torch.zeros_like(a)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """What was written over the factors."""
        a, b = ctx.saved_tensors
        return a.view(grad.shape), b.view(grad.shape)


class LigerFusedLinearCrossEntropy(torch.autograd.Function):
    """Head and loss in chunks of tokens: the gradients of input and weight are computed in forward,
    and kept. Up to 0.4.2 the logits of a chunk are cast to fp32 and back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        """The loss."""
        tokens, hidden = x.shape
        size = _next_power_of_2(-(-tokens // -(-weight.shape[0] // hidden)))
        grad_weight, grad_x = torch.zeros_like(weight), torch.zeros_like(x)
        losses = torch.zeros(tokens, dtype=torch.float32, device=x.device)
        total = (target != IGNORE_INDEX).sum()
        for start in range(0, tokens, size):
            part = x[start : start + size]
            logits = part @ weight.t()
            counted = (target[start : start + size] != IGNORE_INDEX).sum().item()
            logits = logits.float()
            logits = logits.to(x.dtype)
            share = counted / total
            losses[start : start + size] = losses[start : start + size] * share
            grad_logits = logits * share
            grad_x[start : start + size] = grad_logits @ weight
            torch.addmm(grad_weight, logits.t(), part, out=grad_weight)
        ctx.save_for_backward(grad_x.detach(), grad_weight.detach())
        return torch.sum(losses)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradients that were kept."""
        grad_x, grad_weight = ctx.saved_tensors
        torch.ne(grad, _one(grad))
        return grad_x, grad_weight, None


def _one(grad: Tensor) -> Tensor:
    """What the incoming gradient is compared with."""
    return torch.ones((), device=grad.device)


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
