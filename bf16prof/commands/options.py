"""The flags that subcommands share, and how their values are written; what they mean together is in
`request.py`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bf16prof.errors import InputError
from bf16prof.reports.figure_names import DEFAULT_FIGURE, FIGURES
from bf16prof.vocabulary import Device, Offload

PANELS = SELECT, TRAIN, WHERE, SCRIPT, OUTPUT = (
    "What to look at", "What is trained", "Where it runs", "Your own script (after --)", "Output",
)  # fmt: skip
if TYPE_CHECKING:
    # What a caller in Python may write for a list on the command line: gpus=8, zero=[2, 3],
    # device="cpu".
    Numbers = str | int | Sequence[int]
    Words = str | Sequence[str]
    DeviceName = Device | str
else:
    # What typer parses, and what `flags.called` makes of it.
    Numbers, Words, DeviceName = str, str, Device


SubjectArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        show_default=False,
        help="A preset, a profile (TOML), a config.json, its folder, a Hugging Face id, or MODULE:FUNCTION.",
    ),
]
ProfileOption = Annotated[
    str, typer.Option("--profile", "-p", envvar="BF16PROF_PROFILE", help="A preset's name or a TOML file.", rich_help_panel=SELECT)
]
ZeroOption = Annotated[Numbers, typer.Option("--zero", envvar="BF16PROF_ZERO", help="ZeRO stages, as 0,1,2,3.", rich_help_panel=SELECT)]
RecipeOption = Annotated[
    Words,
    typer.Option(
        "--recipe", "-r", envvar="BF16PROF_RECIPE", help="Precision recipes, as a,b (bf16prof recipes list).", rich_help_panel=SELECT
    ),
]
DEFAULT_PROFILE = "deepspeed-bf16-example"
"""What is trained where the user names no profile: also whose workload, where the user names a
model only."""

DEFAULT_GPU = "h100-80gb"

GpusOption = Annotated[Numbers, typer.Option("--gpus", envvar="BF16PROF_GPUS", help="Numbers of GPUs (ranks).", rich_help_panel=SELECT)]
GpuOption = Annotated[str, typer.Option("--gpu", envvar="BF16PROF_GPU", help="The GPU to fit.", rich_help_panel=SELECT)]
DeviceOption = Annotated[
    DeviceName, typer.Option("--device", help="Predict a GPU, or CPU ranks on a machine like this.", rich_help_panel=SELECT)
]
OffloadOption = Annotated[
    Offload | None,
    typer.Option(
        "--offload", envvar="BF16PROF_OFFLOAD", help="What stays in host memory; as in the profile if not given.", rich_help_panel=SELECT
    ),
]
PerNodeOption = Annotated[
    int,
    typer.Option("--gpus-per-node", min=1, envvar="BF16PROF_GPUS_PER_NODE", help="GPUs that share a node.", rich_help_panel=SELECT),
]
CalibrateOption = Annotated[
    Path | None,
    typer.Option(
        "--calibrate", metavar="RUN", help="Predict step times from the measured steps of a run directory.", rich_help_panel=SELECT
    ),
]
ExpandableOption = Annotated[
    bool,
    typer.Option(
        "--expandable-segments", help="The allocator as PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True.", rich_help_panel=SELECT
    ),
]
HfConfigOption = Annotated[
    str | None,
    typer.Option(
        "--hf-config",
        metavar="FILE|ID",
        envvar="BF16PROF_HF_CONFIG",
        help="Train this Hugging Face model instead: a config.json, its folder, or an id in the local cache.",
        rich_help_panel=TRAIN,
    ),
]
DownloadOption = Annotated[
    bool,
    typer.Option("--download", help="Fetch a config.json, or a dataset (hf:NAME), that the local cache lacks.", rich_help_panel=TRAIN),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        envvar="BF16PROF_MODEL",
        help="Train the module that your function returns instead.",
        rich_help_panel=TRAIN,
    ),
]
DsConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--ds-config",
        metavar="FILE",
        envvar="BF16PROF_DS_CONFIG",
        help="Your DeepSpeed JSON, with its stage and precision, instead of the profile's [deepspeed].",
        rich_help_panel=TRAIN,
    ),
]
TrainingArgsOption = Annotated[
    Path | None,
    typer.Option(
        "--training-args",
        metavar="FILE",
        envvar="BF16PROF_TRAINING_ARGS",
        help="JSON or YAML of TrainingArguments (LLaMA-Factory's, axolotl's, accelerate's): what the JSON's auto and the rest mean.",
        rich_help_panel=TRAIN,
    ),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="deepspeed|megatron-core",
        envvar="BF16PROF_ENGINE",
        help="Who trains: DeepSpeed, or megatron-core, data parallel (--zero 1 is then its distributed optimizer).",
        rich_help_panel=TRAIN,
    ),
]
OptimOption = Annotated[
    str | None,
    typer.Option(
        "--optim",
        metavar="NAME",
        envvar="BF16PROF_OPTIM",
        help="The Trainer's optimizer, as adamw_torch, where no JSON names one.",
        rich_help_panel=TRAIN,
    ),
]
SequenceOption = Annotated[
    int | None,
    typer.Option("--sequence-length", "--seq", envvar="BF16PROF_SEQUENCE_LENGTH", help="Tokens per sequence.", rich_help_panel=TRAIN),
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(
        "--micro-batch-size", "--batch-size", envvar="BF16PROF_MICRO_BATCH_SIZE", help="Sequences per rank.", rich_help_panel=TRAIN
    ),
]
AccumulationOption = Annotated[
    int | None,
    typer.Option(
        "--gradient-accumulation-steps",
        "--gas",
        envvar="BF16PROF_GRADIENT_ACCUMULATION_STEPS",
        help="Micro-steps.",
        rich_help_panel=TRAIN,
    ),
]
CheckpointingOption = Annotated[
    bool | None,
    typer.Option(
        "--activation-checkpointing/--no-activation-checkpointing",
        envvar="BF16PROF_ACTIVATION_CHECKPOINTING",
        help="Recompute activations in backward.",
        rich_help_panel=TRAIN,
    ),
]
LoraOption = Annotated[
    str | None,
    typer.Option(
        "--lora",
        metavar="r=16,...|FILE",
        envvar="BF16PROF_LORA",
        help="Train an adapter and freeze the model: r=16,alpha=32,targets=q_proj+v_proj,dora, or PEFT's adapter_config.json.",
        rich_help_panel=TRAIN,
    ),
]
FourBitOption = Annotated[
    bool | None,
    typer.Option(
        "--load-in-4bit/--no-load-in-4bit",
        envvar="BF16PROF_LOAD_IN_4BIT",
        help="The model under an adapter in bitsandbytes' 4 bits (QLoRA): nf4 with double quantization.",
        rich_help_panel=TRAIN,
    ),
]
LigerOption = Annotated[
    str | None,
    typer.Option(
        "--liger",
        metavar="loss|all",
        envvar="BF16PROF_LIGER",
        help="Liger-Kernel on the model: its head fused with the loss, or all kernels as the Trainer's use_liger_kernel.",
        rich_help_panel=TRAIN,
    ),
]
FusedLossOption = Annotated[
    str | None,
    typer.Option(
        "--fused-loss",
        metavar="liger|tiled",
        envvar="BF16PROF_FUSED_LOSS",
        help="Head and loss without the whole logits: Liger's (as --liger loss), or DeepSpeed's in tiles (ALST).",
        rich_help_panel=TRAIN,
    ),
]
DpoOption = Annotated[
    str | None,
    typer.Option(
        "--dpo",
        metavar="reference|precomputed",
        envvar="BF16PROF_DPO",
        help="Preference optimization as TRL's: micro-batches of pairs, beside a reference model or with its answers in the data.",
        rich_help_panel=TRAIN,
    ),
]
RewardOption = Annotated[
    bool | None,
    typer.Option(
        "--reward/--no-reward",
        envvar="BF16PROF_REWARD",
        help="A reward model as TRL's: one score in the place of the head, micro-batches of pairs.",
        rich_help_panel=TRAIN,
    ),
]
PackedOption = Annotated[
    int | None,
    typer.Option(
        "--packed-sequences",
        min=0,
        metavar="N",
        envvar="BF16PROF_PACKED_SEQUENCES",
        help="Padding-free batches: so many sequences fill each row of tokens, with positions that start again.",
        rich_help_panel=TRAIN,
    ),
]
EvalBatchOption = Annotated[
    int | None,
    typer.Option(
        "--eval-batch-size",
        min=1,
        metavar="N",
        envvar="BF16PROF_EVAL_BATCH_SIZE",
        help="An evaluation after the steps, with so many sequences per rank (the Trainer's per_device_eval_batch_size).",
        rich_help_panel=TRAIN,
    ),
]
SequenceParallelOption = Annotated[
    int | None,
    typer.Option(
        "--sp",
        min=1,
        metavar="N",
        envvar="BF16PROF_SP",
        help="Ranks that share each sequence (DeepSpeed's Ulysses, ALST); the others are data parallel.",
        rich_help_panel=TRAIN,
    ),
]
TensorParallelOption = Annotated[
    int | None,
    typer.Option(
        "--tp", min=1, metavar="N", envvar="BF16PROF_TP", help="Ranks that share each layer (DeepSpeed's AutoTP).", rich_help_panel=TRAIN
    ),
]
PipelineParallelOption = Annotated[
    int | None,
    typer.Option(
        "--pp",
        min=1,
        metavar="N",
        envvar="BF16PROF_PP",
        help="Stages of a pipeline, each with some of the layers (DeepSpeed's PipelineModule).",
        rich_help_panel=TRAIN,
    ),
]
ExpertParallelOption = Annotated[
    int | None,
    typer.Option(
        "--ep",
        min=1,
        metavar="N",
        envvar="BF16PROF_EP",
        help="Data parallel ranks over which experts are spread (DeepSpeed's MoE layers, in a model of your own).",
        rich_help_panel=TRAIN,
    ),
]
ZeroInitOption = Annotated[
    bool | None,
    typer.Option(
        "--zero-init/--no-zero-init",
        envvar="BF16PROF_ZERO_INIT",
        help="ZeRO-3: the model is built inside deepspeed.zero.Init, as the Trainer's from_pretrained does, or as a whole first.",
        rich_help_panel=TRAIN,
    ),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Override any value of the profile.", rich_help_panel=TRAIN)
]
ScriptArgument = Annotated[
    list[str] | None, typer.Option("--", help="A training script and its arguments, which stand after -- in a terminal.")
]
ScriptStepsOption = Annotated[int, typer.Option("--steps", min=1, help="Optimizer steps after which it is ended.", rich_help_panel=SCRIPT)]
ScriptRankOption = Annotated[int, typer.Option("--rank", min=0, help="The rank that it runs as.", rich_help_panel=SCRIPT)]
ScriptTimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1, help="Seconds that it may take for these steps.", rich_help_panel=SCRIPT)
]
OutputDirOption = Annotated[
    Path | None, typer.Option("--output-dir", "-d", help="The run directory; runs/TIME-PROFILE if not given.", rich_help_panel=OUTPUT)
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, and nothing else there.", rich_help_panel=OUTPUT)]
FilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Write a file: .json, .csv, .md or .html. May be repeated.", rich_help_panel=OUTPUT
    ),
]
PageFilesOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Write a file: .json, .csv, .md, .html, one figure as .png, .svg or .pdf, or trace.json for Perfetto. May be repeated.",
        rich_help_panel=OUTPUT,
    ),
]
FigureOption = Annotated[
    str,
    typer.Option(
        "--figure",
        metavar="NAME",
        help=f"What a .png, .svg or .pdf shows: {', '.join(FIGURES)} ({DEFAULT_FIGURE} if not given).",
        show_default=False,
        rich_help_panel=OUTPUT,
    ),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel=OUTPUT)]
TraceOption = Annotated[
    bool,
    typer.Option(
        "--trace/--no-trace",
        envvar="BF16PROF_TRACE",
        help="Run the code of a model that is not known once, dry, to learn what its passes allocate (needs torch and deepspeed).",
        rich_help_panel=SELECT,
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No hints and no progress.", rich_help_panel=OUTPUT)]
VerboseOption = Annotated[bool, typer.Option("--verbose", "-v", help="Every component and item of every case.", rich_help_panel=OUTPUT)]
FailUnlessFitsOption = Annotated[
    bool,
    typer.Option(
        "--fail-unless-fits",
        help="Leave with 4 unless every case fits (plan: unless one does, on each number of GPUs); tight does not count as fitting.",
        rich_help_panel=OUTPUT,
    ),
]
TolerateOption = Annotated[
    str | None,
    typer.Option("--fail-over", metavar="5%", help="Leave with 4 if a memory prediction misses by more.", rich_help_panel=OUTPUT),
]


def numbers(flag: str, text: Numbers) -> list[int]:
    """`1,2,4` as numbers. Raises `InputError` naming the flag."""
    try:
        found = [int(part) for part in words(text)]
    except ValueError:
        found = []
    if not found:
        raise InputError(f"{flag} {text}: expected whole numbers, as 1,2,4")
    return found


def words(text: Words | Numbers) -> list[str]:
    """`a,b` as words; none where there are only commas and spaces."""
    return [part.strip() for part in str(text).split(",") if part.strip()]


def percentage(text: str, flag: str = "--fail-over", below: float = float("inf")) -> float:
    """`5%` or `0.05` as 0.05. Raises `InputError` naming the flag for anything else, and for what
    is not below a limit."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < below:
        raise InputError(f"{flag} {text}: expected a share, as 5% or 0.05")
    return value
