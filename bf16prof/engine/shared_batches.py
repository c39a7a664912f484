"""What is asked of a job whose ranks share sequences or layers, or whose rows hold several
sequences, checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bf16prof.cases import Job
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings

NO_MASKS = "eager"
"""The attention that needs a mask of all tokens by all tokens, which Ulysses throws away."""


def shared_sequences(job: Job) -> str | None:
    """Why the ranks of this job cannot share sequences as they are asked to; `None` if they can, or
    do not have to.

    References are to runtime/sequence_parallel/ulysses_sp.py. What a configuration leaves to
    transformers is left to it here as well.
    """
    ranks, model, tokens = job.case.sequence_parallel, job.profile.model, job.profile.workload.sequence_length
    if ranks == 1:
        return None
    if not isinstance(model, HuggingFaceSettings) or model.inputs:
        return "ranks share sequences (--sp) of models of transformers that read token ids: DeepSpeed's Ulysses replaces their attention"
    if tokens % ranks:
        return f"a sequence of {tokens} tokens cannot be cut into {ranks} equal parts (--sp; UlyssesSPDataLoaderAdapter.refill)"
    if model.attention == NO_MASKS:
        return "DeepSpeed's Ulysses does not run eager attention (register_with_transformers)"
    return _heads(model.text, ranks)


def packed_rows(job: Job) -> str | None:
    """Why rows of this job cannot hold several sequences as they are asked to; `None` if they can,
    or do not have to."""
    model, workload = job.profile.model, job.profile.workload
    if not workload.packed_sequences:
        return None
    if not isinstance(model, HuggingFaceSettings) or model.inputs:
        return "sequences are packed (--packed-sequences) for models of transformers that read token ids and their positions"
    if workload.packed_sequences > workload.sequence_length:
        return f"{workload.packed_sequences} sequences (--packed-sequences) in a row of {workload.sequence_length} tokens"
    if workload.packed_sequences * workload.micro_batch_size == 1:
        return "one sequence is no packing (--packed-sequences): leave it out, or say a larger number"
    return next((f"--packed-sequences with {flag} is not modelled" for flag in job.case.parallelism.flags), None)


def preference(job: Job) -> str | None:
    """Why this job cannot train on pairs of answers as it is asked to; `None` if it can, or does
    not have to."""
    model, workload = job.profile.model, job.profile.workload
    if not workload.has_pairs:
        return None
    flag = "--reward" if workload.reward else "--dpo"
    if not isinstance(model, HuggingFaceSettings) or model.inputs:
        return f"{flag} trains models of transformers that read token ids"
    others = {
        "--dpo": workload.reward and workload.dpo != "none",
        "an evaluation": workload.evaluation is not None,
        "--packed-sequences": bool(workload.packed_sequences),
        "--fused-loss": workload.fused_loss != "none",
        "Liger's kernels": workload.liger != "none",
        **dict.fromkeys(job.case.parallelism.flags, True),
    }
    return next((f"{flag} with {words} is not modelled" for words, is_asked in others.items() if is_asked), None)


def shared_evaluation(job: Job) -> str | None:
    """Why this job cannot evaluate as it is asked to; `None` if it can, or does not have to."""
    if job.profile.workload.evaluation is None:
        return None
    words = "an evaluation (--eval-batch-size) with {} has not been held against real ranks"
    return next(map(words.format, job.case.parallelism.flags), None)


def fused_loss(job: Job) -> str | None:
    """Why head and loss of this job cannot be computed in tiles as they are asked to be; `None` if
    they can, or do not have to be."""
    workload = job.profile.workload
    if workload.fused_loss == "none":
        return None
    if workload.liger == "loss":
        return "two fused losses: workload.fused_loss and workload.liger name one each"
    if not isinstance(job.profile.model, HuggingFaceSettings) or job.profile.model.inputs:
        return "--fused-loss replaces head and loss of models of transformers that read token ids"
    return next((f"--fused-loss {workload.fused_loss} with {flag} is not modelled" for flag in job.case.parallelism.flags), None)


def shared_layers(job: Job) -> str | None:
    """Why the ranks of this job cannot share layers as they are asked to; `None` if they can, or do
    not have to."""
    if job.case.tensor_parallel == 1:
        return None
    if job.case.sequence_parallel > 1:
        return "--sp and --tp together: DeepSpeed's Ulysses brings groups of ranks in which AutoTP has none (utils/groups.py)"
    if not isinstance(job.profile.model, HuggingFaceSettings):
        return "ranks share layers (--tp) of models of transformers: DeepSpeed's AutoTP knows how to cut those"
    if job.profile.peft is not None:
        return "--tp with an adapter: AutoTP makes new parameters of layers that the optimizer already has (module_inject/auto_tp.py)"
    if job.profile.workload.liger != "none":
        return "--tp with Liger's fused loss: it reads the whole head, of which AutoTP leaves a rank a part"
    return None


def shared_stages(job: Job) -> str | None:
    """Why the layers of this job cannot be spread over the stages of a pipeline as it is asked;
    `None` if they can, or do not have to."""
    profile = job.profile
    if job.case.pipeline_parallel == 1:
        return None
    if job.case.sequence_parallel > 1 or job.case.tensor_parallel > 1:
        return "--pp with --sp or --tp: DeepSpeed's PipelineModule brings groups of ranks in which the others have none (runtime/pipe)"
    if isinstance(profile.model, HuggingFaceSettings):
        return (
            "a pipeline (--pp) needs a model that is a list of layers, which models of transformers are not: name a function that returns "
            "DeepSpeed's PipelineModule, or layers and a loss (MODULE:FUNCTION)"
        )
    if job.case.zero_stage > 1:
        return "a pipeline (--pp) works at ZeRO stages 0 and 1: ZeRO-2 and ZeRO-3 are incompatible with it (runtime/pipe/engine.py)"
    if profile.peft is not None or profile.workload.liger != "none" or profile.workload.tiled_mlp:
        return "--pp with an adapter, Liger's kernels or TiledMLP: these are put on models of transformers, which are no list of layers"
    return None


def spread_experts(job: Job) -> str | None:
    """Why experts cannot be spread over the ranks of this job as it is asked; `None` if they can,
    or do not have to."""
    case = job.case
    if case.expert_parallel == 1:
        return None
    if len(case.parallelism.flags) > 1:
        return "--ep with --sp, --tp or --pp: which ranks have an expert's copies then has not been held against real ranks"
    if not isinstance(job.profile.model, FactorySettings):
        return (
            "experts are spread over ranks (--ep) by DeepSpeed's MoE layers, which a function of your own builds (MODULE:FUNCTION); "
            "AutoEP, which spreads those of transformers' models, is not modelled"
        )
    if case.zero_stage == 3:
        return "DeepSpeed's MoE layers do not work at ZeRO-3: choose stage 0, 1 or 2 (runtime/engine.py, _validate_zero3_moe_compatibility)"
    return None


def _heads(config: Mapping[str, Any], ranks: int) -> str | None:
    """Each rank has some of the heads; fewer heads of keys and values than ranks are repeated."""
    heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and heads % ranks:
        return f"{heads} attention heads cannot be shared by {ranks} ranks (--sp; UlyssesSPAttentionHF)"
    if isinstance(shared, int) and shared > 0 and shared % ranks and ranks % shared:
        return f"{shared} heads of keys and values and {ranks} ranks (--sp): one must divide the other (UlyssesSPAttentionHF)"
    return None
