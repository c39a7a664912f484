"""What a storage is for, by the place that allocates it: the innermost function of DeepSpeed or
PyTorch that is known to allocate something with a name of its own; else the operator and the phase.

A label that the engine itself gives later (`engine.attribution`: it holds the storage as master
parameters, say) replaces this one.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from types import CodeType, FrameType
from typing import Any

from bf16prof.engine import labels
from bf16prof.vocabulary import Component, Label, Phase

C = Component

PLACES: tuple[tuple[str, str, Label], ...] = (
    ("zero/partition_parameters.py", "_all_gather_dtype", labels.ALL_GATHER_BUCKETS),
    ("zero/partition_parameters.py", "_all_gather_sequential", labels.GATHERED_PARAMETERS),
    ("zero/partition_parameters.py", "all_gather_coalesced", labels.GATHERED_PARAMETERS),
    ("zero/partition_parameters.py", "_all_gather", labels.GATHERED_PARAMETERS),
    ("zero/partition_parameters.py", "wait", labels.GATHERED_PARAMETERS),
    ("dry_run/ranks.py", "_wait", labels.GATHERED_PARAMETERS),
    ("zero/partition_parameters.py", "_partition_param", labels.PARTITIONED_PARAMETERS),
    ("zero/partition_parameters.py", "_partition_param_sec", labels.SECONDARY_PARTITIONS),
    ("zero/partition_parameters.py", "_partition_gradient", labels.GRADIENT_PARTITION),
    ("zero/utils.py", "defragment", labels.FLAT_PARAMETERS),
    ("dry_run/ranks.py", "_reduce_scatter_coalesced", labels.REDUCE_SCATTER_BUFFER),
    ("comm/coalesced_collectives.py", "reduce_scatter_coalesced", labels.REDUCE_SCATTER_BUFFER),
    ("zero/stage3.py", "__avg_scatter_grads", labels.REDUCE_SCATTER_BUFFER),
    ("zero/stage3.py", "__avg_scatter_contiguous_grads", labels.REDUCE_SCATTER_BUFFER),
    ("zero/stage3.py", "allreduce_bucket", labels.ALL_REDUCE_BUFFER),
    ("zero/stage3.py", "_create_fp16_partitions_with_defragmentation", labels.FLAT_PARAMETERS),
    ("zero/stage3.py", "_create_fp32_partitions", labels.MASTER_PARAMETERS),
    ("zero/stage3.py", "_prepare_fp32_grad_for_sub_group", labels.STEP_GRADIENTS),
    ("zero/stage3.py", "initialize_optimizer_states", labels.FIRST_GRADIENTS),
    ("zero/stage3.py", "get_grad_norm_direct", labels.GRADIENT_NORM),
    ("zero/stage3.py", "_get_norm_groups", labels.GRADIENT_NORM),
    ("zero/stage3.py", "has_overflow", labels.OVERFLOW_CHECK),
    ("zero/stage_1_and_2.py", "allreduce_bucket", labels.ALL_REDUCE_BUFFER),
    ("zero/stage_1_and_2.py", "average_tensor", labels.ALL_REDUCE_BUFFER),
    ("zero/stage_1_and_2.py", "setup_buckets", labels.REDUCE_BUCKET),
    ("zero/stage_1_and_2.py", "reduce_independent_p_g_buckets_and_remove_grads", labels.REDUCE_BUCKET),
    ("zero/stage_1_and_2.py", "copy_grads_in_partition", labels.GRADIENT_PARTITION),
    ("zero/stage_1_and_2.py", "get_flat_partition", labels.STEP_GRADIENTS),
    ("zero/stage_1_and_2.py", "initialize_optimizer_states", labels.FIRST_GRADIENTS),
    ("zero/stage_1_and_2.py", "get_grad_norm_direct", labels.GRADIENT_NORM),
    ("zero/stage_1_and_2.py", "scaled_global_norm", labels.GRADIENT_NORM),
    ("zero/stage_1_and_2.py", "has_overflow", labels.OVERFLOW_CHECK),
    ("zero/stage_1_and_2.py", "flatten_dense_tensors_aligned", labels.FLAT_PARAMETERS),
    ("zero/stage_1_and_2.py", "step", labels.STEP_GRADIENTS),
    ("zero/stage_1_and_2.py", "__init__", labels.FLAT_PARAMETERS),
    ("runtime/bf16_optimizer.py", "_setup_for_real_optimizer", labels.MASTER_PARAMETERS),
    ("runtime/engine.py", "allreduce_bucket", labels.ALL_REDUCE_BUFFER),
    ("runtime/engine.py", "allreduce_no_retain", labels.ALL_REDUCE_BUFFER),
    ("runtime/engine.py", "_backward_post_hook", (C.ACTIVATIONS, "gradient of the model's output")),
    ("fp16/fused_optimizer.py", "step", labels.STEP_GRADIENTS),
    ("fp16/unfused_optimizer.py", "step", labels.STEP_GRADIENTS),
    ("adam/fused_adam.py", "step", (C.MOMENTUM, "optimizer states")),
    ("adam/cpu_adam.py", "step", (C.MOMENTUM, "optimizer states")),
    ("optim/adamw.py", "step", labels.OPTIMIZER_TEMPORARIES),
    ("optim/adam.py", "step", labels.OPTIMIZER_TEMPORARIES),
    ("dry_run/shims.py", "_apply", labels.THE_MODEL),
)  # fmt: skip
"""End of the file's path, function, and what it allocates (DeepSpeed 0.18.3 to 0.19.8). A function
that is not there labels nothing."""

OF_PHASE = {
    None: C.OTHER,
    Phase.INIT: C.PARAMETERS,
    Phase.FORWARD: C.ACTIVATIONS,
    Phase.BACKWARD: C.ACTIVATIONS,
    Phase.STEP: C.WORKSPACE,
    Phase.EVAL: C.ACTIVATIONS,
}
"""What is allocated in a phase by no known place: the model itself, activations and their
gradients, temporaries of the step."""

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
