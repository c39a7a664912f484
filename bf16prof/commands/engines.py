"""What a request for another engine than DeepSpeed means: which commands answer it, and what it
takes where nobody says."""

from __future__ import annotations

from typing import Any

from bf16prof.commands.flags import Asked
from bf16prof.engine.megatron.settings import PACKAGE, STAGES
from bf16prof.errors import InputError
from bf16prof.profiles.schema import Profile
from bf16prof.records import MemoryRecord

ANSWERING = ("estimate", "simulate", "measure")
"""Commands that know what megatron-core holds."""

OF_DEEPSPEED = ("ds_config", "training_args", "optim")
"""Flags that are about DeepSpeed, and the Trainer over it."""


def check_engine(asked: Asked[Any], profile: Profile) -> None:
    """Raise `InputError` for a command, or a flag, that knows no other engine than DeepSpeed."""
    if not profile.is_for_megatron:
        return
    if asked.command not in ANSWERING:
        raise InputError(
            f"engine megatron-core: {asked.command} is about DeepSpeed only", hint=f"{', '.join(ANSWERING)} know what megatron-core holds"
        )
    if getattr(asked.flags, "calibrate", None) is not None:
        raise InputError("--calibrate: the work of a step is not counted for megatron-core")
    for flag in OF_DEEPSPEED:
        if getattr(asked.flags, flag) is not None:
            raise InputError(f"{asked.origin(flag)}: says what DeepSpeed is to do, and --engine is megatron-core")


def is_on_megatron(record: MemoryRecord) -> bool:
    """Whether a record is about megatron-core."""
    return record.workload is not None and record.workload.engine == PACKAGE


def usual_zero(profile: Profile, default: Any) -> Any:
    """The stages that are looked at where nobody named any: of megatron-core those that it has."""
    return ",".join(map(str, STAGES)) if profile.is_for_megatron else default


def usual_recipe(profile: Profile, default: Any) -> Any:
    """The recipes that are looked at where nobody named any: of megatron-core all that it runs,
    which is what no name at all means (`cases.expand`)."""
    return "" if profile.is_for_megatron else default
