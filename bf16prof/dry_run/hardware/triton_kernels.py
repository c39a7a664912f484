"""Triton's kernels in a dry run: they are not launched, and the Python around them, which allocates
all memory, runs as on a GPU.

Liger-Kernel asks a tensor for the type of its device, which is "cpu" here, and chooses other code
then. Its modules are compiled once more with "cuda" in the place of that question; nothing else of
them changes.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from bf16prof.profiles.gpus import Gpu
from bf16prof.reductions import processor_of

LIGER = "liger_kernel.ops."


@contextlib.contextmanager
def triton_kernels(gpu: Gpu) -> Iterator[None]:
    """On a GPU of that kind; put back at the end. Nothing where Liger-Kernel has not been
    imported."""
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(LIGER) and getattr(module, "__file__", None)]
    if not modules:
        yield
        return
    processor, (major, minor) = processor_of(gpu), gpu.compute_capability
    properties = SimpleNamespace(
        name=gpu.id,
        major=major,
        minor=minor,
        total_memory=gpu.memory_bytes,
        multi_processor_count=processor.multiprocessors,
        max_threads_per_multi_processor=processor.threads,
        warp_size=32,
    )
    with contextlib.ExitStack() as stack:
        interface = importlib.import_module("triton.runtime.jit").KernelInterface
        stack.enter_context(mock.patch.object(interface, "__getitem__", lambda kernel, grid: _not_launched))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda *_: properties))
        stack.enter_context(mock.patch.object(torch, "equal", _equal))
        for module in modules:
            stack.enter_context(_as_on_a_gpu(module))
            if hasattr(module, "infer_device_arch"):
                stack.enter_context(mock.patch.object(module, "infer_device_arch", lambda *_: _architecture(gpu)))
        yield


def _not_launched(*_: Any, **__: Any) -> None:
    """What a kernel does to memory that is there, no dry run has to know."""


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Liger asks whether the gradient of the loss is 1, and else multiplies in place, which takes
    no memory. What the question itself takes: aten/src/ATen/native/cuda/Equal.cpp."""
    torch.eq(one, other).all()
    return True


ARCHITECTURES = {7: "volta_turing", 8: "ampere_ada", 9: "hopper", 10: "blackwell"}
"""What Liger calls them by the major compute capability (`liger_kernel/utils.py`)."""


def _architecture(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability
    return ARCHITECTURES.get(major, f"sm_{major}{minor}")


class _OnCuda(ast.NodeTransformer):
    """`x.device.type` becomes "cuda"."""

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """Replace it, wherever it stands."""
        self.generic_visit(node)
        if node.attr == "type" and isinstance(node.value, ast.Attribute) and node.value.attr == "device":
            return ast.copy_location(ast.Constant("cuda"), node)
        return node


@contextlib.contextmanager
def _as_on_a_gpu(module: ModuleType) -> Iterator[None]:
    """The functions of a module, compiled from its source as on a GPU; a class keeps its identity,
    and asks these functions."""
    path = Path(str(module.__file__))
    tree = _OnCuda().visit(ast.parse(path.read_text(encoding="utf-8")))
    plain: list[ast.stmt] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.decorator_list]
    namespace = module.__dict__
    names = [node.name for node in plain if isinstance(node, ast.FunctionDef)]
    before = {name: namespace[name] for name in names}
    exec(compile(ast.Module(plain, []), str(path), "exec"), namespace)
    try:
        yield
    finally:
        namespace.update(before)
