"""From a job to DeepSpeed's JSON, and from that JSON to what DeepSpeed will make of it: dtypes,
wrapper, optimizer.

References are to DeepSpeed 0.19.8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from bf16prof.cases import Job
from bf16prof.profiles.ds_config import known_keys
from bf16prof.profiles.optimizers import OptimizerLayout, all_optimizers
from bf16prof.profiles.recipes import DTYPE_BYTES
from bf16prof.profiles.schema import OptimizerSettings, Profile, ZeroSettings
from bf16prof.profiles.settings import short_dtype

SHARED_MEMORY_BUILDER = "ShareMemCommBuilder"
"""What compiles DeepSpeed's collectives over shared memory, without which it goes by PyTorch's."""


class Wrapper(StrEnum):
    """What DeepSpeed, or megatron-core, puts around the basic optimizer; it decides the whole
    memory layout."""

    PLAIN = "none"
    """No wrapper: the basic optimizer works on the parameters (stage 0 in fp32)."""
    FUSED = "FP16_Optimizer"
    """Stage 0 in bf16 or fp16 over FusedAdam: one flat master copy."""
    UNFUSED = "FP16_UnfusedOptimizer"
    """Stage 0 in bf16 or fp16 over any other optimizer: a master copy per parameter."""
    BF16 = "BF16_Optimizer"
    """Stage 1 with bf16 parameters and fp32 gradient accumulation."""
    ZERO12 = "DeepSpeedZeroOptimizer"
    ZERO3 = "DeepSpeedZeroOptimizer_Stage3"
    MEGATRON = "Float16OptimizerWithFloat16Params"
    """megatron-core's: a master copy per parameter."""
    MEGATRON_DISTRIBUTED = "DistributedOptimizer"
    """megatron-core's, which cuts master copies and states into as many parts as there are
    ranks."""


class BasicOptimizer(StrEnum):
    """What updates the master parameters."""

    FUSED_ADAM = "FusedAdam"
    CPU_ADAM = "DeepSpeedCPUAdam"
    TORCH_ADAM = "torch.optim"
    CLIENT = "client"
    """One that DeepSpeed's JSON cannot name: a library's, which the recipe brings and DeepSpeed is
    handed."""
    OTHER = "not Adam"
    """One of DeepSpeed's or PyTorch's others, as the user's own JSON may name it."""


@dataclass(frozen=True)
class EngineFacts:
    """What DeepSpeed makes of a configuration. Dtypes are `fp32`, `bf16` or `fp16`."""

    wrapper: Wrapper
    optimizer: BasicOptimizer
    parameter_dtype: str
    gradient_dtype: str
    """Of the gradients that are kept and accumulated."""
    master_dtype: str
    """Of what the optimizer updates: the parameters themselves where there is no wrapper."""
    layout: OptimizerLayout | None
    """What the optimizer keeps; `None` of one that is not Adam."""
    communication_dtype: str
    autocast_dtype: str
    """`none` without torch.autocast."""
    fused_kernel: bool
    """Whether `torch.optim` runs its fused kernel, which keeps its step counters on the device."""

    @property
    def output_dtype(self) -> str:
        """Dtype of the model's logits: those of a Linear layer."""
        return self.parameter_dtype if self.autocast_dtype == "none" else self.autocast_dtype


def deepspeed_config(job: Job) -> dict[str, Any]:
    """DeepSpeed's JSON for a job: the profile's settings, the case's stage, the recipe's fragment;
    over them what the profile has besides.

    Defaults of DeepSpeed are left out. What no key of DeepSpeed's says stands in a block of our own
    (`OURS`): see `handed_to_deepspeed`.
    """
    profile, recipe = job.profile, job.recipe.at(job.case.zero_stage)
    settings = profile.deepspeed.model_dump(exclude_defaults=True, by_alias=True)
    more = settings.pop("more", {})
    zero = {"stage": job.case.zero_stage, **settings.pop("zero_optimization", {})}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": profile.workload.micro_batch_size,
        "gradient_accumulation_steps": profile.workload.gradient_accumulation_steps,
        "steps_per_print": 2**31,
        "optimizer": optimizer_block(_made(profile.optimizer, zero, more)),
        **settings,
        "zero_optimization": zero,
    }
    if profile.parallel.sequence > 1:  # `zero.Init` has no groups to ask yet (runtime/config.py, DeepSpeedConfig.__init__)
        config["sequence_parallel_size"] = profile.parallel.sequence
    if profile.parallel.tensor > 1:
        config["tensor_parallel"] = {"autotp_size": profile.parallel.tensor}
    if profile.parallel.pipeline > 1:
        config["pipeline"] = _pipeline(profile)
    assert recipe.deepspeed is not None, "only runnable recipes become jobs"
    for block, keys in recipe.deepspeed.items():
        config[block] = {**keys, **config.get(block, {})} if isinstance(keys, Mapping) else keys
    ours = {"parameters": recipe.cast, "optimizer": recipe.optimizer or profile.optimizer.library}
    if profile.optimizer.library:  # the Trainer sets it as well (transformers, integrations/deepspeed.py, deepspeed_optim_sched)
        config["zero_allow_untested_optimizer"] = True
    if any(ours.values()):
        config[OURS] = {key: value for key, value in ours.items() if value}
    return {**merged(config, more), **{block: more[block] for block in REPLACED if block in more}}


def _pipeline(profile: Profile) -> dict[str, Any]:
    """DeepSpeed's `pipeline` block. Its engine recomputes groups of layers (runtime/pipe/engine.py,
    PipelineEngine.__init__)."""
    workload = profile.workload
    recomputed = {"activation_checkpoint_interval": workload.checkpoint_every_n_layers, "use_reentrant": workload.use_reentrant}
    return {"stages": profile.parallel.pipeline, **(recomputed if workload.activation_checkpointing else {})}


OURS = "bf16prof"
"""The block of a configuration that is not DeepSpeed's: `parameters`, the dtype that the model is
cast to before DeepSpeed is given it, and `optimizer`, the id of a library's optimizer in the place
of DeepSpeed's (`profiles/optimizers.toml`)."""

REPLACED = ("optimizer", "scheduler")
"""Blocks of which only one can be right."""


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested tables laid over one another."""
    laid = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(laid.get(key), Mapping)
        laid[key] = merged(laid[key], value) if both else value
    return laid


def _made(optimizer: OptimizerSettings, zero: Mapping[str, Any], more: Mapping[str, Any]) -> OptimizerSettings:
    """The optimizer that is made: DeepSpeedCPUAdam in the place of the Trainer's, where the
    optimizer is offloaded."""
    is_offloaded = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if not (optimizer.from_trainer and is_offloaded and more.get("zero_force_ds_cpu_optimizer", True)):
        return optimizer
    return optimizer.model_copy(update={"torch_adam": False, "fused": None, "foreach": None})


def optimizer_block(optimizer: OptimizerSettings) -> dict[str, Any]:
    """DeepSpeed's `optimizer` block."""
    params: dict[str, Any] = {
        "lr": optimizer.lr,
        "betas": list(optimizer.betas),
        "eps": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
    }
    if optimizer.torch_adam:
        chosen = {"fused": optimizer.fused, "foreach": optimizer.foreach}
        params |= {"torch_adam": True, **{key: value for key, value in chosen.items() if value is not None}}
    return {"type": optimizer.type, "params": params}


def handed_to_deepspeed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as DeepSpeed is given it: without our own block, and without an `optimizer`
    where it is handed one."""
    left_out = {OURS, "optimizer"} if client_optimizer(config) else {OURS}
    return {block: keys for block, keys in config.items() if block not in left_out}


def cast_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that the model's parameters are cast to before DeepSpeed is given it; empty when
    they are left as they are."""
    return str(config.get(OURS, {}).get("parameters", ""))


def client_optimizer(config: Mapping[str, Any]) -> OptimizerLayout | None:
    """The library's optimizer that DeepSpeed is handed; `None` when it makes one from its JSON."""
    id_ = config.get(OURS, {}).get("optimizer")
    return all_optimizers()[id_] if id_ else None


def zero_settings(config: Mapping[str, Any]) -> ZeroSettings:
    """The ZeRO settings of a DeepSpeed configuration that profiles know, DeepSpeed's defaults
    filled in."""
    return ZeroSettings.model_validate(known_keys(ZeroSettings, config["zero_optimization"])[0])


def overlaps_communication(config: Mapping[str, Any]) -> bool:
    """`overlap_comm`, whose default depends on the stage (`runtime/zero/config.py`,
    overlap_comm_valid)."""
    chosen = config["zero_optimization"].get("overlap_comm")
    return bool(config["zero_optimization"]["stage"] == 3 if chosen is None else chosen)


def engine_facts(config: Mapping[str, Any]) -> EngineFacts:
    """What DeepSpeed makes of this configuration.

    `runtime/engine.py`: get_data_types, _configure_basic_optimizer, _do_optimizer_sanity_check.
    """
    enabled = enabled_dtype(config)
    accumulated = accumulation_dtype(config)
    optimizer = _basic_optimizer(config)
    wrapper = _wrapper(config, enabled, accumulated, optimizer)
    parameter = cast_dtype(config) or enabled
    low_precision_master = config.get("bf16", {}).get("bf16_master_weights_and_grads") and wrapper in (Wrapper.ZERO12, Wrapper.ZERO3)
    master = parameter if wrapper is Wrapper.PLAIN else "bf16" if low_precision_master else "fp32"
    autocast = config.get("torch_autocast", {})
    return EngineFacts(
        wrapper=wrapper,
        optimizer=optimizer,
        parameter_dtype=parameter,
        gradient_dtype=parameter if wrapper is Wrapper.PLAIN else accumulated,
        master_dtype=master,
        layout=_layout(config, optimizer),
        communication_dtype=_communication_dtype(config, enabled),
        autocast_dtype=str(short_dtype(autocast.get("dtype"))) if autocast.get("enabled") else "none",
        fused_kernel=bool(optimizer_settings(config).get("fused")),
    )


def dtype_bytes(dtype: str) -> int:
    """Bytes of one element."""
    return DTYPE_BYTES[dtype]


def enabled_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that DeepSpeed takes the model to have, and communicates in (`runtime/engine.py`,
    get_data_types)."""
    if config.get("fp16", {}).get("enabled"):
        return "fp16"
    return "bf16" if config.get("bf16", {}).get("enabled") else "fp32"


def _communication_dtype(config: Mapping[str, Any], enabled: str) -> str:
    """The dtype that gradients are reduced in; ranks that share a sequence have a key of their own
    for it (`runtime/engine.py`, _configure_distributed_model)."""
    if config.get("sequence_parallel_size", 1) > 1:
        return str(short_dtype(str(config.get("seq_parallel_communication_data_type") or "fp32").lower()))
    return config.get("communication_data_type") or enabled


def accumulation_dtype(config: Mapping[str, Any]) -> str:
    """The dtype that DeepSpeed takes gradients to be accumulated in (`runtime/engine.py`,
    get_data_types)."""
    return config.get("data_types", {}).get("grad_accum_dtype") or enabled_dtype(config)


def offloads_optimizer(config: Mapping[str, Any]) -> bool:
    """Whether the optimizer works in host memory (stages 1 to 3)."""
    return bool(config["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none")


def offloads_parameters(config: Mapping[str, Any]) -> bool:
    """Whether the partitions of the parameters are in host memory (stage 3)."""
    return bool(config["zero_optimization"].get("offload_param", {}).get("device", "none") != "none")


def clips_gradients(config: Mapping[str, Any]) -> bool:
    """Whether gradients are clipped, as they are by default (`runtime/constants.py`,
    GRADIENT_CLIPPING_DEFAULT; it was 0 in 0.18)."""
    return bool(config.get("gradient_clipping", 1.0) > 0)


def optimizer_type(config: Mapping[str, Any]) -> str:
    """The name of the basic optimizer, in small letters."""
    return str(config["optimizer"].get("type", "")).lower()


def optimizer_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `params` of the optimizer block."""
    return config["optimizer"].get("params") or {}


def _layout(config: Mapping[str, Any], optimizer: BasicOptimizer) -> OptimizerLayout | None:
    """What the optimizer keeps. CPUAdam keeps bf16 moments when told to, torch.optim's fused kernel
    its counters on the device."""
    if optimizer is BasicOptimizer.CLIENT:
        return client_optimizer(config)
    variants = {
        BasicOptimizer.CPU_ADAM: ", fp32_optimizer_states=False" * bool(config.get("bf16", {}).get("bf16_optimizer_states")),
        BasicOptimizer.TORCH_ADAM: ", fused" * bool(optimizer_settings(config).get("fused")),
    }
    return all_optimizers().get(f"{optimizer}{variants.get(optimizer, '')}")


def _basic_optimizer(config: Mapping[str, Any]) -> BasicOptimizer:
    if client_optimizer(config):
        return BasicOptimizer.CLIENT
    if optimizer_type(config) not in ("adam", "adamw"):
        return BasicOptimizer.OTHER
    if optimizer_settings(config).get("torch_adam"):
        return BasicOptimizer.TORCH_ADAM
    return BasicOptimizer.CPU_ADAM if offloads_optimizer(config) else BasicOptimizer.FUSED_ADAM


def _wrapper(config: Mapping[str, Any], parameter: str, gradient: str, optimizer: BasicOptimizer) -> Wrapper:
    stage = config["zero_optimization"]["stage"]
    if stage == 3:
        return Wrapper.ZERO3
    if stage == 1 and parameter == "bf16" and gradient == "fp32" and not offloads_optimizer(config):
        return Wrapper.BF16
    if stage > 0:
        return Wrapper.ZERO12
    if parameter == "fp32":
        return Wrapper.PLAIN
    return Wrapper.FUSED if optimizer is BasicOptimizer.FUSED_ADAM else Wrapper.UNFUSED
