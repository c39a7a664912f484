"""Which jobs have a closed form: a model that only the code of others can build, or a part of DeepSpeed that is not modelled, has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bf16prof.cases import Job
from bf16prof.engine.config import BasicOptimizer, EngineFacts, Wrapper, deepspeed_config, engine_facts, zero_settings
from bf16prof.estimate.steady import Engine
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.profiles.models import Model, ModelSettings
from bf16prof.profiles.recipes import DS_CONFIG
from bf16prof.profiles.schema import OptimizerSettings, ZeroSettings
from bf16prof.records import Device

WITHOUT_TENSORS: Mapping[str, frozenset[str]] = {
    "": frozenset({
        "scheduler", "optimizer", "zero_optimization", "steps_per_print", "wall_clock_breakdown", "dump_state", "comms_logger", "log_level",
        "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "activation_checkpointing", "aio", "checkpoint", "fp16",
        "disable_python_gc", "dataloader_drop_last", "timers", "vocabulary_size",
    }),
    "zero_optimization": frozenset({
        "stage3_gather_16bit_weights_on_model_save", "gather_16bit_weights_on_model_save", "stage3_gather_fp16_weights_on_model_save",
        "load_from_fp32_weights", "elastic_checkpoint", "override_module_apply", "log_trace_cache_warnings", "enable_sanity_checks",
        "pipeline_loading_checkpoint", "cpu_offload_use_pin_memory", "offload_optimizer", "offload_param",
    }),
    "zero_optimization.offload_optimizer": frozenset({
        "nvme_path", "buffer_count", "buffer_size", "pipeline_read", "pipeline_write", "fast_init",
    }),
    "zero_optimization.offload_param": frozenset({"nvme_path", "buffer_count", "buffer_size", "max_in_cpu"}),
    "fp16": frozenset({
        "auto_cast", "loss_scale", "initial_scale_power", "loss_scale_window", "hysteresis", "consecutive_hysteresis", "min_loss_scale",
    }),
}  # fmt: skip
"""Keys of DeepSpeed's JSON, by table, that profiles do not have and that allocate nothing between steps."""

ADAM_PARAMS = {*OptimizerSettings.model_fields, "adam_w_mode", "bias_correction"}


def closed_form_gap(job: Job) -> str | None:
    """Why this job has no closed form; `None` if it has one."""
    if gap := _model_gap(job.profile.model):
        return gap
    if job.recipe.id == DS_CONFIG:
        return "the DeepSpeed JSON describes a precision that is no recipe's"
    config = deepspeed_config(job)
    if engine_facts(config).optimizer is BasicOptimizer.OTHER:
        return f"the optimizer {config['optimizer'].get('type')!r:.60} is not modelled"
    params = sorted(set(config["optimizer"].get("params") or {}) - ADAM_PARAMS)
    unknown = [f"optimizer.params.{name}" for name in params] + _with_tensors(job.profile.deepspeed.more)
    if job.case.zero_stage == 3 and zero_settings(config).zero_hpz_partition_size > 1:
        unknown.append("zero_optimization.zero_hpz_partition_size")
    return f"DeepSpeed's {unknown[0]:.120} is not modelled" if unknown else None


def _model_gap(model: Model) -> str | None:
    """Why it is not known what this model holds, or what the training loop keeps of what it returns."""
    if model.inputs:
        return "what a model with [model.inputs] returns is not known"
    try:
        inventory(model)
    except NoInventory as error:
        return error.message
    return None


def _with_tensors(more: Mapping[str, Any], table: str = "") -> list[str]:
    """The dotted keys that may allocate something, of those that profiles do not have."""
    found = []
    for key, value in more.items():
        name = f"{table}.{key}".removeprefix(".")
        if key not in WITHOUT_TENSORS[table]:
            found.append(name)
        elif name in WITHOUT_TENSORS and isinstance(value, Mapping):
            found += _with_tensors(value, name)
    return found


def peaks_gap(job: Job, engine: Engine) -> str | None:
    """Why the peaks of this job have no closed form, though its steady state has one; `None` if they have.

    What was never held against the dry run is not predicted.
    """
    if not isinstance(job.profile.model, ModelSettings):
        return "activations are known for the families of profiles only"
    if engine.device is Device.CPU:
        return "scratch memory of CPU kernels is not modelled"
    if job.profile.workload.zero_init and job.case.zero_stage == 3:
        return "workload.zero_init is not modelled"
    return _gradients_gap(engine.facts) or _optimizer_gap(engine.facts) or _switched(engine.zero)


def _gradients_gap(facts: EngineFacts) -> str | None:
    if facts.wrapper is Wrapper.BF16 or facts.parameter_dtype != facts.gradient_dtype:
        return "gradients that are accumulated in another dtype than the parameters' are not modelled"
    if facts.communication_dtype != facts.gradient_dtype:
        return "gradients that are reduced in another dtype than their own are not modelled"
    return None


def _optimizer_gap(facts: EngineFacts) -> str | None:
    if facts.optimizer is BasicOptimizer.CLIENT:
        return "temporaries of a library's optimizer are not modelled"
    if facts.optimizer is BasicOptimizer.TORCH_ADAM and not facts.fused_kernel:
        return "temporaries of torch.optim without fused=true are not modelled"
    return None


def _switched(zero: ZeroSettings) -> str | None:
    """A ZeRO switch that takes DeepSpeed through code that the closed form does not know."""
    usual = ZeroSettings()
    for name in ("contiguous_gradients", "reduce_scatter", "memory_efficient_linear", "use_all_reduce_for_fetch_params"):
        if getattr(zero, name) != getattr(usual, name):
            return f"zero_optimization.{name}={str(getattr(zero, name)).lower()} is not modelled"
    return "offload_optimizer.ratio below 1 is not modelled" if zero.offload_optimizer.ratio < 1 else None
