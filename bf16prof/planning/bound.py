"""What a job needs at least in whatever way its ranks share the work: a lower bound of its peak
from few rules, each of which is exact.

It orders the ways that a search tries, and leaves out those that cannot fit. What it leaves out of
account (buckets, gathered parameters, what a layer makes while it runs) only makes a job larger.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.closed_form.engine import FP32_BYTES, Engine
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.wrappers import model_states
from bf16prof.engine import labels
from bf16prof.engine.config import deepspeed_config, dtype_bytes, engine_facts
from bf16prof.planning.ways import sizes_of
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.vocabulary import Component

CUT_FROM = {
    Component.PARAMETERS: 3,
    Component.BUFFERS: 3,
    Component.GRADIENTS: 2,
    Component.MASTER_PARAMETERS: 1,
    Component.MOMENTUM: 1,
    Component.VARIANCE: 1,
    Component.COMPENSATION: 1,
}
"""From which ZeRO stage on a rank has as much of these however ranks share the work: an equal part
of all, or a bucket of a set size.

All else, and these at lower stages, a rank has for its own layers, its part of them, or its own
experts. What is not divided (norms) makes it more, never less."""

NEVER = 4
"""A stage that there is not."""

AT_LEAST = {True: 1, False: 2}
"""Tensors as wide as the model that a layer keeps for each token, by whether it is recomputed: its
input, and that of its second half."""

OF_THE_LOSS = 2
"""Tensors of a word for each token that backward of cross entropy has at once: what log-softmax
saved, and its gradient."""


def states_of(job: Job) -> Mapping[Component, int]:
    """What a job whose ranks share nothing holds of its model between steps, on the GPU, by
    component; empty where it is not known.

    Without what stage 3 leaves gathered: which parameters are small enough depends on how ranks
    share them.
    """
    if closed_form_gap(job):
        return {}
    found: dict[Component, int] = {}
    for each in model_states(Engine.of(job)):
        if not each.on_host and each.label != labels.PERSISTENT_PARAMETERS:
            component, _ = each.label
            found[component] = found.get(component, 0) + each.bytes
    return found


@dataclass(frozen=True)
class Least:
    """What the peak of a job is not below: what it holds between steps, and what it keeps for
    backward."""

    held_bytes: int
    kept_bytes: int

    @property
    def bytes(self) -> int:
        """Both, which are there together when backward begins."""
        return self.held_bytes + self.kept_bytes


def least_of(job: Job, states: Mapping[Component, int]) -> Least:
    """The bound of a job. `states`: of the same job, had its ranks shared nothing (`states_of`)."""
    case = job.case
    parts = case.tensor_parallel * case.pipeline_parallel * case.expert_parallel
    held = sum(size // (1 if case.zero_stage >= CUT_FROM.get(component, NEVER) else parts) for component, size in states.items())
    return Least(held, _activations(job))


def _activations(job: Job) -> int:
    """When backward begins: what every layer keeps, and the logits unless head and loss are one.

    Of a pipeline's stages, which need not be equal, the largest peak is not below the mean.
    """
    case, workload, sizes = job.case, job.profile.workload, sizes_of(job.profile)
    if sizes is None:
        return 0
    tokens = workload.micro_batch_size * workload.sequence_length // case.sequence_parallel
    width = dtype_bytes(engine_facts(deepspeed_config(job)).parameter_dtype)
    kept = AT_LEAST[workload.activation_checkpointing] * sizes.layers // case.pipeline_parallel
    is_fused = workload.liger != "none" or workload.fused_loss != "none" or workload.has_pairs  # whose losses are of other tensors
    shared = case.tensor_parallel * case.pipeline_parallel
    loss = 0 if is_fused else OF_THE_LOSS * _logit_bytes(job, width) * tokens * sizes.vocabulary // shared
    return kept * tokens * sizes.hidden * width + loss


def _logit_bytes(job: Job, width: int) -> int:
    """transformers computes the loss of fp32 logits (`loss/loss_utils.py`, ForCausalLMLoss);
    families do of their own dtype."""
    return max(width, FP32_BYTES) if isinstance(job.profile.model, HuggingFaceSettings) else width
