"""What is different in the libraries that scripts train with, each with its reason."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from bf16prof.dry_run.script.invented import Invented
from bf16prof.dry_run.script.saving import skipped
from bf16prof.dry_run.shims import ASKING_FOR_VALUES
from bf16prof.scripts.imports import Change

PRETRAINED = "from_pretrained: the model is built from its config, no weights are read"
FLASH = "FlashAttention: sdpa's flash kernel stands for it, which keeps the same tensors"
GENERATION = "what a model generates has no values: every sequence grows to its greatest length"
OF_THE_MODEL = frozenset({
    "dtype", "torch_dtype", "attn_implementation", "device_map", "max_memory", "quantization_config", "low_cpu_mem_usage",
    "output_loading_info", "use_safetensors", "ignore_mismatched_sizes", "state_dict", "offload_folder", "variant", "weights_only",
    "from_tf", "from_flax", "key_mapping", "tp_plan", "use_kernels",
})  # fmt: skip
"""Arguments of `from_pretrained` that say nothing of the config."""
FLASHES = ("flash_attention_2", "flash_attention_3", "kernels-community/flash-attn")


def changes(invented: Invented) -> dict[str, Change]:
    """By module, what is changed in it."""
    own = _Libraries(invented)
    found: dict[str, Change] = {
        "transformers.modeling_utils": own.transformers,
        "transformers.generation.utils": own.generation,
        "safetensors.torch": own.safetensors,
        "accelerate.utils.random": own.random_states,
        "accelerate.data_loader": own.random_states,
        "peft.utils.save_and_load": own.peft,
        "triton.runtime.jit": own.triton,
        "triton.runtime.autotuner": own.triton,
    }
    for module, name, replacement in ASKING_FOR_VALUES:
        found[module] = _both(found.get(module), functools.partial(_replace, name=name, replacement=replacement))
    return found


def _replace(module: ModuleType, name: str, replacement: Callable[..., Any]) -> None:
    if hasattr(module, name):
        setattr(module, name, functools.partial(replacement, getattr(module, name)))


def _both(first: Change | None, second: Change) -> Change:
    def change(module: ModuleType) -> None:
        if first is not None:
            first(module)
        second(module)

    return change


class _Libraries:
    """The changes that say what they did."""

    def __init__(self, invented: Invented) -> None:
        self._invented = invented

    def transformers(self, module: ModuleType) -> None:
        """Models are built from their configs; their files are neither read nor written."""
        invented = self._invented

        def from_pretrained(cls: Any, pretrained_model_name_or_path: Any = None, *_: Any, **kwargs: Any) -> Any:
            invented.note(PRETRAINED)
            model = _from_config(cls, pretrained_model_name_or_path, kwargs, invented)
            if kwargs.get("output_loading_info"):
                return model, {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}
            return model

        real_check = module.PreTrainedModel._check_and_adjust_attn_implementation

        def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> Any:
            if isinstance(attn_implementation, str) and attn_implementation.removeprefix("paged|").startswith(FLASHES):
                invented.note(FLASH)
                attn_implementation = "sdpa"
            return real_check(self, attn_implementation, *args, **kwargs)

        module.PreTrainedModel._check_and_adjust_attn_implementation = check
        module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)
        module.PreTrainedModel.save_pretrained = skipped(invented, "save_pretrained was skipped")

    def generation(self, module: ModuleType) -> None:
        """Nothing ends a sequence early."""
        invented, real = self._invented, module.GenerationMixin.generate

        @functools.wraps(real)
        def generate(*args: Any, **kwargs: Any) -> Any:
            invented.note(GENERATION)
            return real(*args, **kwargs)

        module.GenerationMixin.generate = generate

    def safetensors(self, module: ModuleType) -> None:
        """No file is written."""
        for name in ("save_file", "save_model", "save"):
            setattr(module, name, skipped(self._invented, f"safetensors.torch.{name} was skipped", b"" if name == "save" else None))

    def random_states(self, module: ModuleType) -> None:
        """Ranks do not agree on the state of generators, which is raw memory of fake tensors."""
        module.synchronize_rng_states = lambda *_, **__: None  # type: ignore[attr-defined]

    def peft(self, module: ModuleType) -> None:
        """Adapters are not saved."""
        module.get_peft_model_state_dict = skipped(self._invented, "saving an adapter was skipped", {})  # type: ignore[attr-defined]

    def triton(self, module: ModuleType) -> None:
        """Triton's kernels allocate nothing: they write into tensors that are there already, and
        have no values here."""
        run = skipped(self._invented, "a Triton kernel was not run: what it writes has no values")
        for name in ("JITFunction", "Autotuner", "Heuristics"):
            if hasattr(module, name):
                getattr(module, name).run = run


def _from_config(cls: Any, name: Any, kwargs: Mapping[str, Any], invented: Invented) -> Any:
    """The model of a config as `from_pretrained` gives it: in the dtype that was asked for, for
    evaluation."""
    import torch

    given = {key: value for key, value in kwargs.items() if key not in OF_THE_MODEL}
    config = given.pop("config", None)
    if config is None or isinstance(config, str):
        config, _ = cls.config_class.from_pretrained(config or name, return_unused_kwargs=True, **given)
    if name is not None:
        config.name_or_path = str(name)  # by which a trainer finds the tokenizer
    dtype = _dtype(kwargs.get("dtype", kwargs.get("torch_dtype")), config)
    if kwargs.get("quantization_config") is not None:
        invented.note("quantization_config was ignored: the weights are counted in their full dtype")
    asked = {"attn_implementation": kwargs["attn_implementation"]} if kwargs.get("attn_implementation") else {}
    with _without_initialization():
        model = cls._from_config(config, dtype=dtype, **asked)
    model.eval()
    return model.to("cuda") if kwargs.get("device_map") and torch.cuda.is_available() else model


def _dtype(asked: Any, config: Any) -> Any:
    """The dtype of the weights: as asked for, or as the config says; before transformers 5 that had
    to be asked for by "auto"."""
    import torch
    import transformers

    if asked is None and int(transformers.__version__.split(".")[0]) >= 5:
        asked = "auto"
    if asked == "auto":
        asked = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    if isinstance(asked, str):
        asked = getattr(torch, asked)
    return torch.float32 if asked is None else asked


def _without_initialization() -> contextlib.AbstractContextManager[Any]:
    """As weights that are read afterwards are not initialized, which transformers 4 could not do
    with partitioned ones."""
    from transformers import modeling_utils

    without: Callable[[], contextlib.AbstractContextManager[Any]] = getattr(modeling_utils, "no_init_weights", contextlib.nullcontext)
    return without()
