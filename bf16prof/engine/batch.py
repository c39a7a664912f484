"""What a job's model is called with: names, shapes and dtypes of the tensors of one micro-batch,
without torch.

Whoever makes batches - ranks with values, the dry run without - makes them of this.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.engine.engines import engine_of
from bf16prof.profiles.models import InputSettings

TORCH_NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""What torch calls the dtypes that profiles call otherwise."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its shape, torch's name of its dtype, and the bound below which integers lie
    (`None` for all else)."""

    shape: tuple[int, ...]
    dtype: str
    high: int | None = None


def batch_spec(job: Job) -> dict[str, TensorSpec]:
    """The tensors of a micro-batch by name: the inputs that the model's table describes, else
    `input_ids` and `labels`.

    Packed rows are one, with positions that start again where a sequence does
    (transformers/data/data_collator.py, DataCollatorWithFlattening). Ranks that share a sequence
    have a part of its tokens each, where these are in it, and labels that were shifted before it
    was cut (DeepSpeed: runtime/sequence_parallel/ulysses_sp.py, UlyssesSPDataLoaderAdapter).
    """
    model, workload = job.profile.model, job.profile.workload
    if model.inputs:
        return {name: _described(described, job) for name, described in model.inputs.items()}
    if workload.has_pairs:
        return _pairs(job)
    rows, length = workload.micro_batch_size, workload.sequence_length // job.case.sequence_parallel
    shape = (1, rows * length) if workload.packed_sequences else (rows, length)
    tokens = TensorSpec(shape, "int64", model.vocab_size)
    if job.case.sequence_parallel > 1:
        return {"input_ids": tokens, "position_ids": tokens, "shift_labels": tokens}
    batch = {"input_ids": tokens, "labels": tokens}
    return batch | {"position_ids": tokens} if workload.packed_sequences else batch


def _pairs(job: Job) -> dict[str, TensorSpec]:
    """Both answers of each pair as rows (trl/trainer/dpo_trainer.py and reward_trainer.py,
    DataCollatorForPreference)."""
    model, workload = job.profile.model, job.profile.workload
    shape = (workload.rows, workload.sequence_length)
    batch = {"input_ids": TensorSpec(shape, "int64", model.vocab_size)}
    masks = ("attention_mask",) if workload.reward else ("attention_mask", "completion_mask")
    batch |= {name: TensorSpec(shape, "int64", 2) for name in masks}
    if workload.dpo == "precomputed":
        batch |= {f"reference_{name}": TensorSpec((workload.micro_batch_size,), "float32") for name in ("chosen", "rejected")}
    return batch


def evaluation_of(job: Job) -> Job:
    """The job with the batches of its evaluation in the place of its micro-batches."""
    workload = job.profile.workload
    assert workload.evaluation is not None, "only a job that evaluates has one"
    batch = workload.model_copy(update={"micro_batch_size": workload.evaluation.per_device_eval_batch_size})
    return dataclasses.replace(job, profile=job.profile.model_copy(update={"workload": batch}))


def _described(described: InputSettings, job: Job) -> TensorSpec:
    workload = job.profile.workload
    words = {"micro_batch": workload.micro_batch_size, "sequence": workload.sequence_length}
    shape = tuple(words[extent] if isinstance(extent, str) else extent for extent in described.shape)
    dtype: str = described.dtype
    if dtype == "parameters":
        dtype = engine_of(job).facts(job).parameter_dtype
    is_integer = dtype in ("int32", "int64")
    return TensorSpec(shape, TORCH_NAMES.get(dtype, dtype), (described.high or job.profile.model.vocab_size) if is_integer else None)
