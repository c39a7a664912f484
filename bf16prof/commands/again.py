"""The next command to type: the same model and data, for another command."""

from __future__ import annotations

import shlex
from typing import Any

from bf16prof.commands import options as o
from bf16prof.commands.flags import Asked

TRAINED_FLAGS = (
    "hf_config", "model", "engine", "ds_config", "training_args", "optim", "sequence_length", "lora", "load_in_4bit", "liger", "fused_loss",
    "packed_sequences", "dpo", "reward", "eval_batch_size", "sp", "tp", "pp", "ep",
)  # fmt: skip
"""Flags that say what is trained, and that no plan decides."""


def what_is_trained(asked: Asked[Any]) -> list[str]:
    """The flags that say what is trained, as they were given."""
    given, values = asked.flags, asked.given()
    said = [] if given.subject is None else [str(given.subject)]
    has_model = any(values[name] is not None for name in ("subject", "hf_config", "model"))
    if not has_model or given.profile != o.DEFAULT_PROFILE:
        said += ["--profile", str(given.profile)]
    for name in TRAINED_FLAGS:
        if values[name] is not None:
            said += _flag(name, values[name])
    return said + [part for text in given.set_ or () for part in ("--set", text)]


def how_it_runs(asked: Asked[Any]) -> list[str]:
    """The flags that say how the case is run, as they were given, for a command that takes the
    same."""
    values = {name: value for name, value in asked.given().items() if asked.is_named(name) and value is not None}
    said: list[str] = []
    for name in ("micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "zero_init"):
        said += _flag(name, values[name]) if name in values else []
    return said + ["--expandable-segments"] * bool(values.get("expandable_segments"))


def _flag(name: str, value: object) -> list[str]:
    flag = name.replace("_", "-")
    return [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]


def next_command(command: str, asked: Asked[Any], *flags: str) -> str:
    """`next: bf16prof COMMAND ...` with what is trained and these flags."""
    return f"next: {shlex.join(['bf16prof', command, *what_is_trained(asked), *flags])}"
