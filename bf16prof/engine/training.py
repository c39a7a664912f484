"""The model, the engine and one optimizer step of a job, as one of two well-known loops writes it
(`workload.keeps_outputs`).

* The published example's (DeepSpeedExamples, training/bf16_master_weight): outputs, loss and batch
  are local variables, alive until the next micro-step overwrites them: in backward, in the step,
  and when memory is read between steps.
* The Trainer's of transformers (5.24.0, trainer.py): `_run_epoch` fetches the batches of all
  micro-steps of an optimizer step together (`get_batch_samples`) and holds them until it fetches
  the next; `compute_loss` lets go of the outputs when it returns, before backward; the loss,
  without its graph, stays until the next one is there (`training_step`). Three scalars of the
  Trainer are left out: the sum of losses, the number of tokens, the norm.

Ours keeps the same tensors as attributes for the same reason, and `kept` names them.

Any model can be trained here. It is called with the tensors of `batch_spec`: described inputs as
keywords; token ids as the first argument, and labels as `labels` if its forward has such a
parameter. What it returns is, or has, or is made into a loss: see `loss_of`.
"""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bf16prof.cases import Job
from bf16prof.engine.client import make_client_optimizer
from bf16prof.engine.config import cast_dtype, deepspeed_config, engine_facts, handed_to_deepspeed
from bf16prof.engine.engines import engine_of
from bf16prof.engine.evaluation import evaluate
from bf16prof.engine.labels import OWN_LOSS
from bf16prof.engine.pipeline import PipelineLoop
from bf16prof.engine.preference import preference_loss, reference_config, reward_loss, switched_off
from bf16prof.errors import Bf16profError, InputError
from bf16prof.models.adapted import import_peft, unwrapped
from bf16prof.models.experts import ranks_of_experts, require_experts
from bf16prof.models.foreign import told_of_zero3
from bf16prof.models.liger import import_liger
from bf16prof.models.modules import build_trained
from bf16prof.models.quantized import import_bitsandbytes
from bf16prof.models.ulysses import share_attention, shared_loss
from bf16prof.profiles.models import EXAMPLE_INPUT, HuggingFaceSettings, Model, ModelSettings

TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def import_libraries(job: Job) -> None:
    """Import what the job's model and optimizer need besides, so that what a library allocates for
    itself is not taken for the job's."""
    engine_of(job).import_libraries(job)
    import_peft(job.profile.peft)
    import_liger(job.profile.workload.liger)
    import_bitsandbytes(job.profile.quantization)


Batch = dict[str, Tensor]
"""The tensors of one micro-batch by name, as `batch_spec` describes them."""


def build_engine(job: Job) -> Any:
    """The engine of a job, on the accelerator that DeepSpeed finds; the process group must be
    initialised.

    Raises `InputError` when the model is the user's own and cannot be built.
    """
    return engine_of(job).build(job)


def build_deepspeed_engine(job: Job) -> Any:
    """DeepSpeed's."""
    workload, config = job.profile.workload, deepspeed_config(job)
    torch.manual_seed(workload.seed)
    with _zero_init(job, config):
        model = build_trained(job.profile, *_of_quantized(config))
    require_experts(model, job.case.expert_parallel)
    with _no_is_one_line(job):
        engine = initialize(model, config, **_groups(model, job))
    engine.train()
    return engine


def _of_quantized(config: Mapping[str, Any]) -> tuple[torch.dtype, str]:
    """What 4-bit layers compute in, and where they are made."""
    from deepspeed.accelerator import get_accelerator

    return TORCH_DTYPES.get(engine_facts(config).parameter_dtype, torch.float32), str(get_accelerator().current_device_name())


@contextmanager
def _no_is_one_line(job: Job) -> Iterator[None]:
    """Let AutoTP say in one line what it cannot cut: it looks at the model's own plan, which nobody
    here does."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        if job.case.tensor_parallel == 1 or isinstance(error, Bf16profError):
            raise
        raise InputError(f"parallel.tensor: DeepSpeed's AutoTP refuses this model: {' '.join(str(error).split())[:400]}") from error


def build_reference(job: Job) -> Any:
    """The engine of the model that a preference is held against; `None` where there is none, or
    where an adapter is switched off for it."""
    workload = job.profile.workload
    if workload.dpo != "reference" or job.profile.peft is not None:
        return None
    import deepspeed

    config = deepspeed_config(job)

    torch.manual_seed(workload.seed)
    with _zero_init(job, config):
        model = build_trained(job.profile)
    _cast(model, config)
    engine, *_ = deepspeed.initialize(model=model, config=reference_config(config))
    engine.eval()
    return engine


def _groups(model: nn.Module, job: Job) -> dict[str, Any]:
    """What DeepSpeed is told of ranks that share a batch."""
    ranks, workload = job.case.sequence_parallel, job.profile.workload
    return {"mpu": share_attention(model, ranks, workload.micro_batch_size)} if ranks > 1 else {}


def initialize(model: nn.Module, config: Mapping[str, Any], **more: Any) -> Any:
    """DeepSpeed's engine for a model as a configuration says it (`engine.config.deepspeed_config`):
    `deepspeed.initialize`, which takes `more`, handed the library's optimizer and given the cast
    model where the configuration says so.

    A cast changes parameters only, as DeepSpeed's own does (`runtime/engine.py`,
    _cast_module_mixed_precision); buffers keep their dtype.
    """
    import deepspeed

    _cast(model, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = _count(model)
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=trained, config=handed_to_deepspeed(config), optimizer=make_client_optimizer(config), **more
    )
    setattr(engine, WHOLE, count)
    return engine


def _cast(model: nn.Module, config: Mapping[str, Any]) -> None:
    if dtype := TORCH_DTYPES.get(cast_dtype(config)):
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)


WHOLE = "bf16prof_parameters"
"""Where an engine says how many parameters its model had before ranks shared its layers."""


def parameter_count(engine: Any) -> int:
    """Elements of the model's parameters, whole ones where ZeRO-3 has cut them; of a script's
    engine that shares layers, a rank's."""
    return int(getattr(engine, WHOLE, 0)) or _count(engine.module)


def _count(model: nn.Module) -> int:
    """Elements of a model, with the experts of other ranks; what two stages of a pipeline share is
    counted in one (runtime/pipe/module.py, _index_tied_modules)."""
    owned = (p for p in model.parameters() if not getattr(p, "ds_pipe_replicated", False))
    return sum(getattr(p, "ds_numel", p.numel()) * ranks_of_experts(p) for p in owned)


def takes_labels(model: nn.Module) -> bool:
    """Whether the model computes its loss itself, from labels that are its input ids: it shifts
    them, as transformers' models do."""
    return "labels" in inspect.signature(unwrapped(model).forward).parameters


class StepLoop(Protocol):
    """Runs optimizer steps on an engine, and says what it holds between them."""

    def step(self) -> float:
        """One optimizer step; its mean loss."""
        ...

    @property
    def kept(self) -> dict[str, Tensor | list[Tensor]]:
        """The tensors that it keeps alive between steps, by name."""
        ...


def training_loop(
    engine: Any,
    job: Job,
    next_batch: Callable[[], Batch],
    leave_out: Callable[[int, int], int] = lambda number, total: 0,
    reference: Any = None,
) -> StepLoop:
    """What trains the engine of a job; `leave_out` and `reference`: see `TrainingLoop`. A pipeline
    runs all its micro-steps."""
    if job.case.pipeline_parallel > 1:
        return PipelineLoop(engine, next_batch)
    return TrainingLoop(engine, job, next_batch, leave_out, reference)


class TrainingLoop:
    """Runs optimizer steps on an engine and holds what such a loop holds between them."""

    def __init__(
        self,
        engine: Any,
        job: Job,
        next_batch: Callable[[], Batch],
        leave_out: Callable[[int, int], int] = lambda number, total: 0,
        reference: Any = None,
    ) -> None:
        """`leave_out` is told of each micro-step that is over, from 0, and of how many; it says how
        many of the next ones not to run.

        `reference`: the engine of the model that a preference is held against (`build_reference`).
        """
        self._reference, self._workload = reference, job.profile.workload
        self._engine = engine
        self._model = job.profile.model
        self._next_batch, self._leave_out = next_batch, leave_out
        self._passes_labels, self._shares_sequences = takes_labels(engine.module), job.case.sequence_parallel > 1
        self._micro_steps = job.profile.workload.gradient_accumulation_steps
        self._keeps_outputs, self._evaluation = job.profile.workload.keeps_outputs, job.profile.workload.evaluation
        self._autocast_dtype = TORCH_DTYPES.get(engine_of(job).facts(job).autocast_dtype)
        self.batches: list[Batch] = []
        self.outputs: Any = None
        self.loss: Tensor | None = None

    def step(self) -> float:
        """One optimizer step; the mean loss of its micro-steps.

        Each micro-step's loss is read as soon as the micro-step is over: keeping its tensor for
        later would show up in the memory.
        """
        losses = []
        number = 0
        while number < self._micro_steps:
            batch = self._batch(number)
            with self._autocast(), self._called_as_described(batch):
                self.loss = self._loss(batch)
            self._engine.backward(self.loss)
            self._engine.step()
            losses.append(self.loss.item())
            if not self._keeps_outputs:
                self.loss = self.loss.detach()
            number += 1 + self._leave_out(number, self._micro_steps)
        return sum(losses) / len(losses)

    def evaluate(self, next_batch: Callable[[], Batch]) -> float:
        """What the workload evaluates, on batches of its own; the mean loss."""
        settings = self._evaluation
        assert settings is not None, "only a job that evaluates is asked to"
        names = inspect.signature(unwrapped(self._engine.module).forward).parameters
        skips = {"skip_logits": True} if settings.prediction_loss_only and "skip_logits" in names else {}  # trainer.py, prediction_step

        def predict(batch: Batch) -> tuple[Tensor, list[Tensor]]:
            with self._autocast(), self._called_as_described(batch):
                outputs = self._forward(batch, **skips)
                loss = self._loss_of(outputs, batch)
            return loss, [tensor for name, tensor in named_tensors(outputs).items() if tensor is not loss and name != "loss"]

        self._engine.eval()
        loss = evaluate(settings, next_batch, predict)
        self._engine.train()
        return loss

    @property
    def kept(self) -> dict[str, Tensor | list[Tensor]]:
        """The tensors that the loop keeps alive between steps, by name."""
        if self.loss is None:
            return {}
        outputs = {name: tensor for name, tensor in named_tensors(self.outputs).items() if tensor is not self.loss}
        if self._shares_sequences and "loss" in outputs:
            outputs[OWN_LOSS] = outputs.pop("loss")
        batches = {name: [batch[name] for batch in self.batches] for name in self.batches[0]}
        found: dict[str, Tensor | list[Tensor]] = {**outputs, "loss": self.loss, **batches}
        return {name.replace("_", " "): tensors for name, tensors in found.items()}

    def _batch(self, number: int) -> Batch:
        """The batch of a micro-step. They are fetched one at a time, or all together where the loop
        is the Trainer's."""
        if self._keeps_outputs:
            self.batches = [self._next_batch()]
        elif number == 0:
            self.batches = [self._next_batch() for _ in range(self._micro_steps)]
        return self.batches[0 if self._keeps_outputs else number]

    def _loss(self, batch: Batch) -> Tensor:
        """Forward, up to the loss. Outputs that are not kept are gone when this returns."""
        if self._workload.has_pairs:
            loss, outputs = self._loss_of_pairs(batch)
            self.outputs = outputs if self._keeps_outputs else None
            return loss
        outputs = self._forward(batch)
        if self._keeps_outputs:
            self.outputs = outputs
        return self._loss_of(outputs, batch)

    def _loss_of_pairs(self, batch: Batch) -> tuple[Tensor, Any]:
        if self._workload.reward:
            return reward_loss(self._engine, batch)
        return preference_loss(self._engine, self._ask_reference if self._workload.dpo == "reference" else None, batch)

    def _ask_reference(self, **batch: Tensor) -> Any:
        if self._reference is not None:
            return self._reference(**batch)
        with switched_off(self._engine.module):
            return self._engine.module(**batch)

    def _loss_of(self, outputs: Any, batch: Batch) -> Tensor:
        loss = loss_of(outputs, batch.get("labels"), self._model.vocab_size if not self._model.inputs else None)
        return shared_loss(loss, batch["shift_labels"]) if self._shares_sequences else loss

    def _forward(self, batch: Batch, **more: Any) -> Any:
        if self._shares_sequences:  # the model's loss takes the shifted labels, and wants to be given any (shared_loss)
            return self._engine(**batch, labels=batch["shift_labels"], **more)
        if self._model.inputs:
            return self._engine(**batch, **more)
        named = {name: batch[name] for name in ("labels", "position_ids") if name in batch and (name != "labels" or self._passes_labels)}
        return self._engine(batch["input_ids"], **named, **more)

    def _called_as_described(self, batch: Batch) -> AbstractContextManager[None]:
        names = batch if self._model.inputs or self._passes_labels or self._shares_sequences or self._workload.has_pairs else ("input_ids",)
        wanted = next(
            (name for name in inspect.signature(unwrapped(self._engine.module).forward).parameters if name not in ("args", "kwargs")),
            "NAME",
        )
        return called_as_described(self._model, {name: batch[name] for name in names}, wanted, lambda: mixed_on_cpu(self._engine.module))

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device_type=self._engine.device.type, dtype=self._autocast_dtype)


@contextmanager
def called_as_described(model: Model, batch: Batch, wanted: str, mixed: Callable[[], str] = str) -> Iterator[None]:
    """Let what a foreign model raises say what it was called with: nobody here knows what it
    expects. Our own errors pass.

    `wanted`: the name of its forward's first parameter. `mixed`: asked what to say where dtypes are
    refused (`mixed_on_cpu`).
    """
    try:
        yield
    except (Bf16profError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(model, ModelSettings) or _is_ours(error):
            raise
        said = " ".join(str(error).split())[:300]
        given = ", ".join(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for name, tensor in batch.items())
        if type(error).__name__ in WITHOUT_VALUES:
            raise InputError(
                f"the model's code depends on values of tensors, which a dry run does not have: {said}", hint="bf16prof measure runs it"
            ) from error
        raise InputError(
            f"the model failed when it was called with {given}: {type(error).__name__}: {said}",
            hint=(mixed() if OF_DTYPES.search(said) else "") or _describe_it(wanted),
        ) from error


def _describe_it(wanted: str) -> str:
    return f"if it wants something else, describe it in a profile: {EXAMPLE_INPUT.replace('pixel_values', wanted)}"


OF_DTYPES = re.compile("scalar type|dtype")
"""How PyTorch's kernels say that they do not take the dtypes of a call."""


def mixed_on_cpu(module: nn.Module) -> str:
    """What to do about buffers in another dtype than the parameters, which no kernel of a CPU
    takes; nothing elsewhere.

    DeepSpeed leaves buffers as they are (runtime/engine.py, `_cast_module_mixed_precision`): the
    running statistics of batch norms.
    """
    parameters = {each.dtype for each in module.parameters() if each.is_floating_point()}
    buffers = {each.dtype for each in module.buffers() if each.is_floating_point()} - parameters
    if not buffers or any(each.device.type != "cpu" for each in module.parameters()):
        return ""
    names = [" and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in some)) for some in (buffers, parameters)]
    return (
        f"DeepSpeed leaves the model's buffers in {names[0]} beside parameters in {names[1]}; a GPU takes both, a CPU does not: "
        "--recipe autocast-fp32 or fp32 runs here"
    )


UNEQUAL_DTYPES = "UnequalDtypes"
"""What the dry run raises in the place of a kernel that refuses its arguments
(`dry_run/hardware/asking.py`)."""

WITHOUT_VALUES = ("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")
"""What fake tensors raise where a model asks for values (torch/_subclasses/fake_tensor.py)."""


def _is_ours(error: BaseException) -> bool:
    """Whether it was raised by this package or by DeepSpeed, and not by the model or by an operator
    that it calls."""
    import deepspeed

    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    packages = Path(__file__).parents[1], Path(deepspeed.__file__).parent
    return type(error).__name__ != UNEQUAL_DTYPES and any(package in raised_in.parents for package in packages)


def loss_of(outputs: Any, labels: Tensor | None, vocab_size: int | None) -> Tensor:
    """The loss of what a model returned; the first of these that there is:

    the scalar that it returned; its `loss`; the first scalar of a tuple; the cross-entropy of its
    first floating tensor against the labels, if that is [*labels' shape, vocabulary]; the mean of
    that tensor, which trains nothing and needs the same memory.

    Raises `InputError` when there is no tensor that a loss could be made of.
    """
    tensors = named_tensors(outputs)
    floating = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    own = next((tensor for name, tensor in tensors.items() if name == "loss"), None)
    scalars = [tensor for tensor in floating if tensor.dim() == 0] if isinstance(outputs, Tensor | tuple | list) else []
    if own is not None or scalars:
        return own if own is not None else scalars[0]
    if not floating:
        raise InputError(f"the model returned {type(outputs).__name__} without a floating-point tensor that could be its loss")
    first = floating[0]
    if labels is not None and vocab_size is not None and first.shape[:-1] == labels.shape and first.shape[-1] >= vocab_size:
        return nn.functional.cross_entropy(first.reshape(-1, first.shape[-1]), labels.reshape(-1))
    return first.float().mean()


def named_tensors(outputs: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in what a model returned, by the names or numbers that they have there; one
    tensor alone is its logits."""
    if isinstance(outputs, Tensor):
        return {name or "logits": outputs}
    if isinstance(outputs, tuple | list):
        parts = {f"{name or 'output'} {index}": part for index, part in enumerate(outputs)}
    else:
        fields = outputs if isinstance(outputs, Mapping) else {} if name else getattr(outputs, "__dict__", {})
        parts = {f"{name} {key}".strip(): part for key, part in fields.items()}
    return {key: tensor for inner, part in parts.items() for key, tensor in named_tensors(part, inner).items()}


def _zero_init(job: Job, config: dict[str, Any]) -> AbstractContextManager[Any]:
    """What the model is built inside: `deepspeed.zero.Init` where that was asked for."""
    import deepspeed

    if not job.is_inside_zero_init:
        return nullcontext()
    if isinstance(job.profile.model, HuggingFaceSettings):
        return told_of_zero3(handed_to_deepspeed(config))
    context: AbstractContextManager[Any] = deepspeed.zero.Init(config_dict_or_path=handed_to_deepspeed(config))
    return context
