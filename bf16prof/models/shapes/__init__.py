"""The parameter inventory: every parameter of a model, in the order in which
`nn.Module.parameters()` yields them, without torch."""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from dataclasses import dataclass
from functools import cached_property

from bf16prof.errors import InputError
from bf16prof.profiles.models import HuggingFaceSettings, Model, ModelSettings
from bf16prof.profiles.names import unknown

CAST_BY_AUTOCAST = frozenset({"Linear", "Conv1d", "Conv2d", "Conv3d"})
"""Classes whose own parameters DeepSpeed communicates in autocast's dtype
(`runtime/torch_autocast.py`, LOWER_PRECISION_SAFE_MODULES)."""


class NoInventory(InputError):
    """Only building the model tells what it holds; the message says why."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: its name, its shape, the class of the module that holds it, and that of
    another one that shares it.

    `also`: its other names, where it has some that are not the usual one (`TIED_HEAD`).
    `trainable`: whether it has a gradient.
    """

    name: str
    shape: tuple[int, ...]
    layer: str
    tied: str = ""
    also: tuple[str, ...] = ()
    trainable: bool = True

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def cast_by_autocast(self) -> bool:
        """Whether DeepSpeed communicates its gradient in autocast's dtype."""
        return not CAST_BY_AUTOCAST.isdisjoint((self.layer, self.tied))


TIED_HEAD = "lm_head"
"""The module that shares a tied parameter, in every model that is described here."""


def families() -> list[str]:
    """The model families that this package knows."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.ispkg)


def inventory(model: Model) -> list[ParameterSpec]:
    """The parameters of a model, each shared one once; those of a safetensors file where the model
    names one.

    Raises `NoInventory` when only building the model tells, `InputError` when a family is unknown
    or its sizes do not fit together.
    """
    if isinstance(model, ModelSettings):
        return _inventory(model)
    if isinstance(model, HuggingFaceSettings):
        return _of_hugging_face(model)
    raise NoInventory("only the code that builds this model knows its parameters")


def _of_hugging_face(model: HuggingFaceSettings) -> list[ParameterSpec]:
    """Of a safetensors file as it lists them, else of the model that transformers builds.

    A file does not say which class holds a tensor: for autocast, one of two dimensions or more
    counts as that of an `nn.Linear`, any other as not cast, so that both kinds of reduce bucket are
    there, as in every model with linear layers and norms.
    """
    from bf16prof.models.shapes.huggingface import skeleton

    if model.safetensors is None:
        return list(skeleton(model.hf_config).parameters)
    return [ParameterSpec(name, shape, "Linear" if len(shape) > 1 else "") for name, shape in model.safetensors.items()]


@functools.cache
def _inventory(model: ModelSettings) -> list[ParameterSpec]:
    if model.family not in families():
        raise unknown("family", model.family, families(), where="model.family: ")
    require(model.hidden_size % model.num_heads == 0, "model.hidden_size must be a multiple of model.num_heads")
    module = importlib.import_module(f"{__name__}.{model.family.replace('-', '_')}")
    specs: list[ParameterSpec] = module.parameters(model)
    return specs


def require(fits: bool, message: str) -> None:
    """Raise `InputError` with the message unless the condition holds."""
    if not fits:
        raise InputError(message)


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True, layer: str = "Linear") -> list[ParameterSpec]:
    """The parameters of an `nn.Linear`: weight [outputs, inputs], bias [outputs]."""
    weight = ParameterSpec(f"{name}.weight", (outputs, inputs), layer)
    return [weight, ParameterSpec(f"{name}.bias", (outputs,), layer)] if bias else [weight]


def layer_norm(name: str, width: int) -> list[ParameterSpec]:
    """The parameters of an `nn.LayerNorm`: weight [width], bias [width]."""
    return [ParameterSpec(f"{name}.{part}", (width,), "LayerNorm") for part in ("weight", "bias")]
