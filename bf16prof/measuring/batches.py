"""The batches of one rank as tensors: token streams for models that read tokens, random values for
inputs that are described.

Random values depend on the seed, the rank and the number of the batch: runs repeat, and ranks read
different values.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from bf16prof.cases import Job
from bf16prof.engine.batch import TensorSpec, batch_spec
from bf16prof.measuring.data import make_stream
from bf16prof.models.ulysses import IGNORED

if TYPE_CHECKING:
    from torch import Generator, Tensor

NextBatch = Callable[[], "dict[str, Tensor]"]


def make_batches(job: Job, rank: int, device_type: str, *, shifted: bool) -> NextBatch:
    """A function that gives the next batch, on the device. `shifted` labels are the next tokens;
    others are the tokens themselves.

    Ranks that share layers read the same: DeepSpeed checks it (runtime/engine.py,
    _configure_tensor_parallel_states).
    """
    reader, readers = job.case.parallelism.reader(rank), job.case.parallelism.data
    if job.profile.model.inputs:
        return _random_batches(batch_spec(job), job.profile.workload.seed, reader, device_type)
    if (ranks := job.case.sequence_parallel) > 1:
        whole = _token_batches(job, reader, readers, "cpu", shifted=True)
        return lambda: _part(whole(), rank % ranks, ranks, device_type)
    if job.profile.workload.has_pairs:
        return _pairs(_token_batches(job, reader, readers, "cpu", shifted=False), batch_spec(job), device_type)
    packed = job.profile.workload.packed_sequences
    rows = _token_batches(job, reader, readers, "cpu" if packed else device_type, shifted)
    return _packed(rows, packed, device_type) if packed else rows


def _part(whole: dict[str, Tensor], number: int, ranks: int, device_type: str) -> dict[str, Tensor]:
    """The part of a batch that one of the ranks that share its sequences has, with the positions of
    its tokens."""
    import torch

    tokens = whole["input_ids"]
    positions = torch.arange(tokens.shape[1]).expand(tokens.shape)
    cut = {"input_ids": tokens, "position_ids": positions, "shift_labels": whole["labels"]}
    return {name: tensor.chunk(ranks, dim=1)[number].contiguous().to(device_type) for name, tensor in cut.items()}


def _pairs(rows: NextBatch, specs: Mapping[str, TensorSpec], device_type: str) -> NextBatch:
    """Two rows to a pair, whose first half is the question; rejected answers are a token shorter,
    so that there is padding."""
    import torch

    def next_batch() -> dict[str, Tensor]:
        tokens = torch.cat([rows()["input_ids"], rows()["input_ids"]])
        attended, answers = torch.ones_like(tokens), torch.ones_like(tokens)
        attended[len(tokens) // 2 :, -1] = 0
        answers[:, : tokens.shape[1] // 2] = 0
        made = {"input_ids": tokens, "attention_mask": attended, "completion_mask": answers * attended}
        return {name: made.get(name, torch.zeros(spec.shape)).to(device_type) for name, spec in specs.items()}

    return next_batch


def _packed(rows: NextBatch, sequences: int, device_type: str) -> NextBatch:
    """Rows as one, each cut into so many sequences; the first token of a sequence is nobody's
    label."""
    import torch

    def next_batch() -> dict[str, Tensor]:
        batch = rows()
        count, length = batch["input_ids"].shape
        starts = [number * length // sequences for number in range(sequences)]
        first = torch.zeros(length, dtype=torch.long)
        first[starts] = torch.tensor(starts)
        positions = (torch.arange(length) - first.cummax(0).values).repeat(count)
        labels = batch["labels"].reshape(-1).where(positions != 0, IGNORED)
        flat = {"input_ids": batch["input_ids"].reshape(-1), "labels": labels, "position_ids": positions}
        return {name: tensor[None].to(device_type) for name, tensor in flat.items()}

    return next_batch


def _token_batches(job: Job, rank: int, world_size: int, device_type: str, shifted: bool) -> NextBatch:
    import torch

    workload = job.profile.workload
    stream = make_stream(
        workload.data,
        vocab_size=job.profile.model.vocab_size,
        sequence_length=workload.sequence_length,
        micro_batch_size=workload.micro_batch_size,
        rank=rank,
        world_size=world_size,
        seed=workload.seed,
    )

    def next_batch() -> dict[str, Tensor]:
        inputs, labels = stream.next_batch()
        return {"input_ids": torch.tensor(inputs).to(device_type), "labels": torch.tensor(labels if shifted else inputs).to(device_type)}

    return next_batch


def _random_batches(specs: Mapping[str, TensorSpec], seed: int, rank: int, device_type: str) -> NextBatch:
    import torch

    numbers = itertools.count()

    def next_batch() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(random.Random(f"{seed}:inputs:{rank}:{next(numbers)}").getrandbits(63))
        return {name: _random_tensor(spec, generator).to(device_type) for name, spec in specs.items()}

    return next_batch


def _random_tensor(spec: TensorSpec, generator: Generator) -> Tensor:
    """Integers below the bound, truth values, or normally distributed numbers."""
    import torch

    dtype: torch.dtype = getattr(torch, spec.dtype)
    if dtype.is_floating_point:
        return torch.randn(spec.shape, generator=generator).to(dtype)
    return torch.randint(spec.high or 2, spec.shape, generator=generator).to(dtype)
