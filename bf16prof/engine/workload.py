"""What was asked of a job, resolved: its workload as records carry it."""

from __future__ import annotations

from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.config import BasicOptimizer, engine_facts, handed_to_deepspeed, optimizer_settings, zero_settings
from bf16prof.engine.engines import engine_of
from bf16prof.profiles.models import HuggingFaceSettings, Model
from bf16prof.profiles.schema import Profile
from bf16prof.records import Workload


def workload_of(job: Job) -> Workload:
    """The workload of a job that its engine runs (`engine.constraints.admit`)."""
    settings, model = job.profile.workload, job.profile.model
    how = engine_of(job).words(job)
    return Workload(
        model=model.family,
        sequence_length=settings.sequence_length if takes_sequences(model) else None,
        micro_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation_steps,
        activation_checkpointing=settings.activation_checkpointing,
        attention=str(model.attention) if isinstance(model, HuggingFaceSettings) and model.attention else None,
        optimizer=how.optimizer,
        zero_init=job.is_inside_zero_init,
        keeps_outputs=settings.keeps_outputs,
        deepspeed=how.deepspeed,
        liger=settings.liger,
        tiled_mlp=settings.tiled_mlp,
        packed_sequences=settings.packed_sequences,
        dpo=settings.dpo,
        reward=settings.reward,
        fused_loss=settings.fused_loss,
        evaluation=settings.evaluation.words if settings.evaluation else None,
        adapter=_adapter(job.profile),
        engine=job.profile.engine,
        megatron=how.megatron,
        assumed=tuple(word for word in job.assumed if word not in _without_effect(job)),
    )


def _without_effect(job: Job) -> set[str]:
    """What is assumed of the profile and means nothing to this job, in the words of
    `profiles/assumed.py`."""
    of_deepspeed = {"buckets"} if job.profile.is_for_megatron else set()
    return of_deepspeed if job.is_inside_zero_init else of_deepspeed | {"zero.Init"}


def _adapter(profile: Profile) -> str | None:
    if profile.peft is None:
        return None
    return profile.peft.words + (f" over {profile.quantization.words}" if profile.quantization else "")


def takes_sequences(model: Model) -> bool:
    """Whether the length of a sequence changes what the model is called with."""
    return not model.inputs or any("sequence" in tensor.shape for tensor in model.inputs.values())


def optimizer_words(config: dict[str, Any]) -> str:
    """What updates the weights: "AdamW (FusedAdam)", "AdamW (torch, fused)", a library's class, or
    the name in the file."""
    facts, params = engine_facts(config), optimizer_settings(config)
    if facts.optimizer is BasicOptimizer.CLIENT and facts.layout is not None:
        return facts.layout.class_
    name = str(config["optimizer"].get("type"))
    if facts.optimizer is BasicOptimizer.OTHER:
        return name
    if facts.optimizer is BasicOptimizer.TORCH_ADAM:
        kernel = "fused" if params.get("fused") else "for each tensor" if params.get("foreach") is False else "foreach"
        return f"{name} (torch, {kernel})"
    return f"{name} ({facts.optimizer})"


def resolved(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as DeepSpeed is given it, with the defaults of ZeRO's keys that are
    known."""
    zero = {**zero_settings(config).model_dump(mode="json", by_alias=True), **config["zero_optimization"]}
    return {**handed_to_deepspeed(config), "zero_optimization": zero}
