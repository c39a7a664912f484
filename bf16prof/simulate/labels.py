"""What a storage is for, by the place that allocates it: the innermost function of DeepSpeed or PyTorch that is known to allocate something
with a name of its own; else the operator and the phase.

A label that the engine itself gives later (`engine.attribution`: it holds the storage as master parameters, say) replaces this one.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any

from bf16prof.records import Component, Label, Phase

C = Component

PLACES: tuple[tuple[str, str, Label], ...] = (
    ("zero/partition_parameters.py", "_all_gather_dtype", (C.BUFFERS, "all-gather buckets")),
    ("zero/partition_parameters.py", "_all_gather_sequential", (C.PARAMETERS, "gathered parameters")),
    ("zero/partition_parameters.py", "all_gather_coalesced", (C.PARAMETERS, "gathered parameters")),
    ("zero/partition_parameters.py", "_all_gather", (C.PARAMETERS, "gathered parameters")),
    ("zero/partition_parameters.py", "wait", (C.PARAMETERS, "gathered parameters")),
    ("simulate/ranks.py", "_wait", (C.PARAMETERS, "gathered parameters")),
    ("zero/partition_parameters.py", "_partition_param", (C.PARAMETERS, "partitioned parameters")),
    ("zero/partition_parameters.py", "_partition_param_sec", (C.PARAMETERS, "secondary partitions")),
    ("zero/partition_parameters.py", "_partition_gradient", (C.GRADIENTS, "gradient partition")),
    ("zero/utils.py", "defragment", (C.PARAMETERS, "flat parameters")),
    ("simulate/ranks.py", "_reduce_scatter_coalesced", (C.BUFFERS, "reduce-scatter buffer")),
    ("comm/coalesced_collectives.py", "reduce_scatter_coalesced", (C.BUFFERS, "reduce-scatter buffer")),
    ("zero/stage3.py", "__avg_scatter_grads", (C.BUFFERS, "reduce-scatter buffer")),
    ("zero/stage3.py", "__avg_scatter_contiguous_grads", (C.BUFFERS, "reduce-scatter buffer")),
    ("zero/stage3.py", "allreduce_bucket", (C.BUFFERS, "all-reduce buffer")),
    ("zero/stage3.py", "_create_fp16_partitions_with_defragmentation", (C.PARAMETERS, "flat parameters")),
    ("zero/stage3.py", "_create_fp32_partitions", (C.MASTER_PARAMETERS, "master parameters")),
    ("zero/stage3.py", "_prepare_fp32_grad_for_sub_group", (C.MASTER_GRADIENTS, "gradients of a sub-group for the optimizer")),
    ("zero/stage3.py", "initialize_optimizer_states", (C.MASTER_GRADIENTS, "gradients for the first optimizer call")),
    ("zero/stage3.py", "get_grad_norm_direct", (C.WORKSPACE, "gradient norm")),
    ("zero/stage3.py", "_get_norm_groups", (C.WORKSPACE, "gradient norm")),
    ("zero/stage3.py", "has_overflow", (C.WORKSPACE, "overflow check")),
    ("zero/stage_1_and_2.py", "allreduce_bucket", (C.BUFFERS, "all-reduce buffer")),
    ("zero/stage_1_and_2.py", "average_tensor", (C.BUFFERS, "all-reduce buffer")),
    ("zero/stage_1_and_2.py", "reduce_independent_p_g_buckets_and_remove_grads", (C.BUFFERS, "reduce bucket")),
    ("zero/stage_1_and_2.py", "copy_grads_in_partition", (C.GRADIENTS, "gradient partition")),
    ("zero/stage_1_and_2.py", "get_flat_partition", (C.MASTER_GRADIENTS, "gradients for the optimizer")),
    ("zero/stage_1_and_2.py", "initialize_optimizer_states", (C.MASTER_GRADIENTS, "gradients for the first optimizer call")),
    ("zero/stage_1_and_2.py", "get_grad_norm_direct", (C.WORKSPACE, "gradient norm")),
    ("zero/stage_1_and_2.py", "scaled_global_norm", (C.WORKSPACE, "gradient norm")),
    ("zero/stage_1_and_2.py", "has_overflow", (C.WORKSPACE, "overflow check")),
    ("zero/stage_1_and_2.py", "flatten_dense_tensors_aligned", (C.PARAMETERS, "flat parameters")),
    ("zero/stage_1_and_2.py", "step", (C.MASTER_GRADIENTS, "gradients for the optimizer")),
    ("zero/stage_1_and_2.py", "__init__", (C.PARAMETERS, "flat parameters")),
    ("runtime/bf16_optimizer.py", "_setup_for_real_optimizer", (C.MASTER_PARAMETERS, "master parameters")),
    ("runtime/engine.py", "allreduce_bucket", (C.BUFFERS, "all-reduce buffer")),
    ("runtime/engine.py", "allreduce_no_retain", (C.BUFFERS, "all-reduce buffer")),
    ("runtime/engine.py", "_backward_post_hook", (C.ACTIVATIONS, "gradient of the model's output")),
    ("fp16/fused_optimizer.py", "step", (C.MASTER_GRADIENTS, "gradients for the optimizer")),
    ("fp16/unfused_optimizer.py", "step", (C.MASTER_GRADIENTS, "gradients for the optimizer")),
    ("adam/fused_adam.py", "step", (C.MOMENTUM, "optimizer states")),
    ("adam/cpu_adam.py", "step", (C.MOMENTUM, "optimizer states")),
    ("optim/adamw.py", "step", (C.WORKSPACE, "temporaries of the optimizer")),
    ("optim/adam.py", "step", (C.WORKSPACE, "temporaries of the optimizer")),
    ("simulate/shims.py", "_apply", (C.PARAMETERS, "the whole model")),
)  # fmt: skip
"""End of the file's path, function, and what it allocates (DeepSpeed 0.18.3 to 0.19.8). A function that is not there labels nothing."""

OF_PHASE = {
    None: C.OTHER,
    Phase.INIT: C.PARAMETERS,
    Phase.FORWARD: C.ACTIVATIONS,
    Phase.BACKWARD: C.ACTIVATIONS,
    Phase.STEP: C.WORKSPACE,
}
"""What is allocated in a phase by no known place: the model itself, activations and their gradients, temporaries of the step."""

_BY_NAME: dict[str, list[tuple[str, Label]]] = {}
for _path, _function, _label in PLACES:
    _BY_NAME.setdefault(_function, []).append((_path, _label))


class Labels:
    """Finds labels; remembers what each function was found to be."""

    def __init__(self) -> None:
        self._known: dict[CodeType, Label | None] = {}
        self._default: dict[tuple[Phase | None, Any], Label] = {}

    def label(self, operator: Any, phase: Phase | None) -> Label:
        """The label of what `operator` allocates now."""
        known = self._known
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code not in known:
                known[code] = _label_of(code)
            if (found := known[code]) is not None:
                return found
            frame = frame.f_back
        key = (phase, operator)
        if key not in self._default:
            self._default[key] = (OF_PHASE[phase], f"{_name(operator)} ({phase or 'between phases'})")
        return self._default[key]


def _label_of(code: CodeType) -> Label | None:
    path = PurePath(code.co_filename).as_posix()
    return next((label for end, label in _BY_NAME.get(code.co_name, ()) if path.endswith(end)), None)


def _name(operator: Any) -> str:
    """`aten.native_layer_norm.default` as `native_layer_norm`."""
    return str(operator).split(".")[1] if "." in str(operator) else str(operator)
