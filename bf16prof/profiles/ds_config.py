"""A DeepSpeed JSON of the user's own, which *is* the DeepSpeed configuration: it takes the place of
the profile's `[deepspeed]` table.

What is off is left out and what is not modelled is refused (`features.py`), `auto` is resolved
(`auto.py`). What the schema then knows becomes values of the profile, so that predictions read it
and flags can change it; all else goes to DeepSpeed as it is (`deepspeed.more`). The ZeRO stage and
the precision belong to the case, so they are told apart from the rest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bf16prof.errors import InputError
from bf16prof.profiles.assumed import ASSUMED
from bf16prof.profiles.auto import ACCUMULATION, MICRO, PRECISIONS, TRAIN, Answers, Resolution, resolve
from bf16prof.profiles.features import AUTO, documented_key, features, sort_keys
from bf16prof.profiles.load import Override
from bf16prof.profiles.plain import read_hjson_object
from bf16prof.profiles.recipes import DS_CONFIG, runnable_recipes
from bf16prof.profiles.schema import DeepSpeedSettings, OptimizerSettings
from bf16prof.profiles.settings import short_dtype
from bf16prof.profiles.training_args import TrainingArguments

BATCH_KEYS = (TRAIN, MICRO, ACCUMULATION)
OFFLOADS = ("offload_optimizer", "offload_param")

NO_PARAMETERS_ON_NVME = (
    "parameters on NVMe are not modelled: which of their buffers are in use was not held against real ranks; cpu is, beside an optimizer "
    "on nvme"
)

DECISIVE = {
    "fp16": ("enabled", "fp16_master_weights_and_grads"),
    "bf16": ("enabled", "bf16_master_weights_and_grads", "bf16_optimizer_states"),
    "torch_autocast": ("enabled", "dtype"),
}
"""The keys that decide the dtypes, by block; the others tune."""

OLD_BF16 = "bfloat16"
ADAMS = {"adam": "Adam", "adamw": "AdamW"}
OPTIMIZER_DEFAULTS = {"lr": 1e-3}
"""DeepSpeed's, where ours differ."""


OPTIMIZERS = (*ADAMS, "adagrad", "lamb", "lion", "muon")
"""DeepSpeed's own, in any letters (`runtime/config.py`, DEEPSPEED_OPTIMIZERS); of torch.optim it
takes any by the exact name."""

TORCH_OPTIMIZERS = (
    "ASGD", "Adadelta", "Adafactor", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
)  # fmt: skip

NOT_MODELLED = {
    **dict.fromkeys(("onebitadam", "zerooneadam", "onebitlamb"), "DeepSpeed 0.19.8 has it no more"),
    **dict.fromkeys(("muadam", "muadamw", "musgd"), "the optimizers of the package mup are not modelled"),
    "lbfgs": "it calls the model several times in a step, which DeepSpeed does not do",
    "sparseadam": "gradients that are sparse are not modelled",
}


@dataclass(frozen=True)
class BatchSizes:
    """DeepSpeed's three batch sizes as far as somebody gave them: of the job, of a rank, and the
    micro-steps of a step."""

    origin: str
    train: int | None = None
    micro: int | None = None
    accumulation: int | None = None

    def on(self, world_size: int) -> tuple[int, int]:
        """Micro-batch size and micro-steps on so many ranks, derived as DeepSpeed does
        (`_set_batch_related_parameters`).

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
    """A DeepSpeed JSON: what it says of the case (stage, recipe, batch sizes), and of the profile.

    * `content`: as it was read, with every key that it has. `notes`: what is to be said of some of
      them.
    * `has_optimizer`: whether it names one; else the training script brings it.
    * `rules`: of the keys that were `auto`, how they were resolved.
    """

    stage: int
    recipe: str
    batch: BatchSizes
    overrides: tuple[Override, ...]
    content: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    has_optimizer: bool = False
    rules: Mapping[str, str] = field(default_factory=dict)


def read_ds_config(path: Path, *, precision: bool = True, answers: Answers | None = None) -> DeepSpeedFile:
    """Read the file; without `precision`, what it says of the dtypes is not taken over, because the
    user has named recipes.

    Raises `InputError` naming the file and every key that cannot be used: all that is not modelled,
    or all that stays `auto`.
    """
    content, origin = read_hjson_object(path), str(path)
    notes, found = _resolved(content, origin, _answers(answers, precision))
    _refuse_open(found.open, origin)
    rest = found.content
    batch = BatchSizes(origin, *(_count(rest.pop(key, None), key, origin) for key in BATCH_KEYS))
    rest |= {"zero_optimization": _zero(rest.get("zero_optimization"), origin)}
    stage = _stage(rest["zero_optimization"].pop("stage", 0), origin)
    notes += _ignore_offloaded_parameters(rest["zero_optimization"], stage, origin)
    recipe = _take_precision(rest, origin, precision)
    has_optimizer = bool(rest.get("optimizer"))
    overrides = [*_parallel(rest, origin), *_optimizer(rest, origin), *_batch(batch, found)]
    known, more = known_keys(DeepSpeedSettings, _with_short_dtypes(rest))
    table = Override("deepspeed", {**known, "more": more}, origin)
    resolved = [Override(f"deepspeed.{key}", _at(known, key), _origin(origin, found.rules[key])) for key in found.rules if _at(known, key)]
    return DeepSpeedFile(
        stage,
        recipe,
        batch,
        (table, *resolved, *overrides),
        content,
        tuple(f"{origin}: {note}" for note in notes),
        has_optimizer,
        found.rules,
    )


def ds_case(path: Path, *, precision: bool = True) -> tuple[int, str]:
    """Stage and recipe of a file that is read for nothing else. Raises `InputError` as
    `read_ds_config` does."""
    content, origin = read_hjson_object(path), str(path)
    _, found = _resolved(content, origin, _answers(None, precision))
    _refuse_open({key: how for key, how in found.open.items() if key in PRECISIONS}, origin)
    stage = _stage(_zero(found.content.get("zero_optimization"), origin).get("stage", 0), origin)
    return stage, _take_precision(found.content, origin, precision)


def _answers(answers: Answers | None, precision: bool) -> Answers:
    answers = answers or Answers()
    return answers if precision or answers.recipe else dataclasses.replace(answers, recipe="--recipe")


def _resolved(content: Mapping[str, Any], origin: str, answers: Answers) -> tuple[list[str], Resolution]:
    """The content without what is off and without `auto`, and what is to be said of it."""
    content = _with_new_names(content)
    _require_tables(content, origin)
    found = sort_keys(content)
    if found.refused:
        raise InputError(f"{origin}: refused: " + "; ".join(found.refused))
    kept = _with_arguments(found.kept, answers, origin)
    resolution = resolve(kept, answers)
    return [*found.notes, *resolution.notes], resolution


def _with_new_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """`bf16` for its old name, which DeepSpeed reads where the new one is absent
    (`runtime/precision_config.py`)."""
    renamed = {key: value for key, value in content.items() if key != OLD_BF16}
    if OLD_BF16 in content and content.get("bf16") is None:
        renamed["bf16"] = content[OLD_BF16]
    return renamed


def _refuse_open(keys: Mapping[str, str], origin: str) -> None:
    """Raise `InputError` for all keys whose `auto` nobody filled in, with what to type."""
    if not keys:
        return
    by_answer: dict[str, list[str]] = {}
    for key, how in keys.items():
        by_answer.setdefault(how, []).append(key)
    wanted = "; ".join(f"{', '.join(names)} ({how})" for how, names in by_answer.items())
    raise InputError(
        f"{origin}: 'auto' that the Hugging Face Trainer fills in, and that is not known here: {wanted}",
        hint="type what stands in brackets, or --training-args FILE with the Trainer's arguments",
    )


def _with_arguments(content: dict[str, Any], answers: Answers, origin: str) -> dict[str, Any]:
    """The content with the precision block that accelerate adds
    (`DeepSpeedPlugin.set_mixed_precision`).

    Raises `InputError` where the file and the training arguments differ, at which the Trainer
    stops.
    """
    args = answers.args
    if args is None:
        return content
    _refuse_mismatches(content, answers, args, origin)
    if args.is_trainers:
        _refuse_half_filled(content, answers, origin)
        content = _with_the_trainers_batch(content, answers)
    if answers.recipe or not args.says_precision:
        return content
    added = {name: {"enabled": True} for name, told in args.precision.items() if told.value and name not in content}
    return {**content, **added}


def _refuse_half_filled(content: Mapping[str, Any], answers: Answers, origin: str) -> None:
    """Raise `InputError` where the Trainer fills in the batch of the job with its micro-steps, and
    accelerate the micro-steps with one."""
    steps = answers.told(ACCUMULATION)
    if content.get(TRAIN) == AUTO and MICRO in content and ACCUMULATION not in content and steps and steps.value != 1:
        raise InputError(
            f"{origin}: {TRAIN} is filled in with {steps.value} micro-steps ({steps.origin}), and {ACCUMULATION}, which is not there, "
            "with 1: DeepSpeed stops where they differ",
            hint=f'add "{ACCUMULATION}": "auto"',
        )


def _with_the_trainers_batch(content: dict[str, Any], answers: Answers) -> dict[str, Any]:
    """The content with the micro-steps that accelerate adds, one (`DeepSpeedPlugin.__post_init__`);
    and where it fixes the batch of the whole job alone, with the micro-batch that the Trainer
    compares that with (`trainer_config_process`).
    """
    micro, steps = answers.told("micro_batch_size"), answers.told(ACCUMULATION)
    added: dict[str, Any] = {}
    if ACCUMULATION not in content:
        added[ACCUMULATION] = answers.flags[ACCUMULATION].value if ACCUMULATION in answers.flags else 1
    if micro and MICRO not in content and content.get(TRAIN) is not None:
        added[MICRO] = micro.value * (steps.value if steps and added else 1)
    return {**content, **added}


def _refuse_mismatches(content: Mapping[str, Any], answers: Answers, args: TrainingArguments, origin: str) -> None:
    if not args.is_trainers:
        return
    pairs = {MICRO: "micro_batch_size", ACCUMULATION: "gradient_accumulation_steps", "gradient_clipping": "gradient_clipping"}
    said = [(key, content.get(key), args.get(name)) for key, name in pairs.items() if name not in answers.flags]
    if not answers.recipe and args.says_precision:
        blocks = ((name, content.get(name)) for name in args.precision)
        said += [(f"{name}.enabled", block.get("enabled"), args.precision[name]) for name, block in blocks if isinstance(block, Mapping)]
    differ = [
        f"{key} is {value}, {told.origin} is {told.value}" for key, value, told in said if told and value not in (None, AUTO, told.value)
    ]
    if differ:
        raise InputError(f"{origin}: the Trainer stops where its arguments differ: " + "; ".join(differ), hint='write "auto" in the JSON')


def _follows(batch: BatchSizes) -> dict[str, str]:
    """Of the sizes that the file leaves out, the one that follows from train_batch_size, and the
    rule."""
    if batch.train is None or (batch.micro is not None and batch.accumulation is not None):
        return {}
    if batch.micro is None:
        return {MICRO: f"{TRAIN} / ({ACCUMULATION} * ranks)"}
    return {ACCUMULATION: f"{TRAIN} / ({MICRO} * ranks)"}


def _origin(file: str, rule: str) -> str:
    """Where a resolved value came from; what nobody gave is called assumed first of all."""
    return f"{rule}, {file}: auto" if rule.startswith(ASSUMED) else f"{file}: auto -> {rule}"


def _at(known: Mapping[str, Any], key: str) -> object:
    value: object = known
    for part in documented_key(key).split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def known_keys(table: type[BaseModel], content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Nested keys that the schema has, without those that are null; and those that it does not
    have."""
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


def _require_tables(content: Mapping[str, Any], origin: str) -> None:
    """Raise `InputError` for a key whose value must be an object, as DeepSpeed reads it, and is
    none."""
    for key in _tables():
        table, _, last = key.rpartition(".")
        above = _at(content, table) if table else content
        if isinstance(above, Mapping) and not isinstance(above.get(last), dict | None):
            if key == "zero_optimization" and isinstance(above[last], bool):
                continue
            raise InputError(f"{origin}: {key}: expected an object, got {above[last]!r:.60}")


def _tables() -> list[str]:
    parents = {key.rpartition(".")[0] for key in features()} | {key for key, row in features().items() if row.switch or row.closed}
    return [*sorted(parents - {""}), "scheduler"]


def _count(value: object, key: str, origin: str) -> int | None:
    if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**40):
        return value
    raise InputError(f"{origin}: {key}: expected a whole number above 0, got {value!r:.60}")


def _stage(value: object, origin: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 3:
        return value
    raise InputError(f"{origin}: zero_optimization.stage: expected 0, 1, 2 or 3, got {value!r:.60}")


def _zero(value: Any, origin: str) -> dict[str, Any]:
    """The ZeRO block in the form that is not deprecated, no parameters in it on NVMe."""
    zero: dict[str, Any] = {"stage": int(value)} if isinstance(value, bool) else dict(value or {})
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if zero.pop(old, False):
            zero.setdefault(new, {"device": "cpu"})
    if (zero.get("offload_param") or {}).get("device") == "nvme":
        raise InputError(f"{origin}: zero_optimization.offload_param.device: {NO_PARAMETERS_ON_NVME}")
    return zero


def _ignore_offloaded_parameters(zero: dict[str, Any], stage: int, origin: str) -> list[str]:
    """Leave out what DeepSpeed does not look at below stage 3, and say so."""
    if stage == 3 or (zero.get("offload_param") or {}).get("device", "none") == "none":
        return []
    del zero["offload_param"]
    return [f"zero_optimization.offload_param: DeepSpeed ignores it at stage {stage}; it offloads parameters at stage 3 only"]


def _take_precision(rest: dict[str, Any], origin: str, wanted: bool) -> str:
    """The recipe that the precision blocks are, whose decisive keys leave `rest` if a recipe says
    them (or if they are not wanted)."""
    autocast = rest.get("torch_autocast") or {}
    if autocast.get("enabled") and short_dtype(autocast.get("dtype")) not in ("bf16", "fp16"):
        raise InputError(f"{origin}: torch_autocast.dtype: expected bfloat16 or float16, got {autocast.get('dtype')!r:.60}")
    recipe = recipe_of(rest)
    if recipe != DS_CONFIG or not wanted:
        for block, keys in DECISIVE.items():
            rest[block] = {key: value for key, value in (rest.get(block) or {}).items() if key not in keys}
    for block in DECISIVE:
        if not rest.get(block):
            rest.pop(block, None)
    return recipe


def recipe_of(content: Mapping[str, Any]) -> str:
    """The id of the recipe that the precision blocks of a DeepSpeed configuration are."""
    found = _decisive(content)
    return next((id_ for id_, r in runnable_recipes().items() if r.is_json and _decisive(r.deepspeed or {}) == found), DS_CONFIG)


def _decisive(blocks: Mapping[str, Any]) -> dict[str, object]:
    """What a configuration says of its dtypes, in one form."""
    found = {f"{block}.{key}": short_dtype(value) for block in DECISIVE for key, value in (blocks.get(block) or {}).items() if value}
    decisive = {f"{block}.{key}" for block, keys in DECISIVE.items() for key in keys}
    autocasts = found.get("torch_autocast.enabled")
    return {key: value for key, value in found.items() if key in decisive and (autocasts or key != "torch_autocast.dtype")}


def _parallel(rest: dict[str, Any], origin: str) -> list[Override]:
    """How ranks share a batch, which leaves `rest`."""
    found = {"sequence": rest.pop("sequence_parallel_size", None)}
    if table := rest.pop("tensor_parallel", None):
        found["tensor"] = table.get("autotp_size")
        rest |= {"tensor_parallel": kept} if (kept := {key: value for key, value in table.items() if key != "autotp_size"}) else {}
    recomputed: list[Override] = []
    if table := rest.pop("pipeline", None):
        found["pipeline"], recomputed = table.get("stages"), _recomputed(table, origin)
        rest |= {"pipeline": kept} if (kept := {key: value for key, value in table.items() if key not in OF_STAGES}) else {}
    return [*(Override(f"parallel.{name}", size, origin) for name, size in found.items() if size is not None), *recomputed]


OF_STAGES = ("stages", "activation_checkpoint_interval", "use_reentrant")
"""Keys of the table `pipeline` that the profile has names for."""


def _recomputed(table: Mapping[str, Any], origin: str) -> list[Override]:
    """How many layers of a pipeline are recomputed together, none for 0; DeepSpeed's own default is
    reentrant (runtime/pipe/engine.py)."""
    interval = table.get("activation_checkpoint_interval")
    if interval is None:
        return []
    if not interval:
        return [Override("workload.activation_checkpointing", False, origin)]
    said = {
        "activation_checkpointing": True,
        "checkpoint_every_n_layers": interval,
        "use_reentrant": table.get("use_reentrant", True),
    }
    return [Override(f"workload.{key}", value, origin) for key, value in said.items()]


def _optimizer(rest: dict[str, Any], origin: str) -> list[Override]:
    """The optimizer as `[optimizer]` if that can say it, else left in `rest`; in both cases in the
    place of the profile's."""
    block = rest.get("optimizer")
    if not block:
        rest.pop("optimizer", None)
        return []
    if (type_ := block.get("type")) is not None:
        _require_optimizer(type_, origin)
    kind, params = ADAMS.get(str(block.get("type")).lower()), block.get("params") or {}
    of_torch = {"fused", "foreach"} & set(params) and not params.get("torch_adam")
    sayable = set(OptimizerSettings.model_fields) - {"from_trainer"}
    if kind is None or of_torch or set(block) - {"type", "params"} or set(params) - sayable:
        return [Override("optimizer", {}, origin)]
    del rest["optimizer"]
    return [Override("optimizer", {"type": kind, **OPTIMIZER_DEFAULTS, **params}, origin)]


def _require_optimizer(type_: object, origin: str) -> None:
    """Raise `InputError` for an optimizer that DeepSpeed cannot make, or that is not modelled."""
    small = str(type_).lower()
    if small not in OPTIMIZERS and type_ not in TORCH_OPTIMIZERS:
        known = ", ".join(["Adam", "AdamW", "Adagrad", "Lamb", "Lion", "Muon", *TORCH_OPTIMIZERS])
        why = NOT_MODELLED.get(small, "neither DeepSpeed nor torch.optim has it")
        raise InputError(f"{origin}: optimizer.type: {type_!r:.60}: {why}", hint=f"known: {known}")


def _batch(batch: BatchSizes, found: Resolution) -> list[Override]:
    """The sizes that the file gives; the value of one that follows from the others is only known
    with the number of ranks."""
    keys = {MICRO: ("micro_batch_size", batch.micro), ACCUMULATION: ("gradient_accumulation_steps", batch.accumulation)}
    follows, rules = _follows(batch), found.rules
    overrides = []
    for key, (name, value) in keys.items():
        origin = (
            _origin(batch.origin, rules[key]) if key in rules else f"{batch.origin}: {follows[key]}" if key in follows else batch.origin
        )
        if value is not None or key in follows:
            overrides.append(Override(f"workload.{name}", 1 if value is None else value, origin))
    return overrides


def _with_short_dtypes(rest: dict[str, Any]) -> dict[str, Any]:
    """The same with dtypes called as profiles call them."""
    changed = dict(rest)
    if isinstance(name := rest.get("communication_data_type"), str):
        changed["communication_data_type"] = short_dtype(name.lower())
    types = rest.get("data_types") or {}
    if "grad_accum_dtype" in types:
        changed["data_types"] = {**types, "grad_accum_dtype": short_dtype(types["grad_accum_dtype"])}
    return changed
