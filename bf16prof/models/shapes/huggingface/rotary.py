"""The buffers of rotary embeddings: the inverse frequencies, and a copy of them from which scaled
kinds start again.

transformers 5.23.0, `modeling_rope_utils.py` (ROPE_INIT_FUNCTIONS, RotaryEmbeddingConfigMixin) and
each model's own RotaryEmbedding. All kinds that are modelled have one frequency for every two of
the head's dimensions that are turned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bf16prof.models.shapes import NoInventory
from bf16prof.models.shapes.huggingface import BufferSpec
from bf16prof.models.shapes.huggingface.config import Config, shown
from bf16prof.rounding import ceil_div

KINDS = ("default", "linear", "llama3", "yarn", "longrope")
"""`dynamic` keeps a tensor more as soon as a sequence is longer than the model was made for."""

PARTIAL = "partial_rotary_factor"


def rotary(
    config: Config, head_width: int, module: str = "model.rotary_emb", *, share: object = None, by_default: bool = False, stored: str = ""
) -> list[BufferSpec]:
    """The buffers of a model whose layers all turn alike.

    * `share`: of the dimensions that are turned, where the configuration says nothing; all of them
      when absent.
    * `by_default`: whether the unscaled kind heeds the share as well, or turns all.
    * `stored`: the name under which the configuration may hold the share, where that is not
      transformers' own.
    """
    table = {**(config.table("rope_scaling") or config.table("rope_parameters"))}
    if any(isinstance(value, dict) for value in table.values()):
        raise NoInventory("model.hf_config.rope_parameters: one table per type of layer is not modelled here")
    table.setdefault(PARTIAL, config.values.get(stored or PARTIAL, share))
    kind = table.get("rope_type", table.get("type", "default"))
    turned = _turned(table, head_width) if by_default or kind != "default" else head_width
    return frequencies(kind, turned, f"{module}.")


def frequencies(kind: object, turned: int, prefix: str) -> list[BufferSpec]:
    """The buffers of one kind of rotary embedding that turns so many dimensions.

    `longrope` makes its long frequencies in the first step and keeps them as a plain attribute.
    """
    if kind not in KINDS:
        raise NoInventory(f"model.hf_config.rope_parameters.rope_type: {shown(kind)} is not modelled")
    if kind == "yarn" and turned % 2:
        raise NoInventory(f"model.hf_config.{PARTIAL}: yarn over an odd number of dimensions ({turned}) is not modelled")
    count = ceil_div(turned, 2)
    buffers = [BufferSpec(f"{prefix}inv_freq", count), BufferSpec(f"{prefix}original_inv_freq", count)]
    return [*buffers, BufferSpec(f"{prefix}long_inv_freq", count, is_registered=False)] if kind == "longrope" else buffers


def _turned(table: Mapping[str, Any], head_width: int) -> int:
    share = 1.0 if table[PARTIAL] is None else table[PARTIAL]
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        raise NoInventory(f"model.hf_config.{PARTIAL}: expected a share, got {shown(share)}")
    return int(head_width * share)
