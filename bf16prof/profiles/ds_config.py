"""A DeepSpeed JSON of the user's own, which *is* the DeepSpeed configuration: it takes the place of the profile's `[deepspeed]` table.

What the schema knows becomes values of the profile, so that predictions read it and flags can change it; all else goes to DeepSpeed as it
is (`deepspeed.more`). The ZeRO stage and the precision belong to the case, so they are told apart from the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bf16prof.errors import InputError
from bf16prof.profiles.explain import REASONS
from bf16prof.profiles.load import Override
from bf16prof.profiles.plain import read_json_object
from bf16prof.profiles.recipes import DS_CONFIG, runnable_recipes
from bf16prof.profiles.schema import DeepSpeedSettings, OptimizerSettings
from bf16prof.profiles.settings import short_dtype

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
LEFT_OUT = ("tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "autotuning", "memory_breakdown")
"""Blocks that write files, call out or measure on their own; none of them trains."""

TABLES = ("zero_optimization", "fp16", "bf16", "bfloat16", "torch_autocast", "data_types", "optimizer")
OFFLOADS = ("offload_optimizer", "offload_param")
AUTO_IS_A_VALUE = ("data_types.keep_in_fp32_modules", "pipeline.stages")
"""Keys where DeepSpeed itself knows what `auto` means."""

DECISIVE = {
    "fp16": ("enabled", "fp16_master_weights_and_grads"),
    "bf16": ("enabled", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "torch_autocast": ("enabled", "dtype"),
}
"""The keys that decide the dtypes, by block; the others tune."""

ADAMS = {"adam": "Adam", "adamw": "AdamW"}
OPTIMIZER_DEFAULTS = {"lr": 1e-3}
"""DeepSpeed's, where ours differ."""


@dataclass(frozen=True)
class BatchSizes:
    """DeepSpeed's three batch sizes as far as somebody gave them: of the job, of a rank, and the micro-steps of a step."""

    origin: str
    train: int | None = None
    micro: int | None = None
    accumulation: int | None = None

    def on(self, world_size: int) -> tuple[int, int]:
        """Micro-batch size and micro-steps on so many ranks, derived as DeepSpeed does (`_set_batch_related_parameters`).

        Raises `InputError` where DeepSpeed's own check would fail.
        """
        micro, accumulation = self.micro, self.accumulation
        if self.train is not None and micro is None:
            micro = self.train // world_size // (accumulation or 1)
        elif self.train is not None and micro is not None and accumulation is None:
            accumulation = self.train // micro // world_size
        micro, accumulation = micro or 0, 1 if accumulation is None else accumulation
        product = micro * accumulation * world_size
        if product == 0 or self.train not in (None, product):
            raise InputError(
                f"{self.origin}: train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size: "
                f"{self.train} != {micro} * {accumulation} * {world_size}",
                hint="choose another number of ranks, --micro-batch-size or --gradient-accumulation-steps",
            )
        return micro, accumulation

    def fit(self, world_size: int) -> bool:
        """Whether so many ranks can have them."""
        try:
            self.on(world_size)
        except InputError:
            return False
        return True


@dataclass(frozen=True)
class DeepSpeedFile:
    """A DeepSpeed JSON: what it says of the case (stage, recipe, batch sizes), and of the profile."""

    stage: int
    recipe: str
    batch: BatchSizes
    overrides: tuple[Override, ...]


def read_ds_config(path: Path, *, precision: bool = True) -> DeepSpeedFile:
    """Read the file; without `precision`, what it says of the dtypes is not taken over, because the user has named recipes.

    Raises `InputError` naming the file and the key that cannot be used.
    """
    content, origin = read_json_object(path), str(path)
    _refuse(content, origin)
    rest = {key: value for key, value in content.items() if key not in LEFT_OUT}
    batch = BatchSizes(origin, *(_count(rest.pop(key, None), key, origin) for key in BATCH_KEYS))
    rest |= {"zero_optimization": _zero(rest.get("zero_optimization"), origin)}
    stage = _stage(rest["zero_optimization"].pop("stage", 0), origin)
    recipe = _take_precision(rest, origin, precision)
    overrides = [*_optimizer(rest, origin), *_batch(batch)]
    known, more = known_keys(DeepSpeedSettings, _with_short_dtypes(rest))
    return DeepSpeedFile(stage, recipe, batch, (Override("deepspeed", {**known, "more": more}, origin), *overrides))


def known_keys(table: type[BaseModel], content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested keys that the schema has, without those that are null; and those that it does not have."""
    known: dict[str, Any] = {}
    unknown: dict[str, Any] = {}
    for key, value in content.items():
        field = next((f for name, f in table.model_fields.items() if key in (name, f.alias) and key != "more"), None)
        inner = field.annotation if field else None
        if field is None:
            unknown[key] = value
        elif isinstance(inner, type) and issubclass(inner, BaseModel) and isinstance(value, Mapping):
            known[key], rest = known_keys(inner, value)
            unknown |= {key: rest} if rest else {}
        elif value is not None:
            known[key] = value
    return known, unknown


def _refuse(content: Mapping[str, Any], origin: str) -> None:
    """Raise `InputError` for what no reader of this file could use."""
    if found := _auto(content):
        raise InputError(f"{origin}: {found}: 'auto' is filled in by the Hugging Face Trainer; write the value")
    if content.get("memory_breakdown"):
        raise InputError(f"{origin}: memory_breakdown: refused: {REASONS['deepspeed.memory_breakdown']}")
    for key in TABLES:
        if not (isinstance(content.get(key), dict | None) or (key == "zero_optimization" and isinstance(content[key], bool))):
            raise InputError(f"{origin}: {key}: expected an object, got {content[key]!r:.60}")


def _auto(content: object, key: str = "") -> str | None:
    """The dotted key of the first `auto`."""
    if isinstance(content, Mapping):
        inside = ((value, f"{key}.{name}") for name, value in content.items())
    elif isinstance(content, list):
        inside = ((value, f"{key}.{index}") for index, value in enumerate(content))
    else:
        return key.removeprefix(".") if content == "auto" and key.removeprefix(".") not in AUTO_IS_A_VALUE else None
    return next((found for value, name in inside if (found := _auto(value, name))), None)


def _count(value: object, key: str, origin: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40):
        return value
    raise InputError(f"{origin}: {key}: expected a whole number above 0, got {value!r:.60}")


def _stage(value: object, origin: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3:
        return value
    raise InputError(f"{origin}: zero_optimization.stage: expected 0, 1, 2 or 3, got {value!r:.60}")


def _zero(value: Any, origin: str) -> dict[str, Any]:
    """The ZeRO block in the form that is not deprecated, nothing in it on NVMe."""
    zero: dict[str, Any] = {"stage": int(value)} if isinstance(value, bool) else dict(value or {})
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, False):
            zero.setdefault(new, {"device": "cpu"})
    for key in OFFLOADS:
        if not isinstance(zero.get(key), dict | None):
            raise InputError(f"{origin}: zero_optimization.{key}: expected an object, got {zero[key]!r:.60}")
        if (zero.get(key) or {}).get("device") == "nvme":
            raise InputError(f"{origin}: zero_optimization.{key}.device: offloading to NVMe is not modelled; cpu is")
    return zero


def _take_precision(rest: dict[str, Any], origin: str, wanted: bool) -> str:
    """The recipe that the precision blocks are, whose decisive keys leave `rest` if a recipe says them (or if they are not wanted)."""
    if "bfloat16" in rest:  # DeepSpeed's old name
        rest.setdefault("bf16", rest.pop("bfloat16"))
    autocast = rest.get("torch_autocast") or {}
    if autocast.get("enabled") and short_dtype(autocast.get("dtype")) not in ("bf16", "fp16"):
        raise InputError(f"{origin}: torch_autocast.dtype: expected bfloat16 or float16, got {autocast.get('dtype')!r:.60}")
    found = _decisive(rest)
    recipe = next((id_ for id_, r in runnable_recipes().items() if r.is_json and _decisive(r.deepspeed or {}) == found), DS_CONFIG)
    if recipe != DS_CONFIG or not wanted:
        for block, keys in DECISIVE.items():
            rest[block] = {key: value for key, value in (rest.get(block) or {}).items() if key not in keys}
    for block in DECISIVE:
        if not rest.get(block):
            rest.pop(block, None)
    return recipe


def _decisive(blocks: Mapping[str, Any]) -> dict[str, object]:
    """What a configuration says of its dtypes, in one form."""
    found = {f"{block}.{key}": short_dtype(value) for block in DECISIVE for key, value in (blocks.get(block) or {}).items() if value}
    decisive = {f"{block}.{key}" for block, keys in DECISIVE.items() for key in keys}
    autocasts = found.get("torch_autocast.enabled")
    return {key: value for key, value in found.items() if key in decisive and (autocasts or key != "torch_autocast.dtype")}


def _optimizer(rest: dict[str, Any], origin: str) -> list[Override]:
    """The optimizer as `[optimizer]` if that can say it, else left in `rest`; in both cases in the place of the profile's."""
    block = rest.get("optimizer")
    if not block:
        rest.pop("optimizer", None)
        return []
    kind, params = ADAMS.get(str(block.get("type")).lower()), block.get("params") or {}
    of_torch = {"fused", "foreach"} & set(params) and not params.get("torch_adam")
    if kind is None or of_torch or set(block) - {"type", "params"} or set(params) - set(OptimizerSettings.model_fields):
        return [Override("optimizer", {}, origin)]
    del rest["optimizer"]
    return [Override("optimizer", {"type": kind, **OPTIMIZER_DEFAULTS, **params}, origin)]


def _batch(batch: BatchSizes) -> list[Override]:
    given = {"micro_batch_size": batch.micro, "gradient_accumulation_steps": batch.accumulation}
    return [Override(f"workload.{key}", value, batch.origin) for key, value in given.items() if value is not None]


def _with_short_dtypes(rest: dict[str, Any]) -> dict[str, Any]:
    """The same with dtypes called as profiles call them."""
    changed = dict(rest)
    if isinstance(name := rest.get("communication_data_type"), str):
        changed["communication_data_type"] = short_dtype(name.lower())
    types = rest.get("data_types") or {}
    if "grad_accum_dtype" in types:
        changed["data_types"] = {**types, "grad_accum_dtype": short_dtype(types["grad_accum_dtype"])}
    return changed
