"""What DeepSpeed, PyTorch and the training loop hold, under the names by which every source lists
it: the estimate, which lays it out; the dry run, which sees it allocated; and attribution, which
finds it in an engine.
"""

from __future__ import annotations

from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.vocabulary import Component, Label

C = Component

OWN_LOSS = "loss of the own tokens"
"""What the loop calls the model's loss where it goes on with another: the mean over the ranks of a
sequence."""

THE_MODEL: Label = (C.PARAMETERS, "the whole model")
"""As it is built, before DeepSpeed has it."""
PARAMETERS: Label = (C.PARAMETERS, "parameters")
FLAT_PARAMETERS: Label = (C.PARAMETERS, "flat parameters")
PARTITIONED_PARAMETERS: Label = (C.PARAMETERS, "partitioned parameters")
SECONDARY_PARTITIONS: Label = (C.PARAMETERS, "secondary partitions")
PERSISTENT_PARAMETERS: Label = (C.PARAMETERS, "persistent parameters")
GATHERED_PARAMETERS: Label = (C.PARAMETERS, "gathered parameters")
QUANTIZATION: Label = (C.PARAMETERS, "scales of 4-bit weights")
MODEL_BUFFERS: Label = (C.PARAMETERS, "model buffers")

MASTER_PARAMETERS: Label = (C.MASTER_PARAMETERS, "master parameters")
MASTER_GRADIENTS: Label = (C.MASTER_GRADIENTS, "master gradients")
FIRST_GRADIENTS: Label = (C.MASTER_GRADIENTS, "gradients for the first optimizer call")
STEP_GRADIENTS: Label = (C.MASTER_GRADIENTS, "gradients for the optimizer")

PENDING_MOMENTUM: Label = (C.MOMENTUM, "momentum of the step that is under way")
"""Muon's, which backward updates and the step takes over (`zero/stage_1_and_2.py`)."""

GRADIENT_BUFFERS: Label = (C.GRADIENTS, "gradient buffers")
"""megatron-core's, of which each parameter's `main_grad` is a view."""
GRADIENT_PARTITION: Label = (C.GRADIENTS, "gradient partition")
ACCUMULATED_GRADIENTS: Label = (C.GRADIENTS, "accumulated gradients")
"""Those that stage 2 adds up in host memory."""

REDUCE_BUCKET: Label = (C.BUFFERS, "reduce bucket")
ALL_GATHER_BUCKETS: Label = (C.BUFFERS, "all-gather buckets")
ALL_REDUCE_BUFFER: Label = (C.BUFFERS, "all-reduce buffer")
REDUCE_SCATTER_BUFFER: Label = (C.BUFFERS, "reduce-scatter buffer")
OFFLOADED_PARAMETERS: Label = (C.BUFFERS, "parameter copy for the host optimizer")
OFFLOADING_BUFFER: Label = (C.BUFFERS, "gradient buffer for offloading")
OFFLOADING_HOST_BUFFER: Label = (C.BUFFERS, "gradient buffer for offloading (host)")

GRADIENT_NORM: Label = (C.WORKSPACE, "gradient norm")
OVERFLOW_CHECK: Label = (C.WORKSPACE, "overflow check")
OPTIMIZER_TEMPORARIES: Label = (C.WORKSPACE, "temporaries of the optimizer")
PLACEHOLDER: Label = (C.WORKSPACE, "placeholder of the second optimizer")
STEP_COUNTERS: Label = (C.WORKSPACE, "optimizer step counters")
"""As `profiles/optimizers.toml` names them."""
CUBLAS_WORKSPACES: Label = (C.WORKSPACE, "cuBLAS workspaces")

WHOLE_BLOCKS: Label = (C.ROUNDING, f"blocks rounded up to {ALLOCATOR_BLOCK_BYTES} bytes")
"""What the caching allocator adds to each storage; `records.ROUNDED` has remainders too small to be
split off besides."""


def optimizer_state(component: Component, key: str) -> Label:
    """A state of the optimizer, by the key under which the optimizer keeps it."""
    return component, f"optimizer state {key}"


RECEIVED: Label = (C.BUFFERS, "buffers for what other stages send")
"""A pipeline's, which it keeps (`runtime/pipe/engine.py`, _allocate_or_extend_buffers)."""


def pipeline_buffer(name: str) -> Label:
    """What a pipeline keeps of the micro-batches that are under way: their inputs, outputs and
    labels."""
    return C.ACTIVATIONS, f"{name.replace('_', ' ')} of micro-batches (pipeline)"


def held_by(owner: str, attribute: str) -> Label:
    """What an object of DeepSpeed's, or a module, holds under an attribute that has no other name
    here."""
    return C.WORKSPACE, f"{owner}.{attribute}"


GLOBAL_NORM = held_by("DeepSpeedEngine", "_global_grad_norm")
OVERFLOW_FLAG = held_by("DeepSpeedZeroOptimizer_Stage3", "inf_or_nan_tracker")
