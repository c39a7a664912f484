"""What a model is called when nobody named it: its type and size, as `llama-8.03B`; never the
folder that its file lies in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, Model
from bf16prof.rounding import short_count

WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
DEPTHS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
"""How Hugging Face configurations call the width and the number of layers."""


def model_name(model: Model) -> str:
    """`llama-8.03B` where the parameters can be counted without building the model, else
    `olmo2-4096x32` (width x layers), else the type.

    A model that a function makes is called after the function.
    """
    if isinstance(model, FactorySettings):
        return model.factory.rpartition(":")[2]
    try:
        return f"{model.family}-{short_count(sum(spec.numel for spec in inventory(model)))}"
    except NoInventory:
        return "-".join([model.family, *_extent(model)])


def _extent(model: Model) -> list[str]:
    config: Mapping[str, Any] = model.hf_config if isinstance(model, HuggingFaceSettings) else {}
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    found = [next((config[key] for key in keys if isinstance(config.get(key), int)), None) for keys in (WIDTHS, DEPTHS)]
    return [f"{found[0]}x{found[1]}"] if all(found) else []
