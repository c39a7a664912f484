"""What the Trainer and its arguments say of a job: what answers `auto`, what lies under the
DeepSpeed JSON, the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.commands.flags import Asked, CaseFlags
from bf16prof.errors import InputError
from bf16prof.profiles.auto import ACCUMULATION, Answers
from bf16prof.profiles.ds_config import DeepSpeedFile
from bf16prof.profiles.hidden_size import hidden_size
from bf16prof.profiles.load import Override, Resolved
from bf16prof.profiles.trainer_optimizers import number_overrides, optimizer_overrides, trainers_choice
from bf16prof.profiles.training_args import Told, TrainingArguments, read_training_args

WORKLOAD = (
    "micro_batch_size", "gradient_accumulation_steps", "sequence_length", "activation_checkpointing", "zero_init", "use_reentrant",
    "checkpoint_every_n_layers",
)  # fmt: skip
"""Keys of the profile's `[workload]` that training arguments say."""

OFFLOADS = {"offload_optimizer_device": "offload_optimizer", "offload_param_device": "offload_param"}
PRECISIONS = {"bf16": "bf16-fp32-master", "fp16": "fp16-fp32-master"}
"""The recipe that the Trainer's switch means under DeepSpeed."""

MOST_NAMES = 40
DECISIVE = (
    "adapter", "finetuning_type", "use_peft", "train_type", "lora_r", "lora_rank", "lora_target", "lora_target_modules",
    "use_rslora", "use_dora", "peft_use_rslora", "peft_use_dora", "lora_target_linear", "lora_modules_to_save", "additional_target",
    "load_in_4bit", "load_in_8bit", "quantization_bit", "attn_implementation", "flash_attn", "flash_attention", "sdp_attention",
    "liger_kernel_config", "tensor_parallel_size", "context_parallel_size", "sequence_parallel_size",
    "stage", "rl", "packing", "padding_free", "sample_packing", "bnb_4bit_quant_storage",
    "freeze_vision_tower", "unfrozen_parameters", "torch_compile", "fp8", "fsdp", "fsdp_config",
)  # fmt: skip
"""Keys of such files that change what is held, and that are not read."""


@dataclass(frozen=True)
class Trainer:
    """What the user says in the Trainer's words: the training arguments and `--optim`."""

    args: TrainingArguments | None = None
    optim: str | None = None

    @property
    def is_said_to_run(self) -> bool:
        """Whether the user speaks of it at all."""
        return self.args is not None or self.optim is not None

    @property
    def recipe(self) -> str:
        """The recipe that the training arguments name; empty where they leave it open."""
        if self.args is None or not self.args.says_precision:
            return ""
        return next((PRECISIONS[name] for name, told in self.args.precision.items() if told.value), "fp32")

    @property
    def notes(self) -> list[str]:
        """The keys of the file that are not used, those first that memory depends on."""
        if self.args is None:
            return []
        decisive = [name for name in self.args.unused if name.rpartition(".")[2] in DECISIVE]
        others = [name for name in self.args.unused if name not in decisive]
        said = {"not used, though memory depends on it": decisive, "not used": others}
        return [f"{self.args.origin}: {words}: {_listed(names)}" for words, names in said.items() if names]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(f"{name:.60}" for name in names[:MOST_NAMES]) + more


def read_trainer(asked: Asked[CaseFlags]) -> Trainer:
    """What the flags say of the Trainer. Raises `InputError` naming the file and the field that
    cannot be used."""
    path = asked.flags.training_args
    return Trainer(None if path is None else read_training_args(path), asked.flags.optim)


def answers(asked: Asked[CaseFlags], trainer: Trainer, flags: Sequence[Override], recipe: str, model: Callable[[], Resolved]) -> Answers:
    """What `auto` of a DeepSpeed JSON is resolved from. `recipe` says what named the recipes;
    `model` loads the profile's model."""
    told = {override.key.removeprefix("workload."): Told(override.value, override.origin) for override in flags}
    searched = {"micro_batch_size", "recipe"} if asked.command == "plan" else set()
    return Answers(lambda: hidden_size(model().profile.model), told, trainer.args, recipe, frozenset(searched))


def script_overrides(trainer: Trainer, file: DeepSpeedFile | None) -> list[Override]:
    """What the training script brings, which lies under the DeepSpeed JSON: the workload, and the
    optimizer where the JSON has none.

    Where the user does not speak of the Trainer, `profiles/assumed.py` knows whether it is its
    optimizer.
    """
    overrides = _workload(trainer.args, file)
    if file is not None and file.has_optimizer:
        if trainer.optim is not None:
            raise InputError(f"--optim: {file.batch.origin} has an optimizer, which the Trainer takes", hint="leave out one of the two")
        return overrides
    if not trainer.is_said_to_run:
        return overrides
    return [*overrides, *optimizer_overrides(trainers_choice(trainer.optim, trainer.args), trainer.args)]


def numbers_beside(trainer: Trainer, file: DeepSpeedFile | None) -> list[Override]:
    """Learning rate and the like that the JSON leaves to the training arguments by `auto`."""
    if file is None or not file.has_optimizer:
        return []
    params = (file.content.get("optimizer") or {}).get("params") or {}
    return [override for override in number_overrides(trainer.args) if params.get(override.key.rpartition(".")[2]) == "auto"]


def _workload(args: TrainingArguments | None, file: DeepSpeedFile | None) -> list[Override]:
    if args is None:
        return []
    found: dict[str, Told | None] = {f"workload.{name}": args.get(name) for name in WORKLOAD} | {"peft": args.adapter}
    found |= {f"quantization.{name}": told for name, told in args.quantization.items()}
    found |= {f"workload.evaluation.{name}": told for name, told in args.evaluation.items()}
    if (liger := args.get("use_liger")) and liger.value:
        found["workload.liger"] = Told("all", liger.origin)
    if file is None:
        found["deepspeed.gradient_clipping"] = args.get("gradient_clipping")
        found |= {f"deepspeed.zero_optimization.{table}.device": args.get(name) for name, table in OFFLOADS.items()}
    elif ACCUMULATION not in file.content:
        del found["workload.gradient_accumulation_steps"]  # accelerate takes DeepSpeed's, which is 1 (accelerator.py, _prepare_deepspeed)
    return [Override(key, told.value, told.origin) for key, told in found.items() if told is not None]


def trainer_notes(trainer: Trainer, file: DeepSpeedFile | None) -> list[str]:
    """What is to be said of the training arguments beside a DeepSpeed JSON."""
    notes = list(trainer.notes)
    said: Any = trainer.args and trainer.args.get("gradient_accumulation_steps")
    if file is not None and said and said.value != 1 and ACCUMULATION not in file.content:
        notes.append(f"{said.origin} is not used: {file.batch.origin} does not say it, and accelerate then takes DeepSpeed's default, 1")
    return notes
