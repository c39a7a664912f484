"""Who allocates what is alive only for a while: DeepSpeed's and PyTorch's files and functions, by
what the storage is for."""

from __future__ import annotations

from collections.abc import Mapping

from bf16prof.engine import labels
from bf16prof.models.autograd.events import GRADIENT
from bf16prof.vocabulary import ROUNDED, Component, Label

_SOURCES: Mapping[Label, str] = {
    labels.GATHERED_PARAMETERS: "zero/partition_parameters.py all_gather_coalesced",
    labels.PERSISTENT_PARAMETERS: "zero/stage3.py _post_step",
    labels.ALL_GATHER_BUCKETS: "zero/partition_parameters.py _all_gather_dtype",
    labels.REDUCE_SCATTER_BUFFER: "comm/coalesced_collectives.py reduce_scatter_coalesced",
    labels.ALL_REDUCE_BUFFER: "zero/stage_1_and_2.py allreduce_bucket, engine.py allreduce_bucket",
    labels.REDUCE_BUCKET: "zero/stage_1_and_2.py setup_buckets",
    labels.GRADIENT_PARTITION: "zero/stage_1_and_2.py copy_grads_in_partition",
    GRADIENT: "torch/csrc/autograd/functions/accumulate_grad.h",
    labels.STEP_GRADIENTS: "zero/stage3.py _prepare_fp32_grad_for_sub_group, zero/stage_1_and_2.py step, fp16/*_optimizer.py step",
    labels.GRADIENT_NORM: "get_grad_norm_direct: every gradient in fp64 (zero/utils.py get_norm_dtype)",
    labels.OVERFLOW_CHECK: "zero/stage3.py has_overflow",
    labels.OPTIMIZER_TEMPORARIES: "torch/optim/adam.py _multi_tensor_adam",
    ROUNDED: "c10/cuda/CUDACachingAllocator.cpp round_size",
}


def source_of(label: Label) -> str:
    """Where a storage comes from."""
    component, name = label
    if component is Component.ACTIVATIONS:
        return f"the model: {name.partition(' ')[0]}"
    return _SOURCES.get(label, "aten/src/ATen/native/cuda" if name.startswith("scratch of") else "")
