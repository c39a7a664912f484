"""What a profile may say: the schema of the TOML file, with the meaning and unit of every key.

Unknown keys and wrong types are refused (see `load.py`, which turns pydantic's errors into one line with file and key).
The ZeRO keys and their defaults are DeepSpeed's own (`deepspeed/runtime/zero/config.py`, 0.19.8): those that move memory, and those
that a run needs. What decides the precision (`bf16`, `fp16`, `torch_autocast`) belongs to the recipe, and the stage to the case.
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _whole(value: object) -> object:
    """5e8 is how DeepSpeed's documentation writes bucket sizes: a float without a fraction is a whole number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Count = Annotated[int, Field(gt=0, lt=2**40)]
Elements = Annotated[int, BeforeValidator(_whole), Field(ge=0, le=sys.maxsize)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["fp32", "fp16", "bf16"]


class Settings(BaseModel):
    """Base of all tables: frozen, strict about types, and closed to unknown keys. DeepSpeed's short names are read as well."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


class ModelSettings(Settings):
    """The model: its family and its sizes."""

    family: str
    """One of `bf16prof.models.families()`."""
    hidden_size: Count
    num_layers: Annotated[int, Field(gt=0, lt=2**14)]
    num_heads: Count
    vocab_size: Count
    max_sequence_length: Count
    """Rows of the position table, for families that have one; the longest sequence for all."""
    intermediate_size: Count | None = None
    """Width of the MLP; the family's own rule when absent (4 x hidden_size)."""
    num_kv_heads: Count | None = None
    """Key and value heads of grouped-query attention; as many as heads when absent."""
    tie_embeddings: bool | None = None
    """Whether the output head shares the token embedding; the family's own habit when absent."""


class WorkloadSettings(Settings):
    """What one rank computes in one step."""

    sequence_length: Count
    """Tokens per sequence."""
    micro_batch_size: Count = 1
    """Sequences per rank and forward pass."""
    gradient_accumulation_steps: Count = 1
    activation_checkpointing: bool = False
    """Keep only the input of each layer and recompute the rest in backward (`torch.utils.checkpoint`, non-reentrant)."""
    data: str = "synthetic"
    """`synthetic`, `pydoc`, `pydoc-bpe`, `text:PATH` or `text-bpe:PATH` (see `measure/data.py`)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42


class OptimizerSettings(Settings):
    """DeepSpeed's `optimizer` block. Without `torch_adam`, DeepSpeed picks FusedAdam, or DeepSpeedCPUAdam when offloading."""

    type: Literal["Adam", "AdamW"] = "AdamW"
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    torch_adam: bool = False
    """Use `torch.optim` instead of DeepSpeed's compiled optimizer (no compiler needed)."""
    fused: bool | None = None
    """With `torch_adam`: PyTorch's fused kernel, which makes no temporaries."""
    foreach: bool | None = None
    """With `torch_adam`: PyTorch's multi-tensor version, which does."""


class OffloadOptimizerSettings(Settings):
    """`zero_optimization.offload_optimizer`: optimizer states and the update in host memory."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True
    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the ZeRO-3 sub-groups that is offloaded."""


class OffloadParamSettings(Settings):
    """`zero_optimization.offload_param`: the partitioned parameters in host memory (ZeRO-3)."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


class ZeroSettings(Settings):
    """DeepSpeed's `zero_optimization`, without the stage."""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[Elements, Field(gt=0)] = 500_000_000
    allgather_partitions: bool = True
    allgather_bucket_size: Elements = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    overlap_comm: bool | None = None
    """DeepSpeed's default: on for stage 3, off otherwise."""
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    compute_grad_norm: bool = True
    ignore_unused_parameters: bool = True
    sub_group_size: Elements = 1_000_000_000
    prefetch_bucket_size: Elements = Field(50_000_000, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: Elements = Field(100_000, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: Elements = Field(sys.maxsize, alias="stage3_model_persistence_threshold")
    max_live_parameters: Elements = Field(1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: Elements = Field(1_000_000_000, alias="stage3_max_reuse_distance")
    module_granularity_threshold: Elements = Field(0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: bool = Field(False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: bool = Field(False, alias="stage3_allgather_sequential")
    memory_efficient_linear: bool = True
    zero_hpz_partition_size: Elements = 1
    """Ranks that share a secondary copy of the parameters between forward and backward (ZeRO++ hpZ)."""
    offload_optimizer: OffloadOptimizerSettings = OffloadOptimizerSettings()
    offload_param: OffloadParamSettings = OffloadParamSettings()


class DataTypeSettings(Settings):
    """DeepSpeed's `data_types`."""

    grad_accum_dtype: Dtype | None = None
    """Dtype in which gradients are accumulated; the parameters' own when absent."""


class Bf16Settings(Settings):
    """The keys of DeepSpeed's `bf16` block that are not part of a recipe."""

    check_grad_overflow: bool = True
    immediate_grad_update: bool = False


class DeepSpeedSettings(Settings):
    """The rest of DeepSpeed's JSON."""

    gradient_clipping: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm to this; 0 turns it off (DeepSpeed's default is 1.0: runtime/constants.py)."""
    communication_data_type: Dtype | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    data_types: DataTypeSettings = DataTypeSettings()
    bf16: Bf16Settings = Bf16Settings()
    zero_optimization: ZeroSettings = ZeroSettings()


class Profile(Settings):
    """What to train: everything but the ZeRO stage, the number of ranks and the precision recipe."""

    name: str = ""
    """How records call this profile: the preset's or the file's name."""
    description: str = ""
    model: ModelSettings
    workload: WorkloadSettings
    optimizer: OptimizerSettings = OptimizerSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
