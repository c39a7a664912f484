"""What a command's flags mean together: a profile with everything laid over it, and the cases over
that.

From below: the profile, the training script's arguments, the user's DeepSpeed JSON, another model,
`--set`, the flags of the workload. A variable stands for its flag.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from bf16prof.cases import Job, Refusal, Selection, expand, fills_groups
from bf16prof.commands.engines import check_engine, usual_recipe, usual_zero
from bf16prof.commands.flags import COMMANDLINE, DEFAULT, Asked, CaseFlags, WorkloadFlags
from bf16prof.commands.options import Numbers, Words, numbers, words
from bf16prof.commands.output import hint
from bf16prof.commands.trainer import Trainer, answers, numbers_beside, read_trainer, script_overrides, trainer_notes
from bf16prof.engine.constraints import admit
from bf16prof.errors import InputError
from bf16prof.models.naming import model_name
from bf16prof.parallelism import FLAGS
from bf16prof.profiles.adapters import read_lora
from bf16prof.profiles.assumed import ASSUMED
from bf16prof.profiles.ds_config import BatchSizes, DeepSpeedFile, read_ds_config
from bf16prof.profiles.gpus import Gpu
from bf16prof.profiles.hub import configuration, is_cached, is_there
from bf16prof.profiles.load import Override, Resolved, load_profile, parse_set, preset_model, preset_names
from bf16prof.profiles.names import is_same, matches, unknown
from bf16prof.profiles.recipes import DS_CONFIG
from bf16prof.profiles.schema import Profile
from bf16prof.profiles.shipped import preset_ids
from bf16prof.vocabulary import Device, Offload

WORKLOAD_FLAGS = (
    "sequence_length", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "zero_init", "liger",
    "packed_sequences", "dpo", "reward",
)  # fmt: skip
"""Flags that stand for keys of the profile's `[workload]`."""

INNER_FLAGS = {"eval_batch_size": "evaluation.per_device_eval_batch_size"}
"""Flags that stand for keys of tables in `[workload]`."""

FUSED_LOSSES = {"liger": ("workload.liger", "loss"), "tiled": ("workload.fused_loss", "tiled")}
"""What `--fused-loss` stands for: a key of the profile, and its value."""

REFUSED_LOSSES = {
    "cce": "what the package index has as cut-cross-entropy is a copy of Apple's, of January 2025, without the part that puts it on models "
    "of transformers, and the number of tokens that it works on depends on their values; liger holds no whole logits either",
}
"""Losses that people ask for, and why they are not among these."""

PARALLEL_FLAGS = {flag.removeprefix("--"): name for name, flag in FLAGS.items()}
"""Flags that stand for keys of the profile's `[parallel]`."""

BATCH_FLAGS = WORKLOAD_FLAGS[1:3]


@dataclass(frozen=True)
class Request:
    """What the user asked for: a profile with the origin of each value, and the cases over it as
    far as flags or a DeepSpeed JSON say them.

    `any_gpus`: numbers of GPUs are not the user's own, so those are left out that the JSON's batch
    sizes or shared sequences do not fit.
    """

    resolved: Resolved
    zero: Numbers
    recipe: Words
    offload: Offload | None
    batch: BatchSizes | None = None
    any_gpus: bool = False
    file: DeepSpeedFile | None = None
    notes: tuple[str, ...] = ()
    """What is to be said of the user's files, once nothing is refused."""

    @property
    def profile(self) -> Profile:
        """What is trained."""
        return self.resolved.profile


def read_request(asked: Asked[CaseFlags]) -> Request:
    """The request of a command that has cases. Stages and recipes that the user named win over
    those of a DeepSpeed JSON."""
    given = asked.flags
    named = {key: asked.is_named(key) for key in ("zero", "recipe")}
    named["gpus"] = asked.is_named("gpus") or asked.is_named("ranks")  # of measure
    if named["recipe"] and not words(given.recipe):
        raise InputError("--recipe: expected names, as fp32,bf16-full")
    if DS_CONFIG in words(given.recipe):
        raise InputError(f"--recipe {DS_CONFIG}: leave --recipe out: the file of --ds-config says the precision")
    ours, trainer = [*_model(asked), *_overrides(asked)], read_trainer(asked)
    file = _read_file(asked, trainer, ours, named["recipe"])
    script = script_overrides(trainer, file)
    given_by_file = [*file.overrides, *numbers_beside(trainer, file)] if file else []
    resolved = _with_defaults_of_flags(asked, _resolve(asked, [*script, *given_by_file, *ours]))
    check_engine(asked, resolved.profile)
    notes = (*(file.notes if file else ()), *trainer_notes(trainer, file))
    recipe = given.recipe if named["recipe"] else trainer.recipe or usual_recipe(resolved.profile, given.recipe)
    if file is None:
        stage = trainer.args.get("zero_stage") if trainer.args else None
        zero = given.zero if named["zero"] else str(stage.value) if stage else usual_zero(resolved.profile, given.zero)
        return Request(resolved, zero, recipe, given.offload, any_gpus=not named["gpus"], notes=notes)
    zero, recipe = given.zero if named["zero"] else str(file.stage), given.recipe if named["recipe"] else file.recipe
    batch = _batch(file, resolved.profile, {override.key for override in ours})
    return Request(resolved, zero, recipe, given.offload, batch, any_gpus=not named["gpus"], file=file, notes=notes)


def _read_file(asked: Asked[CaseFlags], trainer: Trainer, ours: list[Override], is_recipe_named: bool) -> DeepSpeedFile | None:
    """The user's DeepSpeed JSON, its `auto` resolved from flags, training arguments and the
    model."""
    path = asked.flags.ds_config
    if path is None:
        return None
    recipe = asked.origin("recipe") if is_recipe_named else ""
    known = answers(asked, trainer, ours, recipe, lambda: _model_only(asked, ours))
    return read_ds_config(path, precision=not is_recipe_named, answers=known)


def _model_only(asked: Asked[CaseFlags], ours: list[Override]) -> Resolved:
    """The profile with the user's model, whatever else is said."""
    return _resolve(asked, [override for override in ours if override.key.split(".")[0] in ("name", "description", "model")])


def say_notes(request: Request, quiet: bool) -> None:
    """Say on stderr what is to be said of the user's files."""
    for note in request.notes:
        hint(f"note: {note}", quiet)


def _resolve(asked: Asked[CaseFlags], overrides: list[Override]) -> Resolved:
    """The profile under the overrides: the one that the user named; where they named a whole model
    instead, none at all; else the command's default, which counts as assumed. A model without a
    name of its own is called by its type and size.
    """
    name, is_named = _profile(asked)
    if not is_named and any(override.key in WHOLE_MODELS for override in overrides):
        name = None
    found = load_profile(name, overrides)
    origins = found.origins if is_named or name is None else {**found.origins, "profile": f"{ASSUMED}{name}, for none was named"}
    if found.profile.name:
        return Resolved(found.profile, origins)
    return Resolved(found.profile.model_copy(update={"name": model_name(found.profile.model)}), origins)


WHOLE_MODELS = ("model", "model.hf_config", "model.factory")
"""Keys that name a model with all its sizes, so that nothing of a preset has to lie under them."""


def _with_defaults_of_flags(asked: Asked[CaseFlags], resolved: Resolved) -> Resolved:
    """The same with what was assumed because a flag of the case was left out: the GPU."""
    gpu = asked.flags.assumed_gpu
    if not gpu or asked.source("gpu") != DEFAULT:
        return resolved
    assumed = {"GPU": f"{ASSUMED}{gpu}, for none was named"}
    return dataclasses.replace(resolved, origins={**resolved.origins, **assumed})


def resolve_profile(asked: Asked[WorkloadFlags], name: str) -> Resolved:
    """A profile with the flags of a command that has no cases laid over it, and where each value
    came from."""
    return load_profile(name, _overrides(asked))


def select(request: Request, *, gpus: Numbers, device: Device, gpu: Gpu | None) -> tuple[list[Job], list[Refusal]]:
    """The jobs that their engine runs, and the refusals of the others.

    Raises `InputError` for values that cannot be read and `Refused` when no case is left. A recipe
    that nobody asked for by name and that no case admits is passed over in silence, and so is a
    number of GPUs that the batch sizes do not fit.
    """
    from bf16prof.measuring.data import validate_spec

    validate_spec(request.profile.workload.data)
    recipes, stages, sizes = words(request.recipe), numbers("--zero", request.zero), numbers("--gpus", gpus)
    if request.any_gpus:
        sizes = [size for size in sizes if _fits(request, size)] or sizes
    assumed = request.resolved.assumed
    jobs = expand(Selection(request.profile, stages, sizes, recipes, device, gpu, request.offload, request.batch, assumed))
    admitted, refused = admit(jobs)
    if not recipes:
        possible = {job.case.recipe for job in admitted}
        refused = [r for r in refused if r.case.recipe in possible]
    return admitted, refused


def _fits(request: Request, ranks: int) -> bool:
    """Whether so many ranks can share the work as it is asked for."""
    parallel = request.profile.parallel
    return fills_groups(parallel, ranks) and (request.batch is None or request.batch.fit(ranks // parallel.counted_once))


def _overrides(asked: Asked[WorkloadFlags]) -> list[Override]:
    """What flags lay over the profile's values, from below."""
    given = asked.given()
    typed = [key for key in WORKLOAD_FLAGS if given[key] is not None]
    lora = asked.flags.lora
    return [
        *([Override("peft", read_lora(lora, asked.origin("lora")), asked.origin("lora"))] if lora is not None else []),
        *_quantization(asked),
        *_fused_loss(asked),
        *([Override("engine", engine, asked.origin("engine"))] if (engine := given.get("engine")) is not None else []),
        *(parse_set(text) for text in asked.flags.set_ or ()),
        *(Override(f"workload.{key}", given[key], asked.origin(key)) for key in typed),
        *(Override(f"workload.{key}", given[flag], asked.origin(flag)) for flag, key in INNER_FLAGS.items() if given[flag] is not None),
        *(Override(f"parallel.{key}", given[flag], asked.origin(flag)) for flag, key in PARALLEL_FLAGS.items() if given[flag] is not None),
    ]


def _fused_loss(asked: Asked[WorkloadFlags]) -> list[Override]:
    wanted = asked.flags.fused_loss
    if wanted is None:
        return []
    if wanted in REFUSED_LOSSES:
        raise InputError(f"--fused-loss {wanted}: {REFUSED_LOSSES[wanted]}")
    if wanted not in FUSED_LOSSES:
        raise InputError(f"--fused-loss {wanted!r:.60}: expected one of {', '.join(FUSED_LOSSES)}")
    key, value = FUSED_LOSSES[wanted]
    if key == "workload.liger" and asked.flags.liger not in (None, value):
        raise InputError(f"--fused-loss {wanted} is --liger {value}, and --liger {asked.flags.liger} is said too")
    return [Override(key, value, asked.origin("fused_loss"))]


def _quantization(asked: Asked[WorkloadFlags]) -> list[Override]:
    wanted = asked.flags.load_in_4bit
    if wanted is None:
        return []
    return (
        [Override("quantization.bnb_4bit_quant_type", "nf4", asked.origin("load_in_4bit"))]
        if wanted
        else [Override("quantization", None, asked.origin("load_in_4bit"))]
    )


def what(subject: str) -> str:
    """The flag whose value MODEL is: `profile`, `hf_config` or `model`. Raises `InputError` for
    what can be none of them."""
    if subject in preset_names() or subject.endswith(".toml"):
        return "profile"
    if is_there(subject) or subject.endswith(".json"):
        return "hf_config"
    if re.fullmatch(r"[\w.]+:[\w.]+", subject):
        return "model"
    ids = preset_ids()
    presets = matches(subject, ids)
    if presets and not is_same(subject, presets[0]):
        return "hf_config"  # a preset's id on the Hub: the cache comes first
    if presets:
        return "profile"
    if "/" in subject or is_cached(subject):
        return "hf_config"
    raise unknown("model", subject, ids, more="or a config.json, its folder, a profile (.toml), a Hugging Face id, MODULE:FUNCTION")


def _profile(asked: Asked[CaseFlags]) -> tuple[str | None, bool]:
    """The profile: MODEL where it is one, else that of `--profile`; and whether the user named
    it."""
    subject, profile = asked.flags.asked_model, asked.flags.profile
    if subject is None or what(subject) != "profile":
        return profile, asked.is_named("profile")
    if asked.source("profile") == COMMANDLINE:
        raise InputError(f"{subject} and --profile exclude each other: both are profiles")
    return str(subject), True


def _model(asked: Asked[CaseFlags]) -> list[Override]:
    """Another model in the place of the profile's, which is called after it. MODEL wins, and a flag
    over the variable of the other."""
    subject = asked.flags.asked_model
    flags = [key for key in ("hf_config", "model") if asked.source(key) == COMMANDLINE]
    if subject is not None and flags:
        raise InputError(f"{subject} and {asked.origin(flags[0])} exclude each other: there is one model")
    if subject is not None:
        key = what(subject)
        return [] if key == "profile" else _named_model(asked, key, subject, "MODEL")
    given = {key: value for key in ("hf_config", "model") if (value := getattr(asked.flags, key)) is not None}
    named = {key: value for key, value in given.items() if key in flags} or given
    if len(named) > 1:
        raise InputError(" and ".join(asked.origin(key) for key in named) + " exclude each other: there is one model")
    return [override for key, value in named.items() for override in _named_model(asked, key, value, asked.origin(key))]


def _named_model(asked: Asked[CaseFlags], key: str, value: Any, origin: str) -> list[Override]:
    if key == "model":
        name, setting = "", Override("model.factory", value, origin)
        own = [Override("workload.activation_checkpointing", False, origin)]  # what the function returns checkpoints for itself, or not
    else:
        found = configuration(str(value), download=asked.flags.download)
        name, own = "", []
        setting = Override("model.hf_config", str(found.path), origin)
        if found.preset:
            hint(f"note: {found.note}", quiet=asked.flags.quiet)
            name, setting = found.preset, Override("model", preset_model(found.preset), f"preset {found.preset}")
    return [Override("name", name, origin), Override("description", "", origin), setting, *own]


def _batch(file: DeepSpeedFile, profile: Profile, set_: set[str]) -> BatchSizes:
    """The batch sizes of the file, those that the user set in their place; where the file has none,
    the profile's micro-batch.

    With both of the others known, train_batch_size follows from them.
    """
    workload, batch = profile.workload, file.batch
    typed = {key for key in BATCH_FLAGS if f"workload.{key}" in set_}
    micro = workload.micro_batch_size if "micro_batch_size" in typed else batch.micro
    accumulation = workload.gradient_accumulation_steps if "gradient_accumulation_steps" in typed else batch.accumulation
    train = None if typed and micro is not None and accumulation is not None else batch.train
    if train is None and micro is None:
        micro = workload.micro_batch_size
    return BatchSizes(batch.origin, train, micro, accumulation)
