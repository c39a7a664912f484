"""What a job's model is called with: names, shapes and dtypes of the tensors of one micro-batch, without torch.

Whoever makes batches - ranks with values, the dry run without - makes them of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.engine.config import deepspeed_config, engine_facts
from bf16prof.profiles.models import InputSettings

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What torch calls the dtypes that profiles call otherwise."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its shape, torch's name of its dtype, and the bound below which integers lie (`None` for all else)."""

    shape: tuple[int, ...]
    dtype: str
    high: int | None = None


def batch_spec(job: Job) -> dict[str, TensorSpec]:
    """The tensors of a micro-batch by name: the inputs that the model's table describes, else `input_ids` and `labels`.

    Ranks that share a sequence have a part of its tokens each, where these are in it, and labels that were shifted before it was cut
    (DeepSpeed: runtime/sequence_parallel/ulysses_sp.py, UlyssesSPDataLoaderAdapter).
    """
    model, workload = job.profile.model, job.profile.workload
    if model.inputs:
        return {name: _described(described, job) for name, described in model.inputs.items()}
    tokens = TensorSpec((workload.micro_batch_size, workload.sequence_length // job.case.sequence_parallel), "int64", model.vocab_size)
    if job.case.sequence_parallel > 1:
        return {"input_ids": tokens, "position_ids": tokens, "shift_labels": tokens}
    return {"input_ids": tokens, "labels": tokens}


def _described(described: InputSettings, job: Job) -> TensorSpec:
    workload = job.profile.workload
    words = {"micro_batch": workload.micro_batch_size, "sequence": workload.sequence_length}
    shape = tuple(words[extent] if isinstance(extent, str) else extent for extent in described.shape)
    dtype: str = described.dtype
    if dtype == "parameters":
        dtype = engine_facts(deepspeed_config(job)).parameter_dtype
    is_integer = dtype in ("int32", "int64")
    return TensorSpec(shape, TORCH_NAMES.get(dtype, dtype), (described.high or job.profile.model.vocab_size) if is_integer else None)
