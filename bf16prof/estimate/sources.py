"""Who allocates what is alive only for a while: DeepSpeed's and PyTorch's files and functions, by the name of the storage."""

from __future__ import annotations

from bf16prof.records import ROUNDED, Component, Label

_BY_NAME = {
    "gathered parameters": "zero/partition_parameters.py all_gather_coalesced",
    "persistent parameters": "zero/stage3.py _post_step",
    "all-gather buckets": "zero/partition_parameters.py _all_gather_dtype",
    "reduce-scatter buffer": "comm/coalesced_collectives.py reduce_scatter_coalesced",
    "all-reduce buffer": "zero/stage_1_and_2.py allreduce_bucket, engine.py allreduce_bucket",
    "reduce bucket": "zero/stage_1_and_2.py setup_buckets",
    "gradient partition": "zero/stage_1_and_2.py copy_grads_in_partition",
    "parameter gradients": "torch/csrc/autograd/functions/accumulate_grad.h",
    "gradients for the optimizer": "zero/stage3.py _prepare_fp32_grad_for_sub_group, zero/stage_1_and_2.py step, fp16/*_optimizer.py step",
    "gradient norm": "get_grad_norm_direct: every gradient in fp64 (zero/utils.py get_norm_dtype)",
    "overflow check": "zero/stage3.py has_overflow",
    "temporaries of the optimizer": "torch/optim/adamw.py _multi_tensor_adamw",
    ROUNDED[1]: "c10/cuda/CUDACachingAllocator.cpp round_size",
}


def source_of(label: Label) -> str:
    """Where a storage comes from."""
    component, name = label
    if component is Component.ACTIVATIONS:
        return f"models/tapes: {name.partition(' ')[0]}"
    return _BY_NAME.get(name, "aten/src/ATen/native/cuda" if name.startswith("scratch of") else "")
