"""The parameters and buffers of transformers' causal language models, from the content of a
`config.json`, without building anything.

Facts are of transformers 5.23.0: its configuration classes say what a missing key means, its
modeling files which module holds what in which order. A file in `families` describes the model
types that share a block; there is no list to extend. Whatever these files do not describe - another
architecture, a key that changes what is held or returned - has no skeleton, and says so.
"""

from __future__ import annotations

import functools
import importlib
import json
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bf16prof.models.shapes import NoInventory, ParameterSpec
from bf16prof.models.shapes.huggingface.config import Config, shown

FAMILIES_PACKAGE = f"{__name__}.families"

NOT_MODELLED = (
    "output_hidden_states", "output_attentions", "output_router_logits", "per_layer_config", "add_cross_attention", "quantization_config",
)  # fmt: skip
"""Keys that, when set, change what a model holds or what it returns, and the training loop
keeps."""


@dataclass(frozen=True)
class BufferSpec:
    """A tensor of fp32 that is no parameter and that the model holds on its device. DeepSpeed
    0.19.8 leaves its dtype as it is (`runtime/engine.py`, _configure_distributed_model: only
    parameters are cast).

    * `is_registered`: whether `nn.Module.buffers()` knows it; a plain attribute belongs to nobody.
    * `is_value`: whether it is made of a number by `torch.tensor`, to which `zero.Init` gives the
      parameters' dtype.
    """

    name: str
    numel: int
    is_registered: bool = True
    is_value: bool = False


@dataclass(frozen=True)
class Skeleton:
    """What a model holds: its parameters in the order of `nn.Module.parameters()`, each shared one
    once, and its buffers."""

    parameters: tuple[ParameterSpec, ...]
    buffers: tuple[BufferSpec, ...] = ()


@dataclass(frozen=True)
class Family:
    """One model type.

    * `architecture`: its causal language model, which transformers also takes when a configuration
      names no architecture.
    * `build`: from a configuration to the skeleton.
    * `defaults`: what its configuration class says of the keys that `build` reads. `aliases`: its
      `attribute_map` and older names, whose values win over those of the names they stand for.
    """

    architecture: str
    build: Callable[[Config], Skeleton]
    defaults: Mapping[str, Any]
    aliases: Mapping[str, str] = field(default_factory=dict)


@functools.cache
def model_types() -> Mapping[str, Family]:
    """Every model type that is described."""
    return families_of(FAMILIES_PACKAGE)


def families_of(package: str) -> dict[str, Any]:
    """What the modules of a package have in their `FAMILIES`, by model type."""
    found = pkgutil.iter_modules(importlib.import_module(package).__path__)
    modules = (importlib.import_module(f"{package}.{each.name}") for each in found)
    return {model_type: family for module in modules for model_type, family in module.FAMILIES.items()}


def skeleton(hf_config: Mapping[str, Any]) -> Skeleton:
    """The skeleton of the model that transformers builds from this configuration. Raises
    `NoInventory` saying why there is none."""
    return _skeleton(json.dumps(hf_config))


def configuration(hf_config: Mapping[str, Any], more: Mapping[str, Any] | None = None) -> Config:
    """The values of a configuration whose model type is described, over its defaults and `more` of
    them. Raises `NoInventory`."""
    values = dict(hf_config)
    family = _family(values)
    renamed = {family.aliases[key]: value for key, value in values.items() if key in family.aliases}
    return Config({**(more or {}), **family.defaults, **values, **renamed})


@functools.lru_cache(maxsize=16)
def _skeleton(content: str) -> Skeleton:
    values: dict[str, Any] = json.loads(content)
    family = _family(values)
    for key in NOT_MODELLED:
        if values.get(key):
            raise NoInventory(f"model.hf_config.{key} is not modelled")
    if values.get("return_dict") is False:
        raise NoInventory("model.hf_config.return_dict is not modelled")
    return family.build(configuration(values))


def _family(values: Mapping[str, Any]) -> Family:
    """The family of a configuration."""
    model_type, named = values.get("model_type"), values.get("architectures")
    family = model_types().get(model_type) if isinstance(model_type, str) else None
    architecture = named[0] if isinstance(named, list) and named else None
    if family is None or architecture not in (None, family.architecture):
        what = architecture if isinstance(architecture, str) else f"the model of model_type {shown(model_type)}"
        raise NoInventory(f"only transformers itself knows the parameters of {what:.60}; a checkpoint lists them too (model.safetensors)")
    return family
