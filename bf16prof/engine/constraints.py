"""DeepSpeed's own constraints, checked before anything starts, and the configurations that it
accepts but silently spoils.

Each rule looks at the DeepSpeed JSON alone and says why it refuses; references are to DeepSpeed
0.19.8.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bf16prof.cases import Job, Refusal
from bf16prof.engine.config import (
    BasicOptimizer,
    Wrapper,
    accumulation_dtype,
    cast_dtype,
    client_optimizer,
    clips_gradients,
    deepspeed_config,
    enabled_dtype,
    engine_facts,
    offloads_optimizer,
    offloads_parameters,
    optimizer_type,
    zero_settings,
)
from bf16prof.engine.engines import engine_of
from bf16prof.engine.shared_batches import (
    fused_loss,
    packed_rows,
    preference,
    shared_evaluation,
    shared_layers,
    shared_sequences,
    shared_stages,
    spread_experts,
)
from bf16prof.errors import Refused
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.optimizers import library_ids
from bf16prof.profiles.recipes import DS_CONFIG, nearest, runnable_recipes
from bf16prof.profiles.schema import ZeroSettings
from bf16prof.rounding import ceil_div
from bf16prof.vocabulary import Device, Offload

Rule = Callable[[Mapping[str, Any]], str | None]


def admit(jobs: Sequence[Job]) -> tuple[list[Job], list[Refusal]]:
    """Part the jobs into those that their engine runs and the refusals of the others.

    Raises `Refused`, with the reason and the nearest recipes that work, when none is left.
    """
    admitted, refused = [], []
    for job in jobs:
        reason = refusal_reason(job)
        if reason is None:
            admitted.append(job)
        else:
            refused.append(Refusal(job.case, reason, alternatives(job)))
    if not admitted:
        raise refused_error(refused[0])
    return admitted, refused


def refused_error(refusal: Refusal) -> Refused:
    """The refusal as the error that ends a command."""
    hint = "recipes that work here: " + ", ".join(refusal.alternatives) if refusal.alternatives else ""
    return Refused(f"{refusal.case.label}: {refusal.reason}", hint=hint)


def refusal_reason(job: Job) -> str | None:
    """Why its engine cannot run this job as described; `None` if it can."""
    rules = (_triton_needs_a_gpu(job), packed_rows(job), _flash(job))
    return next((reason for reason in rules if reason), None) or engine_of(job).refusal(job)


def deepspeed_refusal(job: Job) -> str | None:
    """The same of DeepSpeed."""
    config = deepspeed_config(job)
    rules = (
        *(rule(config) for rule in RULES),
        _one_optimizer(job),
        _secondary_partitions(job, config),
        _nvme(job, config),
        shared_sequences(job),
        shared_layers(job),
        shared_stages(job),
        spread_experts(job),
        _quantizer_needs_a_gpu(job, config),
        preference(job),
        fused_loss(job),
        _four_bits(job),
        shared_evaluation(job),
        _calls_per_step(job, config),
    )
    return next((reason for reason in rules if reason), None)


def alternatives(job: Job) -> tuple[str, ...]:
    """The runnable recipes nearest to the job's own that DeepSpeed accepts in its place; those that
    need offloading say so.

    None where the precision is the user's own, or where no recipe would change it.
    """
    if job.recipe.id == DS_CONFIG or not engine_of(job).depends_on_recipe:
        return ()
    runnable = runnable_recipes()
    works = []
    for id_ in [job.recipe.id, *nearest(job.recipe, [recipe.at(job.case.zero_stage) for recipe in runnable.values()])]:
        other = dataclasses.replace(job, recipe=runnable[id_])
        if refusal_reason(other) is None:
            works.append(id_)
        elif job.case.offload is Offload.NONE and refusal_reason(_offloaded(other)) is None:
            works.append(f"{id_} with --offload optimizer")
    return tuple(works[:3])


def _offloaded(job: Job) -> Job:
    from bf16prof.cases import Selection, expand

    selection = Selection(
        job.profile, [job.case.zero_stage], [job.case.world_size], [job.recipe.id], job.device, job.gpu, Offload.OPTIMIZER
    )
    return expand(selection)[0]


def _bf16(config: Mapping[str, Any], key: str) -> bool:
    return bool(config.get("bf16", {}).get(key, False))


def _stage(config: Mapping[str, Any]) -> int:
    return int(config["zero_optimization"]["stage"])


def _both_half_precisions(config: Mapping[str, Any]) -> str | None:
    both = config.get("fp16", {}).get("enabled") and _bf16(config, "enabled")
    return "fp16 and bf16 cannot be enabled together (runtime/config.py)" if both else None


def _low_precision_master_needs_zero(config: Mapping[str, Any]) -> str | None:
    flags = _bf16(config, "bf16_master_weights_and_grads") or _bf16(config, "bf16_optimizer_states")
    if flags and _stage(config) == 0:
        return "DeepSpeed keeps bf16 master weights only under ZeRO stage 1, 2 or 3 (runtime/config.py, _do_error_check)"
    return None


def _no_master_copy_needs_stage_0(config: Mapping[str, Any]) -> str | None:
    if cast_dtype(config) and _stage(config) > 0:
        return (
            "ZeRO keeps a master copy of the parameters whatever their dtype (runtime/zero/stage_1_and_2.py, stage3.py): stage 0 has none"
        )
    return None


def _triton_needs_a_gpu(job: Job) -> str | None:
    if job.profile.workload.liger != "none" and job.device is Device.CPU:
        return "Liger's kernels (workload.liger) are Triton's, which run on GPUs only"
    return None


def _quantizer_needs_a_gpu(job: Job, config: Mapping[str, Any]) -> str | None:
    if config["zero_optimization"].get("zero_quantized_weights") and _stage(config) == 3 and job.device is Device.CPU:
        return (
            "zero_optimization.zero_quantized_weights: DeepSpeed's quantizer is a CUDA kernel (csrc/quantization), which CPUs do not have"
        )
    return None


FLASH = "flash_attention_2"
"""What transformers calls the package flash-attn."""


def asks_for_flash(job: Job) -> bool:
    """Whether the job's model is to use FlashAttention's package."""
    model = job.profile.model
    return isinstance(model, HuggingFaceSettings) and model.attention == FLASH


def _flash(job: Job) -> str | None:
    if not asks_for_flash(job):
        return None
    if job.device is Device.CPU:
        return "FlashAttention's package (flash_attention_2) runs on GPUs only: sdpa runs here"
    if engine_of(job).facts(job).output_dtype == "fp32":
        return "FlashAttention's package (flash_attention_2) takes bf16 and fp16 only"
    if job.gpu is not None and job.gpu.compute_capability < (8, 0):
        return f"FlashAttention's package (flash_attention_2) needs compute capability 8.0, {job.gpu.id} has less"
    return None


def _four_bits(job: Job) -> str | None:
    if job.profile.quantization is None:
        return None
    if job.profile.peft is None:
        return "4-bit weights (--load-in-4bit) are not trained: say an adapter, as --lora r=16,targets=all-linear"
    if not isinstance(job.profile.model, HuggingFaceSettings):
        return "transformers quantizes (--load-in-4bit) models of its own"
    if job.case.pipeline_parallel > 1 or job.case.expert_parallel > 1:
        return "--load-in-4bit with --pp or --ep is not modelled"
    return None


def _one_optimizer(job: Job) -> str | None:
    recipe, library = job.recipe.optimizer, job.profile.optimizer.library
    if library and recipe:
        return f"the recipe brings an optimizer of its own, and optimizer.library ({library}) names another"
    if library and "optimizer" in job.profile.deepspeed.more:
        return f"the DeepSpeed JSON has an optimizer, and optimizer.library ({library}) names another"
    return None


def _client_optimizer_is_adamw(config: Mapping[str, Any]) -> str | None:
    client = client_optimizer(config)
    if client and client.id not in library_ids() and optimizer_type(config) != "adamw":
        profile = f"{config['optimizer'].get('type')!r:.60}"
        return f"{client.class_} is an AdamW, and the profile's optimizer is {profile}: two things would change at once"
    return None


def _client_optimizer_stays_on_the_device(config: Mapping[str, Any]) -> str | None:
    if (client := client_optimizer(config)) and offloads_optimizer(config):
        return (
            f"{client.class_} does not work on an offloaded optimizer's states: DeepSpeed wants DeepSpeedCPUAdam there (runtime/engine.py)"
        )
    return None


def _secondary_partitions(job: Job, config: Mapping[str, Any]) -> str | None:
    return secondary_partitions(zero_settings(config), job.case.world_size) if _stage(config) == 3 else None


def secondary_partitions(zero: ZeroSettings, ranks: int) -> str | None:
    """Why ZeRO-3 cannot lay the secondary partitions of ZeRO++ on so many ranks: the groups are all
    of one size.

    `utils/groups.py`, _create_zero_param_parallel_group.
    """
    size = zero.zero_hpz_partition_size
    if size <= 1 or ranks % size == 0:
        return None
    return f"zero_optimization.zero_hpz_partition_size ({size}) must divide the number of ranks ({ranks})"


def _calls_per_step(job: Job, config: Mapping[str, Any]) -> str | None:
    """ZeRO-3 calls the optimizer once per sub-group, which one that counts its calls takes for so
    many steps."""
    client = client_optimizer(config)
    if client is None or not client.counts_calls or _stage(config) != 3:
        return None
    size, ranks = zero_settings(config).sub_group_size, job.case.world_size
    try:
        own = sum(ceil_div(spec.numel, ranks) for spec in inventory(job.profile.model))
    except NoInventory:
        return f"{client.class_} counts calls, and ZeRO-3 calls it once per sub-group; how many there are is not known of this model"
    if own <= size:
        return None
    return f"{client.class_} counts calls, and ZeRO-3 calls it once per sub-group: set deepspeed.zero_optimization.sub_group_size={own}"


def _low_precision_states_need_master(config: Mapping[str, Any]) -> str | None:
    if _bf16(config, "bf16_optimizer_states") and not _bf16(config, "bf16_master_weights_and_grads"):
        return "bf16_optimizer_states needs bf16_master_weights_and_grads (runtime/config.py, _do_error_check)"
    return None


def _low_precision_master_needs_bf16(config: Mapping[str, Any]) -> str | None:
    if _bf16(config, "bf16_master_weights_and_grads") and not _bf16(config, "enabled"):
        return "bf16_master_weights_and_grads without bf16.enabled: DeepSpeed accepts it and truncates fp32 weights to bf16 at every step"
    return None


def _fp32_states_of_bf16_master_need_offload(config: Mapping[str, Any]) -> str | None:
    if not _bf16(config, "bf16_master_weights_and_grads"):
        return None
    offload = offloads_optimizer(config)
    if not offload and not _bf16(config, "bf16_optimizer_states"):
        return "bf16 master weights with fp32 optimizer states need offload_optimizer and DeepSpeedCPUAdam (runtime/base_optimizer.py)"
    if offload and engine_facts(config).optimizer is not BasicOptimizer.CPU_ADAM:
        return "offloaded bf16 master weights need DeepSpeedCPUAdam: unset optimizer.torch_adam (runtime/zero/stage3.py)"
    return None


def _fp16_master_needs_cpu_adam(config: Mapping[str, Any]) -> str | None:
    fp16 = config.get("fp16", {})
    if not (fp16.get("enabled") and fp16.get("fp16_master_weights_and_grads")):
        return None
    if _stage(config) == 0 or not offloads_optimizer(config) or engine_facts(config).optimizer is not BasicOptimizer.CPU_ADAM:
        return "fp16 master weights need stage 1, 2 or 3, offload_optimizer and DeepSpeedCPUAdam (runtime/zero/stage_1_and_2.py, stage3.py)"
    return None


def _flags_ignored_by_bf16_optimizer(config: Mapping[str, Any]) -> str | None:
    if _bf16(config, "bf16_master_weights_and_grads") and engine_facts(config).wrapper is Wrapper.BF16:
        return (
            "stage 1 with grad_accum_dtype fp32 takes DeepSpeed's BF16_Optimizer, which ignores the bf16 master flags (runtime/engine.py)"
        )
    return None


def _accumulation_dtype_at_stage_0(config: Mapping[str, Any]) -> str | None:
    if _stage(config) == 0 and enabled_dtype(config) != accumulation_dtype(config):
        return "stage 0 accumulates gradients in the parameters' dtype only: unset data_types.grad_accum_dtype (runtime/engine.py)"
    return None


def _offload_needs_zero(config: Mapping[str, Any]) -> str | None:
    if offloads_optimizer(config) and _stage(config) == 0:
        return (
            "offload_optimizer needs ZeRO stage 1, 2 or 3: at stage 0 DeepSpeedCPUAdam meets parameters on the GPU (ops/adam/cpu_adam.py)"
        )
    if offloads_parameters(config) and _stage(config) != 3:
        return "offload_param works at stage 3 only; DeepSpeed ignores it at the others (runtime/zero/config.py)"
    if config["zero_optimization"].get("offload_optimizer", {}).get("ratio", 1.0) < 1.0 and _stage(config) != 3:
        return "offload_optimizer.ratio below 1 works at stage 3 only (runtime/zero/config.py, offload_ratio_check)"
    return None


def _partial_offloading_needs_cpu_adam(config: Mapping[str, Any]) -> str | None:
    ratio = config["zero_optimization"].get("offload_optimizer", {}).get("ratio", 1.0)
    if offloads_optimizer(config) and ratio < 1.0 and engine_facts(config).optimizer is not BasicOptimizer.CPU_ADAM:
        return "offload_optimizer.ratio below 1 needs DeepSpeedCPUAdam: unset optimizer.torch_adam (runtime/zero/stage3.py)"
    return None


def _offloaded_parameters_keep_their_optimizer(config: Mapping[str, Any]) -> str | None:
    if offloads_parameters(config) and not offloads_optimizer(config):
        return "offload_param without offload_optimizer is not modelled: offload both"
    return None


BUFFERS_OF_ADAM = 4
"""Parameter, gradient, momentum and variance of a sub-group are in memory together
(runtime/zero/offload_config.py, buffer_count)."""


def _nvme(job: Job, config: Mapping[str, Any]) -> str | None:
    offload = zero_settings(config).offload_optimizer
    if offload.device != "nvme":
        return None
    reasons = {
        "device: DeepSpeed swaps to NVMe at stage 3 only; at stages 1 and 2 it keeps all in host memory: say cpu": _stage(config) != 3,
        "device: DeepSpeed's async_io (libaio) has not been held against ranks on CPUs: say cpu": job.device is Device.CPU,
        "nvme_path: DeepSpeed needs a path for its files (runtime/zero/stage3.py, _configure_tensor_swapping)": offload.nvme_path is None,
        "ratio: below 1 it is not modelled with nvme": offload.ratio < 1.0,
        f"buffer_count: Adam needs {BUFFERS_OF_ADAM} (runtime/zero/offload_config.py)": offload.buffer_count < BUFFERS_OF_ADAM,
        "device: nvme is modelled with DeepSpeedCPUAdam": engine_facts(config).optimizer is not BasicOptimizer.CPU_ADAM,
    }
    return next((f"zero_optimization.offload_optimizer.{reason}" for reason, is_so in reasons.items() if is_so), None)


def _odd_allgather_bucket(config: Mapping[str, Any]) -> str | None:
    odd = config["zero_optimization"].get("allgather_bucket_size", 0) % 2
    return (
        "allgather_bucket_size must be even at stages 1 and 2 (runtime/zero/stage_1_and_2.py)" if odd and _stage(config) in (1, 2) else None
    )


def _prescaling_with_reduce_scatter(config: Mapping[str, Any]) -> str | None:
    scatters = config["zero_optimization"].get("reduce_scatter", True) and _stage(config) >= 2
    if scatters and (config.get("prescale_gradients") or config.get("gradient_predivide_factor", 1.0) != 1.0):
        return "prescale_gradients and gradient_predivide_factor do not work with reduce_scatter at stages 2 and 3 (runtime/zero)"
    return None


def _grad_norm_switch(config: Mapping[str, Any]) -> str | None:
    if config["zero_optimization"].get("compute_grad_norm", True):
        return None
    is_bf16_optimizer = engine_facts(config).wrapper is Wrapper.BF16
    if _stage(config) not in (1, 2) or clips_gradients(config) or offloads_optimizer(config) or is_bf16_optimizer:
        return (
            "compute_grad_norm=false needs stage 1 or 2, gradient_clipping=0, no offloading and no BF16_Optimizer (zero/stage_1_and_2.py)"
        )
    return None


RULES: tuple[Rule, ...] = (
    _both_half_precisions,
    _no_master_copy_needs_stage_0,
    _client_optimizer_is_adamw,
    _client_optimizer_stays_on_the_device,
    _low_precision_master_needs_zero,
    _partial_offloading_needs_cpu_adam,
    _low_precision_states_need_master,
    _low_precision_master_needs_bf16,
    _fp32_states_of_bf16_master_need_offload,
    _fp16_master_needs_cpu_adam,
    _flags_ignored_by_bf16_optimizer,
    _accumulation_dtype_at_stage_0,
    _offload_needs_zero,
    _offloaded_parameters_keep_their_optimizer,
    _odd_allgather_bucket,
    _prescaling_with_reduce_scatter,
    _grad_norm_switch,
)
