"""The model of a script in the words of `estimate`'s flags, so that a closed form can stand beside
what was recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.scripts.workload import Calls, optimizer_words
from bf16prof.vocabulary import STRICT


@dataclass(frozen=True)
class Described:
    """A model of transformers by its configuration, and the optimizer by the Trainer's name for it.
    `why_not`: what has no such words."""

    __pydantic_config__ = STRICT

    hf_config: dict[str, Any] | None = None
    optim: str | None = None
    why_not: str = ""
    schema_version: int = SCHEMA_VERSION


def described(engine: Any, calls: Calls) -> Described:
    """What the engine trains, as far as `estimate` can be told."""
    optim, no_optimizer = _optimizer(engine)
    no_loss = "" if calls.has_labels else "the script computes the loss itself"
    if why_not := _other_than_configured(engine.module) or no_loss or no_optimizer:
        return Described(why_not=why_not)
    settings = engine.module.config
    asked = {"architectures": [type(engine.module).__name__], "_attn_implementation": getattr(settings, "_attn_implementation", None)}
    try:
        config = json.loads(json.dumps(settings.to_dict(), default=str, allow_nan=False))
    except (TypeError, ValueError):  # as time steps without end
        return Described(why_not="its configuration is no plain JSON")
    return Described(config | {key: value for key, value in asked.items() if value}, optim)


def _other_than_configured(model: Any) -> str:
    """Why a model is not what a configuration of transformers builds; empty if it is."""
    if not _is_of_transformers(model):
        return f"{type(model).__name__} is no model of transformers"
    if patched := _patched(model):
        return f"{patched} stands in the place of a module of transformers"
    return "some of its parameters are frozen" if any(not parameter.requires_grad for parameter in model.parameters()) else ""


def _is_of_transformers(model: Any) -> bool:
    return any(kind.__module__.startswith("transformers.") and kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def _patched(model: Any) -> str:
    """The first module that is neither of transformers nor of torch, by its class."""
    packages = ("transformers", "torch")
    return next((type(m).__name__ for m in model.modules() if type(m).__module__.partition(".")[0] not in packages), "")


def _optimizer(engine: Any) -> tuple[str | None, str]:
    """The Trainer's name for an optimizer that DeepSpeed's JSON does not name; and why there is
    none."""
    optimizer = getattr(engine, "basic_optimizer", None)
    if optimizer is not None and engine.optimizer_name():
        return None, ""
    kind = type(optimizer)
    if optimizer is None or kind.__module__.partition(".")[0] != "torch" or kind.__name__ != "AdamW":
        return None, f"its optimizer is {optimizer_words(engine)}"
    return ("adamw_torch_fused" if all(group.get("fused") for group in optimizer.param_groups) else "adamw_torch"), ""
