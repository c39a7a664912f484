"""A plan written down: the DeepSpeed JSON, what it cannot say, and the flags that run the plan
dry."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bf16prof.cases import offload_of
from bf16prof.engine.client import client_keywords
from bf16prof.engine.config import cast_dtype, client_optimizer, deepspeed_config, handed_to_deepspeed
from bf16prof.engine.workload import optimizer_words
from bf16prof.planning.judge import Judged
from bf16prof.planning.kept_keys import brings_optimizer, laid_over
from bf16prof.plans import Room
from bf16prof.profiles.auto import ACCUMULATION, MICRO
from bf16prof.profiles.features import AUTO
from bf16prof.profiles.schema import ParallelSettings, Profile, WorkloadSettings
from bf16prof.vocabulary import Offload

OUR_OWN = ("steps_per_print",)
"""Keys that our runs set for themselves."""


def ds_config_text(choice: Judged, content: Mapping[str, Any] | None = None) -> str:
    """The JSON, as DeepSpeed reads it. With the content of the user's own file, that one with the
    plan laid over it: it keeps its keys."""
    config = {key: value for key, value in handed_to_deepspeed(deepspeed_config(choice.job)).items() if key not in OUR_OWN}
    config = {"train_batch_size": choice.plan.train_batch_size, **config}
    if content is not None:
        config = laid_over(content, config, choice.job.profile)
    return json.dumps(config, indent=2, allow_nan=False) + "\n"


def flags(choice: Judged, room: Room, given: Profile) -> list[str]:
    """The flags that say the plan to `simulate`; what is trained comes before them. `given`: the
    profile that they make of it, which may offload."""
    plan = choice.plan
    case = plan.case
    said = [*plan.chosen, "--zero", str(case.zero_stage), "--gpus", str(case.world_size), "--recipe", case.recipe, "--gpu", room.gpu]
    said += ["--offload", str(case.offload)] if {case.offload, offload_of(given)} != {Offload.NONE} else []
    said += ["--micro-batch-size", str(plan.micro_batch_size), "--gradient-accumulation-steps", str(plan.gradient_accumulation_steps)]
    said += ["--activation-checkpointing" if plan.activation_checkpointing else "--no-activation-checkpointing"]
    said += ["--expandable-segments"] if room.expandable else []
    return said + (["--zero-init"] if plan.zero_init else ["--no-zero-init"] if case.zero_stage == 3 else [])


def launch_line(choice: Judged, gpus_per_node: int, file: str) -> str:
    """How DeepSpeed's launcher starts the plan, of a script of the user's own: on as few nodes as
    have equal parts of the ranks."""
    ranks = choice.plan.case.world_size
    each = next(count for count in range(min(ranks, gpus_per_node), 0, -1) if ranks % count == 0)
    nodes = f"--num_nodes {ranks // each} " if ranks > each else ""
    return f"deepspeed {nodes}--num_gpus {each} train.py --deepspeed_config {file}"


def _of_shared_work(parallel: ParallelSettings) -> list[str]:
    """What a script does where ranks share the work, beside what the JSON says of it."""
    said = []
    if parallel.sequence > 1:
        said.append(
            f"UlyssesSPAttentionHF.register_with_transformers(..., sequence_parallel_size={parallel.sequence}), its mpu handed to "
            "deepspeed.initialize, and batches cut along the tokens"
        )
    if parallel.pipeline > 1:
        said.append(f"a PipelineModule of {parallel.pipeline} stages, and engine.train_batch")
    if parallel.expert > 1:
        said.append(f"MoE layers with ep_size={parallel.expert}")
    return said


def _of_the_loop(workload: WorkloadSettings) -> list[str]:
    """What a script does with its batches, its model and its loss, which no DeepSpeed JSON says."""
    found = {
        f"rows of {workload.packed_sequences} packed sequences": workload.packed_sequences,
        "DeepSpeed's TiledMLP on the model": workload.tiled_mlp,
        "DeepSpeed's TiledFusedLogitsLoss in the place of head and loss": workload.fused_loss != "none",
        f"pairs of answers (DPO, {workload.dpo})": workload.dpo != "none",
        "pairs of answers, and the loss of a reward model": workload.reward,
    }
    return [words for words, is_asked in found.items() if is_asked]


def outside_the_config(choice: Judged, content: Mapping[str, Any] | None = None) -> list[str]:
    """What the plan needs of the training script, because the DeepSpeed JSON does not say it;
    `content` is that of the user's own file."""
    plan, config = choice.plan, deepspeed_config(choice.job)
    said = [f"sequences of {plan.sequence_length} tokens"]
    said.append(f"activation checkpointing {'on' if plan.activation_checkpointing else 'off'} in the model")
    profile = choice.job.profile
    said += [f"{profile.peft.words}, which PEFT puts on the model"] if profile.peft else []
    said += [f"Liger's kernels ({profile.workload.liger})"] if profile.workload.liger != "none" else []
    said += _of_the_loop(profile.workload)
    said += _of_shared_work(profile.parallel)
    if dtype := cast_dtype(config):
        said.append(f"the model cast to {dtype} before deepspeed.initialize")
    if layout := client_optimizer(config):
        keywords = ", ".join(f"{key}={value}" for key, value in client_keywords(config, layout).items())
        said.append(f"deepspeed.initialize(optimizer={layout.class_}(..., {keywords}))")
    if content is not None and brings_optimizer(content, choice.job.profile):
        said.append(f"the optimizer that the Trainer makes: {optimizer_words(config)}")
    if content is not None and AUTO in (content.get(MICRO), content.get(ACCUMULATION)):
        sizes = f"per_device_train_batch_size={plan.micro_batch_size}, gradient_accumulation_steps={plan.gradient_accumulation_steps}"
        said.append(f"TrainingArguments({sizes}), for the Trainer stops where they differ")
    return said + (["the model built inside deepspeed.zero.Init(config_dict_or_path=...)"] if plan.zero_init else [])
