"""What a job means to megatron-core, and what it cannot ask of it. Imports no torch.

References are to megatron-core 0.16.1.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.config import BasicOptimizer, EngineFacts, Wrapper
from bf16prof.parallelism import FLAGS
from bf16prof.profiles.optimizers import all_optimizers
from bf16prof.vocabulary import Component, Device, Offload

PACKAGE = "megatron-core"

MODULE = "megatron.core.optimizer"
"""What imports all of it that is needed."""

STAGES = {0: "whole optimizer states on every rank", 1: "the distributed optimizer"}
"""What ZeRO stages stand for: 1 is the stage that the distributed optimizer is, with gradient
buffers whole on every rank."""


def settings_of(job: Job) -> dict[str, Any]:
    """The options that the job sets, by megatron-core's names; all others are as by default, so
    that nothing overlaps."""
    return {"use_distributed_optimizer": job.case.zero_stage == 1, **(job.recipe.megatron or {})}


def megatron_facts(job: Job) -> EngineFacts:
    """What megatron-core makes of a job: torch's AdamW where neither Transformer Engine nor Apex is
    installed, whose states are alike."""
    dtypes = job.recipe.dtypes
    return EngineFacts(
        wrapper=Wrapper.MEGATRON_DISTRIBUTED if job.case.zero_stage else Wrapper.MEGATRON,
        optimizer=BasicOptimizer.TORCH_ADAM,
        parameter_dtype=dtypes[Component.PARAMETERS],
        gradient_dtype=dtypes[Component.GRADIENTS],
        master_dtype=dtypes[Component.MASTER_PARAMETERS],
        layout=all_optimizers()[BasicOptimizer.TORCH_ADAM],
        communication_dtype=dtypes[Component.GRADIENTS],
        autocast_dtype="none",
        fused_kernel=False,
    )


def megatron_optimizer_words(job: Job) -> str:
    """What updates the weights, in words."""
    return f"{job.profile.optimizer.type} ({Wrapper.MEGATRON_DISTRIBUTED if job.case.zero_stage else Wrapper.MEGATRON})"


def update_note(job: Job) -> tuple[str, ...]:
    """What Transformer Engine and Apex, whose FusedAdam updates in place, would change on a GPU."""
    if not job.profile.is_for_megatron or job.device is Device.CPU or _has_fused_adam():
        return ()
    return (
        f"the step is {PACKAGE}'s without Transformer Engine and Apex, which are not installed here: torch's AdamW makes temporaries, "
        "their FusedAdam none",
    )


def _has_fused_adam() -> bool:
    """Whether a module is there that megatron-core takes FusedAdam from. The index has another
    project by the name of apex."""
    return bool(find_spec("transformer_engine") or (find_spec("apex") and find_spec("apex.optimizers")))


def megatron_refusal(job: Job) -> str | None:
    """Why megatron-core cannot run this job as described, or nobody has held it against ranks;
    `None` if it runs."""
    profile, case = job.profile, job.case
    workload = profile.workload
    shared = next((flag for flag, ranks in _dimensions(job).items() if ranks > 1), "")
    reasons = {
        f"{PACKAGE} has no ZeRO stage {case.zero_stage}: {_stages()}": case.zero_stage not in STAGES,
        f"--offload is DeepSpeed's; {PACKAGE} keeps all on the device here": case.offload is not Offload.NONE,
        f"{shared} is DeepSpeed's; {PACKAGE} is run data parallel only": bool(shared),
        f"keys of a DeepSpeed JSON mean nothing to {PACKAGE}: leave --ds-config out": bool(profile.deepspeed.more),
        f"adapters and 4-bit weights are not run with {PACKAGE}": profile.peft is not None or profile.quantization is not None,
        f"preferences and rewards (--dpo, --reward) are not run with {PACKAGE}": workload.has_pairs,
        f"tiles (workload.tiled_mlp, --fused-loss tiled) are DeepSpeed's own modules, not {PACKAGE}'s": workload.tiled_mlp
        or workload.fused_loss != "none",
        f"evaluation (--eval-batch-size) is not run with {PACKAGE}": workload.evaluation is not None,
        f"{PACKAGE} makes its optimizer itself: leave optimizer.library out": bool(profile.optimizer.library),
    }
    return next((reason for reason, is_so in reasons.items() if is_so), None)


def _stages() -> str:
    return "; ".join(f"{stage} is {what}" for stage, what in STAGES.items())


def _dimensions(job: Job) -> dict[str, int]:
    case = job.case
    sizes = case.sequence_parallel, case.tensor_parallel, case.pipeline_parallel, case.expert_parallel
    return dict(zip(FLAGS.values(), sizes, strict=True))
