"""A file of TrainingArguments: what it says of the workload, the precision and the optimizer, each
value with the key it came from.

LLaMA-Factory's, TRL's, axolotl's and accelerate's files hold the same fields, some under other
names; whatever else they hold is named as not used. What the Trainer would take where the file says
nothing is `DEFAULTS` (transformers 5.24, training_args.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bf16prof.errors import InputError
from bf16prof.profiles.assumed import ASSUMED, TRAINERS_OPTIMIZER
from bf16prof.profiles.plain import read_yaml_object


@dataclass(frozen=True)
class Told:
    """A value, and who said it: a flag, a key of a file, or a rule."""

    value: Any
    origin: str


def _count(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str) or not 0 < int(value) < 2**40:
        raise ValueError
    return int(value)


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return float(value)


def _switch(value: object) -> bool:
    text = str(value).lower()
    if text not in ("true", "false", "auto"):
        raise ValueError
    return text != "false"


def _switch_if_said(value: object) -> bool:
    """`fp16: auto` beside `bf16: auto` is axolotl's: bf16 where the GPU has it, as all GPUs of the
    table have that train these models."""
    return _switch(value) and str(value).lower() != "auto"


def _strategy(value: object) -> str:
    """YAML reads a bare `no` as false."""
    return "no" if value is False else _name(value)


def _name(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError
    return value


def _stage(value: object) -> int:
    if str(value) not in ("0", "1", "2", "3"):
        raise ValueError
    return int(str(value))


def _names(value: object) -> Any:
    """`all` is LLaMA-Factory's word for every linear layer; names stand in a list, or in one text
    with commas."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name.strip() for name in names):
        raise ValueError
    return "all-linear" if names in (["all"], ["all-linear"]) else [name.strip() for name in names]


Reader = Callable[[object], Any]
EXPECTED: Mapping[Reader, str] = {
    _count: "a whole number above 0",
    _number: "a number",
    _switch: "true or false",
    _switch_if_said: "true or false",
    _name: "a name",
    _strategy: "no, steps or epoch",
    _stage: "0, 1, 2 or 3",
    _names: "names of layers",
}
SWITCHES = (_switch, _switch_if_said)
FREE = ("learning_rate", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay")
"""Fields that no byte depends on."""

FIELDS: Mapping[str, tuple[Reader, tuple[str, ...]]] = {
    "micro_batch_size": (_count, ("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size")),
    "gradient_accumulation_steps": (_count, ("gradient_accumulation_steps",)),
    "sequence_length": (_count, ("max_seq_length", "max_length", "cutoff_len", "sequence_len", "model_max_length")),
    "activation_checkpointing": (_switch, ("activation_checkpointing", "gradient_checkpointing")),
    "use_reentrant": (_switch, ("use_reentrant",)),
    "checkpoint_every_n_layers": (_count, ("every_n_layers",)),
    "gradient_clipping": (_number, ("max_grad_norm", "gradient_clipping")),
    "bf16": (_switch, ("bf16", "bf16_full_eval")),
    "fp16": (_switch_if_said, ("fp16", "fp16_full_eval")),
    "mixed_precision": (_name, ("mixed_precision",)),
    "optim": (_name, ("optim", "optimizer")),
    "learning_rate": (_number, ("learning_rate",)),
    "adam_beta1": (_number, ("adam_beta1",)),
    "adam_beta2": (_number, ("adam_beta2",)),
    "adam_epsilon": (_number, ("adam_epsilon",)),
    "weight_decay": (_number, ("weight_decay",)),
    "zero_stage": (_stage, ("zero_stage",)),
    "offload_optimizer_device": (_name, ("offload_optimizer_device",)),
    "offload_param_device": (_name, ("offload_param_device",)),
    "zero_init": (_switch, ("zero3_init_flag",)),
    "eval_strategy": (_strategy, ("eval_strategy", "evaluation_strategy")),
    "do_eval": (_switch, ("do_eval",)),
    "per_device_eval_batch_size": (_count, ("per_device_eval_batch_size", "eval_batch_size", "per_gpu_eval_batch_size")),
    "eval_accumulation_steps": (_count, ("eval_accumulation_steps",)),
    "use_liger": (_switch, ("use_liger_kernel", "enable_liger_kernel")),
    "load_in_4bit": (_switch, ("load_in_4bit",)),
    "quantization_bit": (_count, ("quantization_bit",)),
    "bnb_4bit_quant_type": (_name, ("bnb_4bit_quant_type", "quantization_type")),
    "bnb_4bit_use_double_quant": (_switch, ("bnb_4bit_use_double_quant", "use_bnb_nested_quant", "double_quantization")),
    "lora_r": (_count, ("lora_r", "lora_rank")),
    "lora_alpha": (_number, ("lora_alpha",)),
    "lora_dropout": (_number, ("lora_dropout",)),
    "lora_targets": (_names, ("lora_target_modules", "lora_target")),
}
"""What is read, by our name of it: how, and the keys that say it."""

DEFAULTS: Mapping[str, Any] = {
    "micro_batch_size": 8, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0, "bf16": False, "fp16": False,
    "optim": TRAINERS_OPTIMIZER, "per_device_eval_batch_size": 8,
}  # fmt: skip
"""TrainingArguments' own, where the file does not say the field."""

ACCELERATE = ("deepspeed_config", "distributed_type", "compute_environment")
"""Keys by which accelerate's file is known, which says nothing of the batch."""

METHODS: Mapping[str, Sequence[object]] = {
    "finetuning_type": ("lora",), "adapter": ("lora", "qlora"), "train_type": ("lora",), "use_peft": (True,),
}  # fmt: skip
"""Keys by which such files ask for LoRA, and how (LLaMA-Factory's, axolotl's, ms-swift's,
TRL's)."""

OF_FOUR_BITS = ("load_in_4bit", "quantization_bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")

NEEDED_OF_AN_ADAPTER = ("lora_r", "lora_targets")
"""What has a default of its own in every such program, so it has to be said."""

INNER = ("deepspeed_config", "activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
"""Tables of such files, whose keys are read as well."""


@dataclass(frozen=True)
class TrainingArguments:
    """What a file of TrainingArguments says.

    * `told`: by our name of the field. `unused`: the keys of the file that were not read.
    * `is_trainers`: the Trainer's defaults stand for what is not said.
    """

    origin: str
    told: Mapping[str, Told] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    is_trainers: bool = True

    def get(self, name: str) -> Told | None:
        """What the file says of a field; `None` if nothing."""
        return self.told.get(name)

    def effective(self, name: str) -> Told | None:
        """What the Trainer takes: the file's, else its own default."""
        if name in self.told or not self.is_trainers or name not in DEFAULTS:
            return self.told.get(name)
        return Told(DEFAULTS[name], f"{ASSUMED}the Trainer's default ({FIELDS[name][1][0]}={DEFAULTS[name]})")

    @property
    def adapter(self) -> Told | None:
        """The table `[peft]` that the file means."""
        keys = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "target_modules": "lora_targets"}
        table = {key: self.told[name].value for key, name in keys.items() if name in self.told}
        return Told(table, self.told["lora_r"].origin) if table else None

    @property
    def quantization(self) -> Mapping[str, Told]:
        """The table `[quantization]` that the file means, by its keys: nf4 with double
        quantization, unless it says otherwise."""
        asked = next((told for name in OF_FOUR_BITS[:2] if (told := self.told.get(name)) and told.value in (True, 4)), None)
        if asked is None:
            return {}
        usual = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        return {name: self.told.get(name, Told(value, f"{ASSUMED}QLoRA's, {name}={value}")) for name, value in usual.items()}

    @property
    def evaluation(self) -> Mapping[str, Told]:
        """The table `[workload.evaluation]` that the file means, by its keys; none where nothing is
        evaluated.

        Without `compute_metrics`, which no file says, the Trainer keeps losses alone.
        """
        strategy, wanted = self.told.get("eval_strategy"), self.told.get("do_eval")
        if not (strategy and strategy.value != "no") and not (wanted and wanted.value):
            return {}
        found = {name: self.effective(name) for name in ("per_device_eval_batch_size", "eval_accumulation_steps")}
        return {name: told for name, told in found.items() if told is not None}

    @property
    def precision(self) -> Mapping[str, Told]:
        """Whether the Trainer trains in `bf16` and in `fp16`, as far as it is known."""
        if mixed := self.told.get("mixed_precision"):
            return {"bf16": Told(mixed.value in ("bf16", "fp8"), mixed.origin), "fp16": Told(mixed.value == "fp16", mixed.origin)}
        found = {name: self.effective(name) for name in ("bf16", "fp16")}
        return {name: told for name, told in found.items() if told is not None}

    @property
    def says_precision(self) -> bool:
        """Whether the file itself does."""
        return any(name in self.told for name in ("mixed_precision", "bf16", "fp16"))


def read_training_args(path: Path) -> TrainingArguments:
    """Read a JSON or YAML file. Raises `InputError` naming the file and the field that cannot be
    used."""
    content, origin = read_yaml_object(path), str(path)
    inner = {name: table for name in INNER if isinstance(table := content.get(name), Mapping)}
    tables = [("", content), *((f"{name}.", table) for name, table in inner.items())]
    told: dict[str, Told] = {}
    used = set(inner)
    for name, (read, keys) in FIELDS.items():
        found = {f"{prefix}{key}": table[key] for key in keys for prefix, table in tables if key in table}
        used |= set(found)
        said = {key: value for key, value in found.items() if value is not None and (value != "auto" or read in SWITCHES)}
        readings = {key: _read(read, value, f"{origin}: {key}", name in FREE) for key, value in said.items()}
        values = [Told(value, f"{origin}: {key}") for key, value in readings.items() if value is not None]
        if values:  # of two switches that mean one, such as bf16 and bf16_full_eval, the one that is on
            told[name] = next((each for each in values if each.value is True), values[0])
    _check(told, origin)
    method = next((key for key, words in METHODS.items() if content.get(key) in words), None)
    if method and all(name in told for name in NEEDED_OF_AN_ADAPTER):
        used.add(method)
        dropped = [] if any(told[name].value in (True, 4) for name in OF_FOUR_BITS[:2] if name in told) else list(OF_FOUR_BITS)
    else:
        dropped = [name for name in FIELDS if name.startswith("lora_") or name in OF_FOUR_BITS]
    told = {name: each for name, each in told.items() if name not in dropped}
    used -= {f"{prefix}{key}" for name in dropped for key in FIELDS[name][1] for prefix, _ in tables}
    unused = [f"{prefix}{key}" for prefix, table in tables for key in table if f"{prefix}{key}" not in used]
    return TrainingArguments(origin, told, tuple(unused), not any(key in content for key in ACCELERATE))


def _read(read: Reader, value: object, place: str, is_free: bool) -> Any:
    """The value; `None` of one that cannot be read and that memory does not depend on."""
    try:
        return read(value)
    except (ValueError, OverflowError):
        if is_free:
            return None
        raise InputError(f"{place}: expected {EXPECTED[read]}, got {value!r:.60}") from None


def _check(told: Mapping[str, Told], origin: str) -> None:
    mixed = told.get("mixed_precision")
    if mixed and mixed.value not in ("no", "bf16", "fp16", "fp8"):
        raise InputError(f"{mixed.origin}: expected no, bf16 or fp16, got {mixed.value!r:.60}")
    if all(name in told and told[name].value for name in ("bf16", "fp16")):
        raise InputError(f"{origin}: bf16 and fp16 are both true; the Trainer takes one of them")
