"""Which jobs have a closed form: a model that only the code of others can build, or a part of its
engine that is not modelled, has none."""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import anatomy_of, is_of_a_header, is_written, why_not_recorded, without_rule
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.wrappers import wrapper_of
from bf16prof.engine.config import (
    BasicOptimizer,
    EngineFacts,
    deepspeed_config,
    engine_facts,
    optimizer_settings,
)
from bf16prof.models.shapes import NoInventory
from bf16prof.profiles.features import with_effect
from bf16prof.profiles.recipes import DS_CONFIG
from bf16prof.profiles.schema import OptimizerSettings, WorkloadSettings
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.vocabulary import Device

ADAM_PARAMS = {*OptimizerSettings.model_fields, "adam_w_mode", "bias_correction"}


def closed_form_gap(job: Job) -> str | None:
    """Why this job has no closed form; `None` if it has one."""
    if gap := without_rule(job):
        return gap
    try:
        anatomy_of(job)
    except NoInventory as error:
        return error.message
    return _graph_gap(job.profile.workload) or (None if job.profile.is_for_megatron else _deepspeed_gap(job))


def _deepspeed_gap(job: Job) -> str | None:
    """What of DeepSpeed's is not modelled."""
    if job.recipe.id == DS_CONFIG:
        return "the DeepSpeed JSON describes a precision that is no recipe's"
    config = deepspeed_config(job)
    if gap := _adapter_gap(job, engine_facts(config)):
        return gap
    if engine_facts(config).optimizer is BasicOptimizer.OTHER:
        return f"the optimizer {config['optimizer'].get('type')!r:.60} is not modelled"
    params = sorted(set(optimizer_settings(config)) - ADAM_PARAMS)
    unknown = [f"optimizer.params.{name}" for name in params] + list(with_effect(job.profile.deepspeed.more))
    return f"DeepSpeed's {unknown[0]:.120} is not modelled" if unknown else None


def _adapter_gap(job: Job, facts: EngineFacts) -> str | None:
    """An adapter in another dtype than the model: DeepSpeed casts nothing that was built inside
    `zero.Init` (runtime/engine.py, _cast_module_mixed_precision), and PEFT makes adapters fp32."""
    adapter = job.profile.peft
    if adapter is None or not (adapter.autocast_adapter_dtype and job.is_inside_zero_init) or facts.parameter_dtype == "fp32":
        return None
    return f"inside deepspeed.zero.Init the {adapter.method} weights stay fp32 beside {facts.parameter_dtype} (peft.autocast_adapter_dtype)"


def _graph_gap(workload: WorkloadSettings) -> str | None:
    """A loop that keeps the loss keeps its graph, which a reentrant checkpoint leaves arguments in
    (torch/utils/checkpoint.py, CheckpointFunction)."""
    if workload.activation_checkpointing and workload.use_reentrant and workload.keeps_outputs:
        return "what reentrant checkpointing leaves in the graph of a loss that the loop keeps is not modelled (workload.keeps_outputs)"
    return None


def peaks_gap(job: Job, engine: Engine) -> str | None:
    """Why the peaks of this job have no closed form, though its steady state has one; `None` if
    they have.

    What was never held against the dry run is not predicted.
    """
    if job.case.sequence_parallel > 1:
        return SHARED
    return _pass_gap(job, engine) or init_gap(job, engine)


def init_gap(job: Job, engine: Engine) -> str | None:
    """The same of init alone, which runs no pass of the model."""
    if job.profile.is_for_megatron:
        return OF_MEGATRON
    if engine.device is Device.CPU and engine.anatomy.signature is None:
        return store.problem(Inquiry.of(job)) or f"scratch memory of CPU kernels shows in a recorded pass only; {why_not_recorded(job)}"
    facts = engine.facts
    if facts.layout and facts.layout.temporaries in {"all", str(engine.device)}:
        return f"the temporaries of {facts.layout.class_}'s update are not modelled"
    return wrapper_of(engine).gap()


def evaluation_gap(job: Job) -> str | None:
    """Why the peak of this job's evaluation has no closed form; `None` if there is none, or it does
    not exceed that of a forward pass.

    With no more sequences than a micro-batch has, and losses alone kept, it holds what a forward
    pass does but for what is there for backward.
    """
    evaluation, workload = job.profile.workload.evaluation, job.profile.workload
    if evaluation is None:
        return None
    if not evaluation.prediction_loss_only:
        return "an evaluation that keeps logits"
    if evaluation.per_device_eval_batch_size > workload.micro_batch_size:
        return f"an evaluation of {evaluation.per_device_eval_batch_size} sequences (a micro-batch has {workload.micro_batch_size})"
    return None


OF_MEGATRON = "what megatron-core holds within a step is left to the dry run"

SHARED = "what ranks that share sequences (--sp) hold in a step has no exact rule"


def work_gap(job: Job, engine: Engine) -> str | None:
    """Why it is not known what a step of this job has to do, though its steady state is; `None` if
    it is."""
    if job.case.sequence_parallel > 1:
        return "the work of ranks that share sequences (--sp) is not counted"
    return _pass_gap(job, engine) or wrapper_of(engine).work_gap()


def _pass_gap(job: Job, engine: Engine) -> str | None:
    """Why the operators of this model are not known, or what the engine does at them."""
    if job.profile.is_for_megatron:
        return OF_MEGATRON
    if (signature := engine.anatomy.signature) is not None:
        return signature.problem or None
    if is_written(job.profile):
        return None
    if is_of_a_header(job.profile.model):
        return "a safetensors file lists parameters, and not what is computed with them"
    return store.problem(Inquiry.of(job)) or f"peaks show in a pass of the model's own code only; {why_not_recorded(job)}"
