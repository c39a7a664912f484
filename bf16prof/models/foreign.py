"""Models that are not ours: architectures of the transformers library, and what a function of the
user's own returns.

Both are code of others, which raises what it likes: whatever goes wrong while it builds a model
becomes one line for the user.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bf16prof.errors import InputError, install_hint
from bf16prof.profiles.models import EXAMPLE_INPUT, FactorySettings, HuggingFaceSettings, Model
from bf16prof.profiles.plain import INFINITY

if TYPE_CHECKING:
    from torch import nn

INSTALL = install_hint("hf")


@dataclass(frozen=True)
class Checkpointing:
    """How layers are recomputed in backward: by `torch.utils.checkpoint`'s reentrant version or the
    other, every so many layers one."""

    reentrant: bool = False
    every: int = 1


NOT_OF_THE_ARCHITECTURE = ("model_type", "architectures", "auto_map", "dtype", "torch_dtype", "transformers_version")
"""Keys of a configuration that say which class it is for, where remote code lies, and how a
checkpoint is stored."""


def from_hf_config(settings: HuggingFaceSettings, checkpointing: Checkpointing | None) -> nn.Module:
    """The model of a Hugging Face configuration with random weights in fp32, ready to be
    trained."""
    import torch

    model_type = settings.hf_config["model_type"]
    with one_line(f"transformers cannot build this {model_type!r} model"):
        config = _config(settings.hf_config)
        cls = _model_class(settings.hf_config.get("architectures"), config)
        chosen = {"attn_implementation": settings.attn_implementation} if settings.attn_implementation else {}
        model: nn.Module = cls._from_config(config, dtype=torch.float32, **chosen)
        _checkpoint(model, checkpointing)
    if not settings.inputs and "input_ids" not in inspect.signature(model.forward).parameters:
        parameters = [name for name in inspect.signature(model.forward).parameters if name not in ("args", "kwargs")]
        raise InputError(
            f"{cls.__name__} is not called with token ids, but with {', '.join(parameters[:3])}, ...: describe what it is called with",
            hint=f"in tables like {EXAMPLE_INPUT}",
        )
    return model.train()


def scoring(model: Model) -> HuggingFaceSettings:
    """The same configuration for the class that gives a sequence one number
    (trl/trainer/reward_trainer.py).

    TRL takes the token that pads from the tokenizer; which one it is decides values, and no memory.
    """
    assert isinstance(model, HuggingFaceSettings), "only such models are admitted (engine/shared_batches.py)"
    transformers, content = _transformers(), dict(model.hf_config)
    with one_line(f"transformers cannot build this {content['model_type']!r} model"):
        mapping, config = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, type(_config(content))
    if config not in mapping:
        raise InputError(f"workload.reward: transformers has no model that scores sequences for the model_type {content['model_type']!r}")
    tokens = {"pad_token_id": 0} if model.text.get("pad_token_id") is None else {}
    changed = {**content, "architectures": [mapping[config].__name__], "num_labels": 1, **tokens}
    return model.model_copy(update={"hf_config": changed})


def without_dropout(model: nn.Module) -> nn.Module:
    """The model as TRL trains it on pairs of answers (trl/trainer/utils.py,
    disable_dropout_in_model)."""
    from torch import nn

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def from_factory(settings: FactorySettings, checkpointing: Checkpointing | None) -> nn.Module:
    """What the user's function returns, ready to be trained."""
    from torch import nn

    model = called(settings)
    if not isinstance(model, nn.Module):
        raise InputError(f"model.factory {settings.factory} returned {type(model).__name__}, not a torch.nn.Module")
    with one_line(f"the model of model.factory {settings.factory}"):
        _checkpoint(model, checkpointing)
    return model.train()


def called(settings: FactorySettings) -> Any:
    """What the user's function returns, whatever that is."""
    function = _imported(settings.factory)
    with one_line(f"model.factory {settings.factory} failed"):
        return function()


@contextlib.contextmanager
def told_of_zero3(config: Mapping[str, Any]) -> Iterator[None]:
    """Let transformers know, as the Trainer does, that ZeRO-3 will run: it then builds and
    initialises models inside `zero.Init`.

    An outer `zero.Init` would leave it with parameters that are gone before it initialises them.
    """
    from transformers.integrations import deepspeed as integration

    told = _Zero3(dict(config))
    integration.set_hf_deepspeed_config(told)  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        integration.unset_hf_deepspeed_config()  # type: ignore[no-untyped-call]


def keeps_arange() -> AbstractContextManager[Any]:
    """What transformers enters around `zero.Init`, so that rotary frequencies stay in fp32;
    releases before 5 have no such thing."""
    from transformers.integrations import deepspeed as integration

    found = getattr(integration, "prevent_arange_dtype_change", contextlib.nullcontext)
    context: AbstractContextManager[Any] = found()
    return context


class _Zero3:
    """What transformers asks its `HfDeepSpeedConfig`, which needs the accelerate library."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def is_zero3(self) -> bool:
        """Whether models are partitioned while they are built."""
        return True


def _config(content: Mapping[str, Any]) -> Any:
    transformers = _transformers()
    if content["model_type"] not in transformers.CONFIG_MAPPING:
        version = transformers.__version__
        raise InputError(f"transformers {version} does not know the model_type {content['model_type'][:60]!r}", hint=f"{INSTALL} --upgrade")
    rest = _infinite({key: value for key, value in content.items() if key not in NOT_OF_THE_ARCHITECTURE})  # it fills in tables
    config = transformers.AutoConfig.for_model(content["model_type"], **rest)
    for part in (config, config.get_text_config()):  # a cache of keys and values is for generating
        part.use_cache = False
    if getattr(config, "is_encoder_decoder", False):
        _fill_in_tokens(config)
    return config


def _infinite(value: Any) -> Any:
    """A copy in which what stands for an infinite number is one (`plain.INFINITY`)."""
    if isinstance(value, dict):
        return {key: _infinite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_infinite(item) for item in value]
    return math.copysign(math.inf, value) if isinstance(value, float) and abs(value) == INFINITY else value


def _fill_in_tokens(config: Any) -> None:
    """Which tokens pad, and begin what is decoded, where the file does not say it: that decides
    values, and no memory."""
    for part in (config, config.get_text_config(decoder=True)):
        if getattr(part, "pad_token_id", None) is None:
            part.pad_token_id = 0
        if getattr(part, "decoder_start_token_id", None) is None:
            part.decoder_start_token_id = part.pad_token_id


def _model_class(architectures: object, config: Any) -> Any:
    """The class that the configuration names, else the first language model class that transformers
    has for it."""
    transformers = _transformers()
    if isinstance(architectures, list) and architectures:
        found = getattr(transformers, str(architectures[0]), None)
        if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
            raise InputError(
                f"transformers {transformers.__version__} has no architecture {str(architectures[0])[:60]!r}",
                hint="without architectures in the configuration, the language model of its model_type is taken",
            )
        return found
    for auto in ("CAUSAL_LM", "MASKED_LM", "SEQ_TO_SEQ_CAUSAL_LM", "IMAGE_CLASSIFICATION", ""):
        mapping = getattr(transformers, f"MODEL_FOR_{auto}_MAPPING" if auto else "MODEL_MAPPING")
        if type(config) in mapping:
            cls = mapping[type(config)]
            return cls[0] if isinstance(cls, tuple) else cls
    raise InputError(f"transformers {transformers.__version__} has no model for the model_type {config.model_type!r}")


def _transformers() -> Any:
    return library("transformers", "a Hugging Face configuration needs transformers", "hf")


def library(module: str, who: str, extra: str) -> Any:
    """A library's module, imported. Raises `InputError` saying who needs it and how to install it
    where that fails."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{who}, which cannot be imported: {error}", hint=install_hint(extra)) from error


def _imported(factory: str) -> Any:
    """The function behind `package.module:function`; the working directory comes first, as it does
    for a script that lies in it."""
    module_name, _, path = factory.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    with one_line(f"model.factory {factory}: cannot import {module_name}"):
        found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        found = getattr(found, name, None)
    if not callable(found):
        raise InputError(f"model.factory {factory}: {module_name} has no function {path}")
    return found


def _checkpoint(model: Any, how: Checkpointing | None) -> None:
    """Let the model recompute its layers in backward, if that is wanted, by the switch that
    transformers' models have."""
    if how is None:
        return
    switches = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the second is the older name
    switch = next((getattr(model, name) for name in switches if hasattr(model, name)), None)
    if switch is None:
        raise InputError(f"workload.activation_checkpointing: {type(model).__name__} has no gradient_checkpointing_enable")
    if how.every != 1 and "every_n_layers" not in inspect.signature(switch).parameters:
        raise InputError(f"workload.checkpoint_every_n_layers: {type(model).__name__} has no such choice (transformers 5.24 has)")
    switch({"use_reentrant": how.reentrant}, **({"every_n_layers": how.every} if how.every != 1 else {}))


@contextlib.contextmanager
def one_line(doing: str) -> Iterator[None]:
    """Whatever the code of others raises, as an `InputError`; running out of memory is not its
    fault."""
    import torch

    try:
        yield
    except (InputError, MemoryError, torch.OutOfMemoryError):
        raise
    except (Exception, SystemExit) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise InputError(f"{doing}: {type(error).__name__}: {' '.join(lines)[:300]}") from error
