"""What a profile may say: the schema of the TOML file, with the meaning and unit of every key (the
model's: see `models.py`).

Unknown keys and wrong types are refused (see `explain.py`, which turns pydantic's errors into one
line with file and key). The ZeRO keys and their defaults are DeepSpeed's own
(`deepspeed/runtime/zero/config.py`, 0.19.8): those that move memory, and those that a run needs.
What decides the precision (`bf16`, `fp16`, `torch_autocast`) belongs to the recipe, and the stage
to the case.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from bf16prof.parallelism import MOST_RANKS
from bf16prof.profiles.adapters import AdapterSettings, QuantizationSettings
from bf16prof.profiles.models import Model
from bf16prof.profiles.optimizers import library_ids
from bf16prof.profiles.plain import checked
from bf16prof.profiles.secrets import dropped, without_secrets
from bf16prof.profiles.settings import Beta, Count, Dtype, Elements, Settings

Liger = Literal["none", "loss", "all"]
"""Which of Liger-Kernel's replacements a model of transformers has: its head fused with the loss,
or all that there are for it."""


Preference = Literal["none", "reference", "precomputed"]
"""Direct preference optimization (DPO): beside a reference that does not learn, or with its
log-probabilities in the data."""


EngineName = Literal["deepspeed", "megatron-core"]
"""Who holds parameters, gradients and states, and steps."""


FusedLoss = Literal["none", "tiled"]
"""Who computes head and loss without the whole logits, beside Liger: DeepSpeed's
TiledFusedLogitsLoss."""


class EvaluationSettings(Settings):
    """An evaluation after the steps, as the Trainer of transformers makes one; its words."""

    per_device_eval_batch_size: Count
    """Sequences per rank and forward pass."""
    prediction_loss_only: bool = True
    """Only the loss of a batch is kept, as by a Trainer without `compute_metrics`. False: logits
    and labels, gathered from all ranks."""
    eval_accumulation_steps: Annotated[int, Field(gt=0, lt=2**14)] | None = None
    """Batches after which what is kept goes to the host; it stays on the device to the end when
    absent."""
    batches: Annotated[int, Field(gt=0, lt=2**14)] | None = None
    """Batches of a rank. Needed where logits of all of them stay on the device; losses alone are as
    large after two."""

    @model_validator(mode="after")
    def _number_of_batches(self) -> EvaluationSettings:
        if self.batches is None and not self.prediction_loss_only and self.eval_accumulation_steps is None:
            raise PydanticCustomError("batches", "without eval_accumulation_steps logits of all batches are kept: say batches")
        return self

    @property
    def batches_run(self) -> int:
        """How many batches there are; where nobody said it, as many as it takes for the last to
        find all that there ever is."""
        return self.batches or (2 if self.prediction_loss_only else (self.eval_accumulation_steps or 1) + 1)

    @property
    def words(self) -> str:
        """What it is, in a few words."""
        kept = "losses" if self.prediction_loss_only else "logits of all ranks"
        return f"{self.per_device_eval_batch_size} x {self.batches_run} (sequences, batches), {kept} kept"


class WorkloadSettings(Settings):
    """What one rank computes in one step."""

    sequence_length: Count
    """Tokens per sequence."""
    micro_batch_size: Count = 1
    """Sequences per rank and forward pass."""
    gradient_accumulation_steps: Count = 1
    activation_checkpointing: bool = False
    """Keep only the input of each layer and recompute the rest in backward
    (`torch.utils.checkpoint`)."""
    use_reentrant: bool = False
    """With checkpointing: `torch.utils.checkpoint`'s older, reentrant version. Models of
    transformers have the choice."""
    checkpoint_every_n_layers: Annotated[int, Field(gt=0, lt=2**14)] = 1
    """With checkpointing: every so many layers one is recomputed, the others keep what they need.
    Models of transformers have it too."""
    liger: Liger = "none"
    """Liger-Kernel on the model: `loss` never makes the whole logits; `all` is what the Trainer's
    `use_liger_kernel` does."""
    tiled_mlp: bool = False
    """MLPs of a model of transformers computed in tiles of the sequence, and again in backward:
    DeepSpeed's TiledMLP, as ALST uses it."""
    keeps_outputs: bool = True
    """What the training loop holds in backward and step. True: outputs, loss and batch, in
    variables that the next micro-step overwrites (DeepSpeedExamples,
    training/bf16_master_weight/train.py). False: the loss alone and the batches of the whole step,
    as the Trainer of transformers does (trainer.py, `compute_loss` and `get_batch_samples`)."""
    fused_loss: FusedLoss = "none"
    """`tiled`: head and loss of a model of transformers in tiles of the tokens, with their
    gradients at once, as ALST uses it."""
    fused_loss_tiles: Count | None = None
    """Tiles of a `tiled` loss; so many that fp32 logits of one are 1 GiB at most when absent, as in
    ArcticTraining."""
    packed_sequences: Annotated[int, Field(ge=0, lt=2**20)] = 0
    """So many sequences, one after another, fill each row of `sequence_length` tokens, and the rows
    of a micro-batch are one long row: padding-free batches, as TRL's and transformers' collators
    make them. 0: every row is one sequence."""
    dpo: Preference = "none"
    """Pairs of answers in place of sequences, as TRL trains them: `micro_batch_size` pairs, and
    with `reference` a second model; with an adapter that is the policy without it."""
    reward: bool = False
    """A reward model, as TRL trains one: the model of a configuration with one score in the place
    of its head, on pairs of answers."""
    evaluation: EvaluationSettings | None = None
    """What is evaluated when the steps are over."""
    data: str = "synthetic"
    """`synthetic`, `pydoc`, `pydoc-bpe`, `text:PATH` or `text-bpe:PATH` (see
    `measuring/data.py`)."""
    zero_init: bool = False
    """Build the model inside `deepspeed.zero.Init` (at stage 3): each parameter is partitioned as
    soon as it exists. Without it every rank first builds the whole model, as a script does that
    knows nothing of it."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42

    @property
    def has_pairs(self) -> bool:
        """Whether a micro-batch is one of pairs of answers: rows are twice as many."""
        return self.reward or self.dpo != "none"

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.micro_batch_size * (2 if self.has_pairs else 1)


def _library(value: str) -> str:
    if value and value not in library_ids():
        raise PydanticCustomError("library", "expected one of {known}", {"known": ", ".join(library_ids())})
    return value


class ParallelSettings(Settings):
    """How the ranks share one batch. Those that share no other dimension have sequences of their
    own (data parallel)."""

    sequence: Annotated[int, Field(gt=0, le=MOST_RANKS)] = 1
    """Ranks that share each sequence, every one a part of its tokens: DeepSpeed's Ulysses, for
    models of transformers."""
    tensor: Annotated[int, Field(gt=0, le=MOST_RANKS)] = 1
    """Ranks that share each layer, every one a part of its weights: DeepSpeed's AutoTP, which cuts
    a model of transformers by its plan."""
    pipeline: Annotated[int, Field(gt=0, le=MOST_RANKS)] = 1
    """Ranks that have some of the layers each: the stages of DeepSpeed's PipelineModule, of a model
    that is a list of layers."""
    expert: Annotated[int, Field(gt=0, le=MOST_RANKS)] = 1
    """Data parallel ranks over which the experts of a layer are spread: those of DeepSpeed's MoE,
    which a model of your own brings."""

    @property
    def shared(self) -> int:
        """Ranks that work on one batch together."""
        return self.sequence * self.tensor * self.pipeline

    @property
    def counted_once(self) -> int:
        """Ranks that a `train_batch_size` of DeepSpeed's JSON counts as one: those that share a
        sequence, and the stages of a pipeline. Those that share layers count each
        (runtime/config.py, DeepSpeedConfig.__init__)."""
        return self.sequence * self.pipeline


class OptimizerSettings(Settings):
    """DeepSpeed's `optimizer` block. Without `torch_adam`, DeepSpeed picks FusedAdam, or
    DeepSpeedCPUAdam when offloading."""

    type: Literal["Adam", "AdamW"] = "AdamW"
    lr: Annotated[float, Field(ge=0)] = 1e-4
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), strict=False)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    torch_adam: bool = False
    """Use `torch.optim` instead of DeepSpeed's compiled optimizer (no compiler needed)."""
    fused: bool | None = None
    """With `torch_adam`: PyTorch's fused kernel, which makes no temporaries."""
    foreach: bool | None = None
    """With `torch_adam`: PyTorch's multi-tensor version, which does."""
    library: Annotated[str, AfterValidator(_library)] = ""
    """The optimizer of a library, which DeepSpeed is handed in the place of its own: `adamw-8bit`,
    `adafactor`, `lion-8bit`, ... (`optimizers.toml`)."""
    from_trainer: bool = False
    """The Hugging Face Trainer makes it and hands it to DeepSpeed. Where the optimizer is
    offloaded, accelerate puts DeepSpeedCPUAdam in the place of PyTorch's
    (accelerate/utils/deepspeed.py, map_pytorch_optim_to_deepspeed)."""


class OffloadOptimizerSettings(Settings):
    """`zero_optimization.offload_optimizer`: optimizer states and the update in host memory."""

    device: Literal["none", "cpu", "nvme"] = "none"
    pin_memory: bool = True
    ratio: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Share of the ZeRO-3 sub-groups that is offloaded."""
    nvme_path: str | None = None
    """Where files lie that `nvme` reads and writes."""
    buffer_count: Count = 4
    """Page-locked buffers that `nvme` goes through, each as large as the largest sub-group: one for
    each state, one for gradients."""
    pipeline_read: bool = False
    pipeline_write: bool = False


class OffloadParamSettings(Settings):
    """`zero_optimization.offload_param`: the partitioned parameters in host memory (ZeRO-3)."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


class ZeroSettings(Settings):
    """DeepSpeed's `zero_optimization`, without the stage."""

    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: Annotated[Elements, Field(gt=0)] = 500_000_000
    allgather_partitions: bool = True
    allgather_bucket_size: Elements = 500_000_000
    use_multi_rank_bucket_allreduce: bool = True
    overlap_comm: bool | None = None
    """DeepSpeed's default: on for stage 3, off otherwise."""
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    compute_grad_norm: bool = True
    ignore_unused_parameters: bool = True
    sub_group_size: Elements = 1_000_000_000
    prefetch_bucket_size: Elements = Field(50_000_000, alias="stage3_prefetch_bucket_size")
    param_persistence_threshold: Elements = Field(100_000, alias="stage3_param_persistence_threshold")
    model_persistence_threshold: Elements = Field(sys.maxsize, alias="stage3_model_persistence_threshold")
    max_live_parameters: Elements = Field(1_000_000_000, alias="stage3_max_live_parameters")
    max_reuse_distance: Elements = Field(1_000_000_000, alias="stage3_max_reuse_distance")
    module_granularity_threshold: Elements = Field(0, alias="stage3_module_granularity_threshold")
    use_all_reduce_for_fetch_params: bool = Field(False, alias="stage3_use_all_reduce_for_fetch_params")
    allgather_sequential: bool = Field(False, alias="stage3_allgather_sequential")
    memory_efficient_linear: bool = True
    zero_hpz_partition_size: Elements = 1
    """Ranks that share a secondary copy of the parameters between forward and backward (ZeRO++
    hpZ)."""
    offload_optimizer: OffloadOptimizerSettings = OffloadOptimizerSettings()
    offload_param: OffloadParamSettings = OffloadParamSettings()


class DataTypeSettings(Settings):
    """DeepSpeed's `data_types`."""

    grad_accum_dtype: Dtype | None = None
    """Dtype in which gradients are accumulated; the parameters' own when absent."""


class Bf16Settings(Settings):
    """The keys of DeepSpeed's `bf16` block that are not part of a recipe."""

    check_grad_overflow: bool = True
    immediate_grad_update: bool = False


def _more(value: dict[str, Any]) -> dict[str, Any]:
    zero = value.get("zero_optimization")
    taken = [key for key in TAKEN if key in value] + ["zero_optimization.stage"] * (isinstance(zero, dict) and "stage" in zero)
    tensor = value.get("tensor_parallel")
    taken += ["tensor_parallel.autotp_size"] * (isinstance(tensor, dict) and "autotp_size" in tensor)
    pipeline = value.get("pipeline")
    taken += ["pipeline.stages"] * (isinstance(pipeline, dict) and "stages" in pipeline)
    if taken:
        raise PydanticCustomError("more", "{key} is said elsewhere", {"key": taken[0]})
    return dict(dropped(without_secrets(checked(value))))


TAKEN = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "memory_breakdown", "sequence_parallel_size",
)  # fmt: skip
"""Keys of DeepSpeed's JSON that are not for `more`: they belong to other tables, or would spoil
what is measured."""


class DeepSpeedSettings(Settings):
    """The rest of DeepSpeed's JSON."""

    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    """Clip the global gradient norm to this; 0 turns it off. DeepSpeed's own default when absent:
    1.0 in 0.19.8, 0 in earlier versions."""
    communication_data_type: Dtype | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: Annotated[float, Field(gt=0)] = 1.0
    data_types: DataTypeSettings = DataTypeSettings()
    bf16: Bf16Settings = Bf16Settings()
    zero_optimization: ZeroSettings = ZeroSettings()
    more: Annotated[dict[str, Any], AfterValidator(_more)] = Field(default_factory=dict)
    """Anything else of DeepSpeed's JSON, laid over all the above; an `optimizer` or a `scheduler`
    replaces the one there is."""


class Profile(Settings):
    """What to train: everything but the ZeRO stage, the number of ranks and the precision
    recipe."""

    name: str = ""
    """How records call this profile: the preset's or the file's name."""
    description: str = ""
    names: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Other names of the model: ids on the Hugging Face Hub of checkpoints that have this
    architecture and these sizes."""
    model: Model
    peft: AdapterSettings | None = None
    """What is trained in the place of the model's own parameters."""
    quantization: QuantizationSettings | None = None
    """How these are kept, where they are not in the recipe's dtype: bitsandbytes' 4 bits."""
    workload: WorkloadSettings
    parallel: ParallelSettings = ParallelSettings()
    engine: EngineName = "deepspeed"
    """Who trains it."""
    optimizer: OptimizerSettings = OptimizerSettings()
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()

    @property
    def is_for_megatron(self) -> bool:
        """Whether megatron-core trains it, and not DeepSpeed."""
        return self.engine == "megatron-core"
