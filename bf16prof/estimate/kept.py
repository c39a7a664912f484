"""What is alive between steps: DeepSpeed's own (`steady`), the model's buffers, and a training loop's local variables of the last
micro-batch (see `engine/training.py`).
"""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.engine.config import EngineFacts, dtype_bytes
from bf16prof.engine.labels import MODEL_BUFFERS
from bf16prof.estimate.allocation import Allocation, allocation
from bf16prof.estimate.steady import Engine, model_states
from bf16prof.models.autograd.operators import TOKEN_BYTES
from bf16prof.models.autograd.tape import local_variable
from bf16prof.models.shapes import NoInventory
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.schema import Profile
from bf16prof.records import Component, Device
from bf16prof.rounding import round_up


def between_steps(job: Job, engine: Engine) -> list[Allocation]:
    """Everything that is alive between two steps, in host memory as well."""
    return [*model_states(engine), *model_buffers(job, engine.facts), *kept_by_the_loop(job.profile, engine.facts)]


def kept_by_the_loop(profile: Profile, facts: EngineFacts) -> list[Allocation]:
    """Logits [micro_batch, sequence, vocabulary], the loss, token ids and labels, in the dtypes that the recipe gives them.

    The loss of bf16 logits is bf16; under autocast `cross_entropy` runs and returns fp32, on CUDA and on CPU. transformers' models return
    the logits as their head gives them, and a loss in fp32 (5.23.0, `loss/loss_utils.py`, ForCausalLMLoss).

    A loop that does not keep outputs has no logits then, but the token ids and labels of all micro-batches of the step.
    """
    workload = profile.workload
    tokens = workload.micro_batch_size * workload.sequence_length
    logits = dtype_bytes(facts.output_dtype) * tokens * profile.model.vocab_size
    in_fp32 = facts.autocast_dtype != "none" or isinstance(profile.model, HuggingFaceSettings)
    loss = dtype_bytes("fp32" if in_fp32 else facts.parameter_dtype)
    ids = [TOKEN_BYTES * tokens] * (1 if workload.keeps_outputs else workload.gradient_accumulation_steps)
    sizes = {"logits": [logits] * workload.keeps_outputs, "loss": [loss], "input ids": ids, "labels": ids}
    source = "local variables of the training loop"
    return [allocation(local_variable(name), each, source) for name, each in sizes.items() if each]


def model_buffers(job: Job, facts: EngineFacts) -> list[Allocation]:
    """The buffers of a model of transformers', where its skeleton is known; our families have none.

    What no module has registered is what attribution leaves unexplained, on a GPU in whole blocks.
    """
    from bf16prof.models.shapes.huggingface import skeleton

    if not isinstance(job.profile.model, HuggingFaceSettings):
        return []
    try:
        buffers = skeleton(job.profile.model.hf_config).buffers
    except NoInventory:  # its parameters are those of a safetensors file
        return []
    of_a_value = facts.parameter_dtype if job.is_inside_zero_init else "fp32"
    block = ALLOCATOR_BLOCK_BYTES if job.device is Device.GPU else 1
    held = [dtype_bytes(of_a_value if b.is_value else "fp32") * b.numel for b in buffers if b.is_registered]
    other = [round_up(dtype_bytes("fp32") * b.numel, block) for b in buffers if not b.is_registered]
    source = "the model's own tensors, which DeepSpeed does not cast"
    return [
        allocation(MODEL_BUFFERS, held, source),
        allocation((Component.OTHER, "tensors that modules keep as plain attributes"), other, source),
    ]
