"""What a training loop keeps alive between steps: its local variables of the last micro-batch (see `engine/training.py`)."""

from __future__ import annotations

from bf16prof.engine.config import EngineFacts, dtype_bytes
from bf16prof.estimate.allocation import Allocation, allocation
from bf16prof.profiles.schema import Profile
from bf16prof.records import Component

TOKEN_BYTES = 8
"""Token ids are int64."""


def kept_by_the_loop(profile: Profile, facts: EngineFacts) -> list[Allocation]:
    """Logits [micro_batch, sequence, vocabulary], the loss, token ids and labels, in the dtypes that the recipe gives them.

    The loss of bf16 logits is bf16; under autocast `cross_entropy` runs and returns fp32, on CUDA and on CPU.
    """
    tokens = profile.workload.micro_batch_size * profile.workload.sequence_length
    logits = dtype_bytes(facts.output_dtype) * tokens * profile.model.vocab_size
    loss = dtype_bytes(facts.parameter_dtype if facts.autocast_dtype == "none" else "fp32")
    sizes = {"logits": logits, "loss": loss, "input ids": TOKEN_BYTES * tokens, "labels": TOKEN_BYTES * tokens}
    source = "local variables of the training loop"
    return [allocation(Component.ACTIVATIONS, f"{name} kept by the training loop", size, source) for name, size in sizes.items()]
