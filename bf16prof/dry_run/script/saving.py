"""Nothing that a dry-run script wants saved is written, and no checkpoint or weights are read."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from bf16prof.dry_run.script.invented import Invented
from bf16prof.engine.nested import tensors_in
from bf16prof.scripts.face.module import Row

MOST_READ = 256 << 20
"""Bytes of a file whose tensors are read; a larger one holds weights."""

ENGINE_SAVES = ("save_checkpoint", "save_16bit_model", "save_fp16_model", "save_universal_checkpoint")


def replacements(invented: Invented) -> Iterator[Row]:
    """All that is replaced in PyTorch and DeepSpeed."""
    from deepspeed import DeepSpeedEngine

    yield from _files(invented)
    for name in ENGINE_SAVES:
        if hasattr(DeepSpeedEngine, name):
            yield DeepSpeedEngine, name, skipped(invented, f"engine.{name} was skipped", True)
    yield (
        DeepSpeedEngine,
        "load_checkpoint",
        skipped(invented, "engine.load_checkpoint was skipped", (None, {})),
    )


def _files(invented: Invented) -> Iterator[Row]:
    """`torch.save` and `torch.load`: what has values can be read again, as scripts do with samples
    that they have prepared."""
    real_save, real_load = torch.save, torch.load
    kept: dict[str, bytes] = {}

    def save(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        has_values = not any(isinstance(tensor, FakeTensor) for tensor in tensors_in(obj))
        is_file = isinstance(f, str | os.PathLike)
        if is_file or not has_values:
            invented.note("torch.save was skipped")
        if not has_values:
            return
        buffer = io.BytesIO()
        with _disable_current_modes(), contextlib.suppress(Exception):  # what cannot be kept is not kept
            real_save(obj, buffer, *args, **kwargs)
            if not is_file:  # memory of the script's own, as when it pickles a tensor
                f.write(buffer.getvalue())
            else:
                kept[str(Path(f).absolute())] = buffer.getvalue()

    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        has_values = True
        if isinstance(f, str | os.PathLike):
            written = kept.get(str(Path(f).absolute()))
            has_values = written is not None or (Path(f).is_file() and Path(f).stat().st_size <= MOST_READ)
            f = f if written is None else io.BytesIO(written)
        with _disable_current_modes() if has_values else contextlib.nullcontext():
            return real_load(f, "cpu", *args, **kwargs)

    yield torch, "save", save
    yield torch, "load", load


def skipped(invented: Invented, what: str, answer: Any = None) -> Callable[..., Any]:
    """A function that does nothing, and says so."""

    def skip(*_: Any, **__: Any) -> Any:
        invented.note(what, 2)
        return answer

    return skip
