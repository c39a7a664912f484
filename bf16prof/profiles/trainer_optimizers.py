"""The optimizer that the Hugging Face Trainer makes where the DeepSpeed JSON has none
(`trainer_optimizers.toml`)."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from bf16prof.errors import InputError, Refused
from bf16prof.profiles.assumed import ASSUMED
from bf16prof.profiles.load import Override
from bf16prof.profiles.shipped import shipped_table
from bf16prof.profiles.training_args import DEFAULTS, Told, TrainingArguments

NUMBERS = {"lr": "learning_rate", "eps": "adam_epsilon", "weight_decay": "weight_decay"}
"""Settings of the optimizer, and the field of TrainingArguments that says them."""


@functools.cache
def trainer_optimizers() -> Mapping[str, Mapping[str, Any]]:
    """The rows by the Trainer's name."""
    return shipped_table("trainer_optimizers.toml")


def modelled() -> list[str]:
    """The names that are modelled."""
    return [name for name, row in trainer_optimizers().items() if "settings" in row]


def optimizer_overrides(optim: Told, args: TrainingArguments | None) -> list[Override]:
    """The profile's `[optimizer]` as the Trainer's optimizer of that name.

    Raises `InputError` for a name that the Trainer does not have, and `Refused` with the reason for
    one that is not modelled.
    """
    row = trainer_optimizers().get(optim.value)
    if row is None:
        raise InputError(f"{optim.origin}: unknown optimizer {optim.value!r:.60}", hint="modelled: " + ", ".join(modelled()))
    if "settings" not in row:
        raise Refused(f"{optim.origin}: {optim.value} is not modelled: {row['why']}", hint="modelled: " + ", ".join(modelled()))
    table = {"type": "AdamW", "from_trainer": True, **row["settings"]}
    return [Override("optimizer", table, optim.origin), *number_overrides(args)]


def trainers_choice(flag: str | None, args: TrainingArguments | None) -> Told:
    """The name of the Trainer's optimizer: the flag's, else that of the training arguments, else
    the Trainer's default."""
    if flag is not None:
        return Told(flag, "--optim")
    said = args.get("optim") if args else None
    return said or Told(DEFAULTS["optim"], f"{ASSUMED}the Trainer's default ({DEFAULTS['optim']})")


def number_overrides(args: TrainingArguments | None) -> list[Override]:
    """Learning rate, betas and the like as the training arguments say them; no byte depends on
    them."""
    if args is None:
        return []
    found = [(key, args.get(name)) for key, name in NUMBERS.items()]
    overrides = [Override(f"optimizer.{key}", told.value, told.origin) for key, told in found if told]
    betas = [args.get("adam_beta1"), args.get("adam_beta2")]
    if any(betas):
        origin = next(told.origin for told in betas if told)
        values = [told.value if told else default for told, default in zip(betas, (0.9, 0.999), strict=True)]
        overrides.append(Override("optimizer.betas", values, origin))
    return overrides
