"""Nothing that a dry-run script wants saved is written, and no checkpoint or weights are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from bf16prof.dry_run.script.invented import Invented
from bf16prof.scripts.face.module import Row

ENGINE_SAVES = ("save_checkpoint", "save_16bit_model", "save_fp16_model", "save_universal_checkpoint")


def replacements(invented: Invented) -> Iterator[Row]:
    """All that is replaced in PyTorch and DeepSpeed."""
    from deepspeed import DeepSpeedEngine

    yield torch, "save", skipped(invented, "torch.save was skipped")
    for name in ENGINE_SAVES:
        if hasattr(DeepSpeedEngine, name):
            yield DeepSpeedEngine, name, skipped(invented, f"engine.{name} was skipped", True)
    yield (
        DeepSpeedEngine,
        "load_checkpoint",
        skipped(invented, "engine.load_checkpoint was skipped", (None, {})),
    )
    real_load = torch.load

    def load(file: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        return real_load(file, "cpu", *args, **kwargs)

    yield torch, "load", load


def skipped(invented: Invented, what: str, answer: Any = None) -> Callable[..., Any]:
    """A function that does nothing, and says so."""

    def skip(*_: Any, **__: Any) -> Any:
        invented.note(what, 2)
        return answer

    return skip
