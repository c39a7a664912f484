"""`auto` in a DeepSpeed JSON, resolved as the Hugging Face Trainer and accelerate resolve it.

References: transformers 5.24 `integrations/deepspeed.py` (HfTrainerDeepSpeedConfig:
trainer_config_process, trainer_config_finalize), accelerate 1.15 `utils/dataclasses.py`
(DeepSpeedPlugin) and `accelerator.py` (_prepare_deepspeed), DeepSpeed 0.19.8
`runtime/config_utils.py` (DeepSpeedConfigModel, which drops what is `auto`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bf16prof.profiles.assumed import ASSUMED
from bf16prof.profiles.features import AUTO, documented_key
from bf16prof.profiles.hidden_size import HiddenSize
from bf16prof.profiles.training_args import Told, TrainingArguments

MICRO, ACCUMULATION, TRAIN = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"
PRECISIONS = ("bf16.enabled", "fp16.enabled")

FROM_HIDDEN_SIZE: Mapping[str, tuple[Callable[[int], int], str]] = {
    "zero_optimization.reduce_bucket_size": (lambda hidden: hidden * hidden, "hidden_size * hidden_size"),
    "zero_optimization.stage3_prefetch_bucket_size": (lambda hidden: int(0.9 * hidden * hidden), "0.9 * hidden_size * hidden_size"),
    "zero_optimization.stage3_param_persistence_threshold": (lambda hidden: 10 * hidden, "10 * hidden_size"),
}

FROM_ACCELERATE: Mapping[str, tuple[str, Any]] = {
    "zero_optimization.stage": ("zero_stage", 2),
    "zero_optimization.offload_optimizer.device": ("offload_optimizer_device", "none"),
    "zero_optimization.offload_param.device": ("offload_param_device", "none"),
}
"""Keys that accelerate fills in: the field of its file, and what it takes without."""

DROPPED = ("zero_optimization.", "bf16.", "fp16.")
"""Tables in which DeepSpeed drops what is `auto` and takes its default."""

TYPE: Mapping[str, str] = {
    MICRO: "--micro-batch-size N",
    TRAIN: "--micro-batch-size N",
    ACCUMULATION: "--gradient-accumulation-steps N",
    **dict.fromkeys(PRECISIONS, "--recipe NAME, as bf16-fp32-master"),
    **{key: f"--set deepspeed.{key}=N" for key in FROM_HIDDEN_SIZE},
}
"""What to type for what stays open."""


@dataclass(frozen=True)
class Answers:
    """What there is to resolve `auto` from.

    * `hidden_size`: of the model, asked only where it is needed. `flags`: the values of flags by
      our name (`micro_batch_size`, ...).
    * `args`: the training arguments. `recipe`: what named a precision recipe, if anything did.
    * `searched`: what the command itself chooses, of `micro_batch_size` and `recipe`: nothing of
      that stays open.
    """

    hidden_size: Callable[[], HiddenSize | None] = lambda: None
    flags: Mapping[str, Told] = field(default_factory=dict)
    args: TrainingArguments | None = None
    recipe: str = ""
    searched: frozenset[str] = frozenset()

    def told(self, name: str) -> Told | None:
        """What flags, else the training arguments say of a value; else the Trainer's default where
        the Trainer is known to run."""
        return self.flags.get(name) or (self.args.effective(name) if self.args else None)


@dataclass
class Resolution:
    """A DeepSpeed JSON without `auto`: what it says now, by which rule, and what nobody could
    say."""

    content: dict[str, Any]
    rules: dict[str, str] = field(default_factory=dict)
    """By dotted key."""
    open: dict[str, str] = field(default_factory=dict)
    """What to type, by dotted key."""
    notes: list[str] = field(default_factory=list)


def resolve(content: Mapping[str, Any], answers: Answers) -> Resolution:
    """Resolve every `auto` of a DeepSpeed JSON. A key whose value follows from other keys, or from
    the command, is left out."""
    found = Resolution(copy.deepcopy(dict(content)))
    keys = list(_autos(content))
    for key in keys:
        _resolve(key, keys, answers, found)
    return found


def _autos(table: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in table.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{prefix}{name}.")
        elif value == AUTO or (isinstance(value, list) and AUTO in value):
            yield f"{prefix}{name}"


def _resolve(key: str, autos: list[str], answers: Answers, found: Resolution) -> None:
    if told := answers.flags.get(f"deepspeed.{documented_key(key)}"):
        _set(found, key, None, told.origin)  # which lies over the file
    elif key in FROM_HIDDEN_SIZE:
        _from_hidden_size(key, answers, found)
    elif key in (MICRO, ACCUMULATION, TRAIN):
        _batch(key, autos, answers, found)
    elif key in PRECISIONS:
        _precision(key, autos, answers, found)
    elif key == "gradient_clipping":
        told = answers.told("gradient_clipping") or Told(1.0, f"{ASSUMED}the Trainer's and accelerate's default (1.0)")
        _set(found, key, told.value, told.origin)
    elif key in FROM_ACCELERATE:
        name, default = FROM_ACCELERATE[key]
        told = (answers.args and answers.args.get(name)) or Told(default, f"{ASSUMED}accelerate's default ({default})")
        _set(found, key, told.value, told.origin)
    elif key.startswith(DROPPED):
        _set(found, key, None, "")
        found.notes.append(f"{key}: nothing fills in this auto; DeepSpeed itself drops it and takes its default")
    else:
        found.open[key] = "write the value"


def _from_hidden_size(key: str, answers: Answers, found: Resolution) -> None:
    size = answers.hidden_size()
    if size is None:
        found.open[key] = TYPE[key]
        return
    rule, words = FROM_HIDDEN_SIZE[key]
    _set(found, key, rule(size.value), f"{words} (hidden_size {size.value}" + (f", {size.key})" if size.key != "hidden_size" else ")"))


def _batch(key: str, autos: list[str], answers: Answers, found: Resolution) -> None:
    """Batch sizes: what is left out is derived from the two others on each number of ranks, as
    DeepSpeed does."""
    name = {MICRO: "micro_batch_size", ACCUMULATION: "gradient_accumulation_steps"}.get(key, "")
    told = answers.told(name) if name else None
    is_derived = key == MICRO and isinstance(found.content.get(TRAIN), int)
    if key == TRAIN:
        _train_batch(MICRO in autos, answers, found)
    elif told is not None:
        _set(found, key, told.value, told.origin)
    elif is_derived:
        _set(found, key, None, f"{TRAIN} / ({ACCUMULATION} * ranks)")
    elif key == ACCUMULATION:
        _set(found, key, *_accumulation(found))
    else:
        _set(found, key, None, "chosen by the command")
        if "micro_batch_size" not in answers.searched:
            found.open[key] = TYPE[key]


def _train_batch(is_micro_auto: bool, answers: Answers, found: Resolution) -> None:
    """The batch of the whole job, from which DeepSpeed derives the micro-batch where the file does
    not name that at all."""
    told = answers.told("micro_batch_size")
    _set(found, TRAIN, None, f"{MICRO} * {ACCUMULATION} * ranks")
    if is_micro_auto or found.content.get(MICRO) is not None:
        if is_micro_auto and told is None and "micro_batch_size" not in answers.searched:
            found.open[TRAIN] = TYPE[TRAIN]
    elif told is not None:
        found.content[MICRO] = told.value
        found.rules[MICRO] = f"{TRAIN} / ({ACCUMULATION} * ranks), {told.origin}"
    elif "micro_batch_size" not in answers.searched:
        found.open[TRAIN] = TYPE[TRAIN]


def _accumulation(found: Resolution) -> tuple[int | None, str]:
    """Nobody says it: it follows from the other two where both are numbers, else it is the
    Trainer's default."""
    if all(isinstance(found.content.get(key), int) for key in (TRAIN, MICRO)):
        return None, f"{TRAIN} / ({MICRO} * ranks)"
    return 1, f"{ASSUMED}the Trainer's default (gradient_accumulation_steps=1)"


def _precision(key: str, autos: list[str], answers: Answers, found: Resolution) -> None:
    told = answers.args.precision.get(key.partition(".")[0]) if answers.args else None
    (other,) = set(PRECISIONS) - {key}
    if answers.recipe:
        _set(found, key, None, answers.recipe)
    elif told is not None:
        _set(found, key, told.value, told.origin)
    elif _get(found.content, other) is True and other not in autos:
        _set(found, key, False, f"{other} is true, and DeepSpeed takes one of the two")
    else:
        _set(found, key, None, "chosen by the command")
        if "recipe" not in answers.searched:
            found.open[key] = TYPE[key]


def _get(content: Mapping[str, Any], key: str) -> object:
    """The value of a dotted key."""
    value: object = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _set(found: Resolution, key: str, value: object, rule: str) -> None:
    """Put a value in the place of `auto`; `None` takes the key out."""
    table_name, _, last = key.rpartition(".")
    table: Any = _get(found.content, table_name) if table_name else found.content
    if value is None:
        del table[last]
    else:
        table[last] = value
    if rule:
        found.rules[key] = rule
