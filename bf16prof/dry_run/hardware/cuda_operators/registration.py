"""Registers CUDA's choice of operators for the simulated GPU, on the autograd key of the CPU, where
composite operators are still whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bf16prof.dry_run.hardware.cuda_operators.attention import attention
from bf16prof.dry_run.hardware.cuda_operators.fused import FUSED
from bf16prof.dry_run.hardware.cuda_operators.recurrent import RECURRENT, SHAPES
from bf16prof.dry_run.tracker import GPU

AUTOGRAD_KEY = "AutogradCPU"


def register_cuda_operators(capability: tuple[int, int]) -> torch.library.Library:
    """Register CUDA's operators for a GPU of that compute capability; they hold until the library
    that is returned is destroyed."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, run in {**FUSED, **RECURRENT, "scaled_dot_product_attention": attention(capability)}.items():
        library.impl(name, _on_the_gpu(overload(name), run), AUTOGRAD_KEY, allow_override=True)  # type: ignore[no-untyped-call]
    for name, shapes in SHAPES.items():
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "Meta"):
            library.impl(name, shapes, "Meta")  # type: ignore[no-untyped-call]
    return library


def overload(name: str) -> Any:
    """PyTorch's operator of that name, such as `softmax.int`; without a second part the default
    overload."""
    base, _, variant = name.partition(".")
    return getattr(getattr(torch.ops.aten, base), variant or "default")


def _on_the_gpu(operator: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run` for tensors on the simulated GPU; elsewhere, and where it declines, the operator as
    PyTorch composes it."""

    def call(*args: Any, **kwargs: Any) -> Any:
        out = run(*args, **kwargs) if args[0].device == GPU else NotImplemented
        if out is not NotImplemented:
            return out
        return operator._op_dk(torch._C.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)

    return call
