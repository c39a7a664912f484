"""From what the user said to cases: the product of stages, world sizes and recipes over one
profile.

A `Job` is a case together with everything that its names stand for; sources take jobs and give
records.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.errors import InputError
from bf16prof.parallelism import FLAGS, MOST_RANKS
from bf16prof.profiles.ds_config import BatchSizes
from bf16prof.profiles.features import refusals
from bf16prof.profiles.gpus import Gpu
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.models import ModelSettings
from bf16prof.profiles.recipes import Recipe, find_recipe, megatron_recipes, require_runnable, runnable_recipes
from bf16prof.profiles.schema import ParallelSettings, Profile
from bf16prof.records import Case
from bf16prof.vocabulary import STRICT, Device, Offload

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Job:
    """One case with the profile and the recipe that it names, on the device it is predicted or
    measured for.

    `assumed`: what of it nobody said, in a word each.
    """

    case: Case
    profile: Profile
    recipe: Recipe
    device: Device
    gpu: Gpu | None = None
    assumed: tuple[str, ...] = ()

    @property
    def is_inside_zero_init(self) -> bool:
        """Whether the model is built inside `deepspeed.zero.Init`: where that is asked for, at
        stage 3.

        transformers builds no quantized model there (modeling_utils.py, `needs_zero3_init`).
        """
        return self.profile.workload.zero_init and self.case.zero_stage == 3 and self.profile.quantization is None


@dataclass(frozen=True)
class JobFile:
    """A job as another process reads it from a file: names for what ships with the package,
    everything else in full."""

    __pydantic_config__ = STRICT

    case: Case
    profile: dict[str, Any]
    device: Device
    gpu: Gpu | None = None
    assumed: tuple[str, ...] = ()
    schema_version: int = SCHEMA_VERSION

    @classmethod
    def of(cls, job: Job) -> JobFile:
        """The file of a job."""
        return cls(job.case, job.profile.model_dump(mode="json"), job.device, job.gpu, job.assumed)

    def job(self) -> Job:
        """The job again."""
        profile, recipe = Profile.model_validate(self.profile), find_recipe(self.case.recipe)
        return Job(self.case, profile, recipe, self.device, self.gpu, self.assumed)


@dataclass(frozen=True)
class Refusal:
    """A case that its engine would reject or silently spoil: why, and recipes that work in its
    place."""

    case: Case
    reason: str
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What the user selected. Empty `recipes` means: all that can run; `batch`, that each number of
    ranks derives its batch sizes; `assumed`, what nobody said (see `Job`).
    """

    profile: Profile
    stages: Sequence[int]
    world_sizes: Sequence[int]
    recipes: Sequence[str]
    device: Device
    gpu: Gpu | None = None
    offload: Offload | None = None
    batch: BatchSizes | None = None
    assumed: tuple[str, ...] = ()


def expand(selection: Selection) -> list[Job]:
    """All jobs of a selection, by stage, then world size, then recipe; where it names none, those
    that need nothing but DeepSpeed.

    Raises `InputError` for an unknown stage, world size or recipe, and `Refused` for a recipe that
    no engine runs.
    """
    check_profile(selection.profile)
    check_sizes(selection.stages, selection.world_sizes)
    for size in selection.world_sizes:
        _require_whole_groups(selection.profile.parallel, size)
    on_megatron = selection.profile.is_for_megatron
    named = [require_runnable(find_recipe(id_), on_megatron=on_megatron) for id_ in dict.fromkeys(selection.recipes)]
    usual = megatron_recipes().values() if on_megatron else [recipe for recipe in runnable_recipes().values() if recipe.is_json]
    chosen = named or list(usual)
    profile = _with_offload(selection.profile, selection.offload)
    sizes = dict.fromkeys(selection.world_sizes)
    is_asked = selection.offload is not None
    at = {stage: profile if is_asked or stage == 3 else _without_offloaded_parameters(profile) for stage in selection.stages}
    on = {(stage, size): _with_batch(at[stage], selection.batch, size) for stage, size in itertools.product(at, sizes)}
    digests = {key: workload_digest(chosen_profile) for key, chosen_profile in on.items()}
    return [
        Job(
            Case(
                profile.name,
                stage,
                size,
                recipe.id,
                offload_of(at[stage]),
                digests[stage, size],
                sequence_parallel=profile.parallel.sequence,
                tensor_parallel=profile.parallel.tensor,
                pipeline_parallel=profile.parallel.pipeline,
                expert_parallel=profile.parallel.expert,
            ),
            on[stage, size],
            recipe,
            selection.device,
            selection.gpu,
            selection.assumed,
        )
        for stage, size, recipe in itertools.product(at, sizes, chosen)
    ]


def check_sizes(stages: Sequence[int], world_sizes: Sequence[int]) -> None:
    """Raise `InputError` for a ZeRO stage or a number of ranks that there cannot be."""
    for stage in stages:
        if stage not in STAGES:
            raise InputError(f"--zero {stage}: the ZeRO stage is 0, 1, 2 or 3")
    for size in world_sizes:
        if not 1 <= size <= MOST_RANKS:
            raise InputError(f"--gpus {size}: expected a number of ranks from 1 to {MOST_RANKS}")


def fills_groups(parallel: ParallelSettings, world_size: int) -> bool:
    """Whether so many ranks can share the work like this, no group of them incomplete."""
    return world_size % parallel.shared == 0 and world_size // parallel.shared % parallel.expert == 0


def _require_whole_groups(parallel: ParallelSettings, world_size: int) -> None:
    """Raise `InputError` where a group would lack ranks (DeepSpeed:
    runtime/sequence_parallel/parallel_state_sp.py, utils/groups.py)."""
    if not fills_groups(parallel, world_size):
        group = parallel.shared * parallel.expert
        raise InputError(
            f"{'1 rank' if world_size == 1 else f'{world_size} ranks'} cannot be cut into groups of {group} that share a batch or experts "
            f"({', '.join(FLAGS.values())})",
            hint=f"use a multiple of {group}",
        )


def check_profile(profile: Profile) -> None:
    """Raise `InputError` unless the model's and the workload's sizes fit together, as far as that
    can be known without building it, and DeepSpeed is told to do nothing that is not modelled.
    """
    from bf16prof.models.shapes import inventory, require

    model = profile.model
    if isinstance(model, ModelSettings):
        inventory(model)
    elif not model.inputs:
        require(model.vocab_size > 0, "token ids need a vocabulary")
    if refused := refusals(profile.deepspeed.more):
        raise InputError(f"deepspeed.more: refused: {'; '.join(refused)}")
    key, longest = model.longest_sequence or ("", profile.workload.sequence_length)
    if profile.workload.sequence_length > longest:
        raise InputError(f"workload.sequence_length ({profile.workload.sequence_length}) is longer than {key} ({longest})")


def offload_of(profile: Profile) -> Offload:
    """What the profile's ZeRO settings keep in host memory."""
    zero = profile.deepspeed.zero_optimization
    if zero.offload_param.device != "none":
        return Offload.OPTIMIZER_AND_PARAMETERS
    return Offload.OPTIMIZER if zero.offload_optimizer.device != "none" else Offload.NONE


def _with_offload(profile: Profile, offload: Offload | None) -> Profile:
    """The profile with its offloading set as the user asked; as it is when nothing was asked. An
    optimizer that is offloaded to files stays there."""
    if offload is None:
        return profile
    zero = profile.deepspeed.zero_optimization
    is_kept = offload is not Offload.NONE and zero.offload_optimizer.device == "nvme"
    there = {"device": "none" if offload is Offload.NONE else "cpu", "nvme_path": None}
    optimizer = zero.offload_optimizer if is_kept else zero.offload_optimizer.model_copy(update=there)
    parameters = zero.offload_param.model_copy(update={"device": "cpu" if offload is Offload.OPTIMIZER_AND_PARAMETERS else "none"})
    changed = zero.model_copy(update={"offload_optimizer": optimizer, "offload_param": parameters})
    return profile.model_copy(update={"deepspeed": profile.deepspeed.model_copy(update={"zero_optimization": changed})})


def _without_offloaded_parameters(profile: Profile) -> Profile:
    """The profile as DeepSpeed reads it below stage 3, where it ignores `offload_param`."""
    zero = profile.deepspeed.zero_optimization
    if zero.offload_param.device == "none":
        return profile
    zero = zero.model_copy(update={"offload_param": zero.offload_param.model_copy(update={"device": "none"})})
    return profile.model_copy(update={"deepspeed": profile.deepspeed.model_copy(update={"zero_optimization": zero})})


def _with_batch(profile: Profile, batch: BatchSizes | None, world_size: int) -> Profile:
    """The profile with the batch sizes that a user's DeepSpeed JSON means on so many ranks."""
    if batch is None:
        return profile
    micro, accumulation = batch.on(world_size // profile.parallel.counted_once)
    workload = profile.workload.model_copy(update={"micro_batch_size": micro, "gradient_accumulation_steps": accumulation})
    return profile.model_copy(update={"workload": workload})
