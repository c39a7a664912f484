"""What is alive between steps: DeepSpeed's own (`wrappers`) or megatron-core's, the model's
buffers, and a training loop's local variables of the last micro-batch (see `engine/training.py`).
"""

from __future__ import annotations

import math

from bf16prof.cases import Job
from bf16prof.closed_form.allocation import Storages, allocation
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.megatron import megatron_states
from bf16prof.closed_form.wrappers import model_states
from bf16prof.engine.batch import batch_spec
from bf16prof.engine.config import EngineFacts, dtype_bytes
from bf16prof.engine.labels import MODEL_BUFFERS, OWN_LOSS
from bf16prof.models.autograd.events import local_variable
from bf16prof.models.shapes import NoInventory
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.vocabulary import Component

SOURCE = "local variables of the training loop"

ELEMENT_BYTES = {"bool": 1, "int32": 4, "int64": 8, "float16": 2, "bfloat16": 2, "float32": 4}
"""By torch's names of the dtypes that a batch may have."""


def between_steps(job: Job, engine: Engine) -> list[Storages]:
    """Everything that is alive between two steps, in host memory as well."""
    outputs, loss, batch = kept_by_the_loop(job, engine)
    states = megatron_states(engine) if job.profile.is_for_megatron else model_states(engine)
    return [*states, *model_buffers(job, engine), *outputs, loss, *batch]


def kept_by_the_loop(job: Job, engine: Engine) -> tuple[list[Storages], Storages, list[Storages]]:
    """What the model returned, the loss, and the batch, of the last micro-step; a loop that does
    not keep outputs has none then, but the batches of all micro-steps."""
    workload, signature = job.profile.workload, engine.anatomy.signature
    outputs = {} if not workload.keeps_outputs else _outputs(job, engine.facts) if signature is None else dict(signature.outputs)
    loss = _loss_bytes(job, engine.facts) if signature is None else signature.loss_bytes
    if workload.keeps_outputs and job.case.sequence_parallel > 1:  # beside the mean over the ranks of a sequence
        outputs |= {OWN_LOSS: loss}
    count = 1 if workload.keeps_outputs else workload.gradient_accumulation_steps
    batch = {name.replace("_", " "): math.prod(each.shape) * ELEMENT_BYTES[each.dtype] for name, each in batch_spec(job).items()}
    return (
        [allocation(local_variable(name), size, SOURCE) for name, size in outputs.items()],
        allocation(local_variable("loss"), loss, SOURCE),
        [allocation(local_variable(name), [size] * count, SOURCE) for name, size in batch.items()],
    )


def _outputs(job: Job, facts: EngineFacts) -> dict[str, int]:
    """Logits [micro_batch, sequence, vocabulary] in the dtype of a Linear layer; transformers'
    models return them as their head does."""
    workload = job.profile.workload
    tokens = workload.micro_batch_size * workload.sequence_length // job.case.sequence_parallel
    return {"logits": dtype_bytes(facts.output_dtype) * tokens * job.profile.model.vocab_size}


def _loss_bytes(job: Job, facts: EngineFacts) -> int:
    """The loss of bf16 logits is bf16; under autocast `cross_entropy` runs and returns fp32, on
    CUDA and on CPU, and so does transformers' own (5.23.0, `loss/loss_utils.py`,
    ForCausalLMLoss)."""
    in_fp32 = facts.autocast_dtype != "none" or isinstance(job.profile.model, HuggingFaceSettings)
    return dtype_bytes("fp32" if in_fp32 else facts.parameter_dtype)


def model_buffers(job: Job, engine: Engine) -> list[Storages]:
    """What the model holds beside its parameters: as recorded, or as the skeleton of transformers'
    models says; our families have nothing.

    What no module has registered is named by the attribute that has it (`engine.attribution`).
    """
    if (signature := engine.anatomy.signature) is not None:
        held = [each.bytes for each in signature.held if each.is_registered]
        other = [each.bytes for each in signature.held if not each.is_registered]
    else:
        held, other = _of_the_skeleton(job, engine.facts)
    source = f"the model's own tensors, which {'megatron-core casts' if job.profile.is_for_megatron else 'DeepSpeed does not cast'}"
    return [
        allocation(MODEL_BUFFERS, held, source),
        allocation((Component.WORKSPACE, "tensors that modules keep as plain attributes"), other, source),
    ]


def _of_the_skeleton(job: Job, facts: EngineFacts) -> tuple[list[int], list[int]]:
    """Bytes of registered buffers and of others."""
    from bf16prof.models.shapes.huggingface import skeleton

    if not isinstance(job.profile.model, HuggingFaceSettings):
        return [], []
    try:
        buffers = skeleton(job.profile.model.hf_config).buffers
    except NoInventory:  # its parameters are those of a safetensors file
        return [], []
    usual = facts.parameter_dtype if job.profile.is_for_megatron else "fp32"
    of_a_value = facts.parameter_dtype if job.is_inside_zero_init else usual
    held = [dtype_bytes(of_a_value if b.is_value else usual) * b.numel for b in buffers if b.is_registered]
    return held, [dtype_bytes("fp32") * b.numel for b in buffers if not b.is_registered]
