"""A model as the stages of a pipeline: DeepSpeed's PipelineModule, which each rank builds its own
layers of.

One of our families is a list of layers; a function of the user's own gives such a list and a loss,
or the PipelineModule itself.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError
from bf16prof.models.foreign import called, one_line
from bf16prof.profiles.models import FactorySettings, Model, ModelSettings

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "parallel.pipeline"


def pipelined(model: Model, stages: int) -> nn.Module:
    """This rank's stage of the model; the process group must be initialised. Raises `InputError`
    where the model is no list of layers."""
    if isinstance(model, ModelSettings):
        return _family(model, stages)
    assert isinstance(model, FactorySettings), "engine/shared_batches.py refuses the others"
    found = called(model)
    if not is_pipeline(found):
        with one_line(f"{NAME}: DeepSpeed's PipelineModule refuses what model.factory {model.factory} returned"):
            return _stage(*_layers_and_loss(found, model.factory), stages)
    if found.num_stages != stages:
        raise InputError(f"{NAME}: model.factory {model.factory} returned a PipelineModule of {found.num_stages} stages, --pp is {stages}")
    module: nn.Module = found.train()
    return module


def is_pipeline(model: Any) -> bool:
    """Whether DeepSpeed makes a PipelineEngine for a model."""
    from deepspeed.runtime.pipe.module import PipelineModule

    return isinstance(model, PipelineModule)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy against the labels, as the training loop computes it of a model that is
    whole (engine/training.py, loss_of)."""
    from torch.nn import functional

    return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


def _layers_and_loss(found: Any, factory: str) -> tuple[Sequence[Any], Callable[..., Any]]:
    if not (isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], list | tuple) and callable(found[1])):
        raise InputError(
            f"{NAME}: model.factory {factory} returned {type(found).__name__}: a pipeline is a PipelineModule, or layers and a loss",
            hint="return [layer, ...], loss   (a loss is called with the output of the last layer and the labels)",
        )
    return found[0], found[1]


def _stage(layers: Sequence[Any], loss: Callable[..., Any], stages: int) -> nn.Module:
    from deepspeed.runtime.pipe.module import PipelineModule

    module: nn.Module = PipelineModule(layers=layers, num_stages=stages, loss_fn=loss)
    return module.train()


def _family(model: ModelSettings, stages: int) -> nn.Module:
    """A stage of one of our families, initialised as the whole model is; both ends of what is tied
    begin alike."""
    family = importlib.import_module(f"bf16prof.models.modules.{model.family.replace('-', '_')}")
    with one_line(f"{NAME}: DeepSpeed's PipelineModule refuses {stages} stages"):
        module: Any = _stage(family.pipeline_layers(model), next_token_loss, stages)
    if initialise := getattr(family, "initialise", None):
        module.apply(initialise)
        module._synchronize_tied_weights()
    stage: nn.Module = module
    return stage
