"""What every table of a profile is made of: its base class, and the numbers and names that several
tables use."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: object) -> object:
    """5e8 is how DeepSpeed's documentation writes bucket sizes: a float without a fraction is a
    whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(gt=0, lt=2**40)]
Elements = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=sys.maxsize)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["fp32", "fp16", "bf16"]

DTYPE_NAMES = {
    "fp32": ("fp32", "float32", "torch.float32", "float"),
    "fp16": ("fp16", "float16", "torch.float16", "half"),
    "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
}
"""How DeepSpeed lets a dtype be called (`runtime/config.py`, DtypeEnum), by the name that profiles
use."""


def short_dtype(name: object) -> object:
    """`fp32`, `fp16` or `bf16` for any of DeepSpeed's names; whatever else it is, unchanged."""
    return next((short for short, names in DTYPE_NAMES.items() if name in names), name)


class Settings(BaseModel):
    """Base of all tables: frozen, strict about types, and closed to unknown keys. DeepSpeed's short
    names are read as well."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)
