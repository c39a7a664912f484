"""The words that every other part speaks: components, phases, devices, verdicts, and sizes that
files are read into."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from annotated_types import Interval

from bf16prof.errors import InputError

Bytes = Annotated[int, Interval(gt=-(2**63), lt=2**63)]
"""A difference of bytes: what is free, saved, more, or came and went. Nothing that is held is a
`Bytes`."""

Size = Annotated[int, Interval(ge=0, lt=2**63)]
"""A number of bytes, parameters or steps, which cannot be negative (`require_size` where a value is
made, pydantic where it is read)."""

Amount = Annotated[float, Interval(ge=0)]
"""Seconds, watts, rates and shares: never negative."""

Share = Annotated[float, Interval(ge=0, le=1)]

STRICT: Any = {"extra": "forbid", "strict": True, "allow_inf_nan": False}
"""How a file is read into these dataclasses: no unknown field, no conversion, no NaN (see
`runs.py`)."""


class TooMuch(InputError, ValueError):
    """Sizes that were accepted one by one, and whose product nothing can hold."""


class Source(StrEnum):
    """Where a record comes from."""

    ESTIMATE = "estimate"
    SIMULATE = "simulate"
    MEASURE = "measure"
    IMPORT = "import"


class Component(StrEnum):
    """What bytes are for. The bytes of all components add up to the record's `allocated_bytes`."""

    PARAMETERS = "parameters"
    GRADIENTS = "gradients"
    MASTER_PARAMETERS = "master_parameters"
    MASTER_GRADIENTS = "master_gradients"
    MOMENTUM = "momentum"
    VARIANCE = "variance"
    COMPENSATION = "compensation"
    ACTIVATIONS = "activations"
    BUFFERS = "buffers"
    WORKSPACE = "workspace"
    ROUNDING = "rounding"
    OTHER = "other"


class Phase(StrEnum):
    """The parts of a training job whose peaks are told apart, in the order in which they happen."""

    INIT = "init"
    FORWARD = "forward"
    BACKWARD = "backward"
    STEP = "step"
    EVAL = "eval"


class Device(StrEnum):
    """The memory that a record is about: a GPU's caching allocator, or the CPU allocator of a gloo
    rank."""

    GPU = "gpu"
    CPU = "cpu"


class Offload(StrEnum):
    """What DeepSpeed keeps in host memory instead of on the device."""

    NONE = "none"
    OPTIMIZER = "optimizer"
    OPTIMIZER_AND_PARAMETERS = "optimizer+parameters"


class Verdict(StrEnum):
    """Whether a job fits its GPU (see `verdict.py`). Tight: the bytes fit, but what the caching
    allocator takes for them may not."""

    FITS = "fits"
    TIGHT = "tight"
    DOES_NOT_FIT = "does not fit"


Label = tuple[Component, str]
"""What a storage is for: its component, and the name under which it is listed."""

ROUNDED: Label = (Component.ROUNDING, "blocks rounded up by the allocator")
"""What the caching allocator adds to the bytes of storages that are not listed one by one."""


class Collective(StrEnum):
    """A kind of collective communication."""

    ALL_REDUCE = "all-reduce"
    REDUCE = "reduce"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_GATHER = "all-gather"
    ALL_TO_ALL = "all-to-all"
    SEND = "send"
    """From one rank to another."""


def require_size(name: str, size: int) -> None:
    """Raise `ValueError` for a number of bytes below zero, and `TooMuch` for more than any machine
    can address."""
    if size < 0:
        raise ValueError(f"{name}: {size:,} bytes")
    if size >= 2**63:
        raise TooMuch(f"{name}: {size:,} bytes are more than 2^63, which no machine has", hint="look at the sizes of model and workload")


TRAINING = (Phase.FORWARD, Phase.BACKWARD, Phase.STEP)
"""The phases of a step; init comes once, before them, and an evaluation between two of them."""
