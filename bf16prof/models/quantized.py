"""A model of transformers whose linear layers are 4 bits wide, as bitsandbytes keeps them: the
frozen base of QLoRA.

transformers' own function puts `Linear4bit` in the place of each layer but the head and what is
tied (integrations/bitsandbytes.py). The weights are quantized here, on the device, by bitsandbytes'
functions: packed in pairs, with a scale for every 64 (bitsandbytes 0.50.2, nn/modules.py
`Params4bit._quantize`, functional.py `quantize_4bit`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bf16prof.models.foreign import library, one_line
from bf16prof.profiles.adapters import QuantizationSettings

if TYPE_CHECKING:
    import torch
    from torch import nn

BLOCK = 64
"""Weights that share a scale: `Params4bit`'s own choice."""


def import_bitsandbytes(settings: QuantizationSettings | None) -> None:
    """Import what a quantized base needs, so that what it allocates for itself is not taken for the
    job's: its kernel for CPUs makes tables of the numbers that there are when it is called first
    (backends/default/ops.py)."""
    if settings is not None:
        import torch

        _bitsandbytes().functional.quantize_4bit(torch.zeros(BLOCK), quant_type=settings.bnb_4bit_quant_type)


def quantized(model: nn.Module, settings: QuantizationSettings, dtype: torch.dtype, device: str) -> nn.Module:
    """The model with 4-bit weights that dequantize to `dtype`. Raises `InputError` where
    transformers says no."""
    from torch import nn

    bnb = _bitsandbytes()
    with one_line(f"[quantization] transformers cannot quantize {type(model).__name__}"):
        from transformers import BitsAndBytesConfig
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear
        from transformers.quantizers.base import get_keys_to_not_convert

        kept = get_keys_to_not_convert(model)
        whole = dict(model.named_modules())
        config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype, **settings.model_dump(mode="json"))  # type: ignore[no-untyped-call]
        any_model: Any = model
        replace_with_bnb_linear(any_model, kept, config)
        for name, layer in model.named_modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                old = whole.pop(name)
                layer.weight = _packed(bnb, layer, old.weight.detach().to(device=device, dtype=dtype), settings)
                layer.bias = None if old.bias is None else nn.Parameter(old.bias.detach(), requires_grad=False)
                old.weight = None
                layer.support_avx512bf16_for_cpu = False  # an evaluation on a CPU would pack weights anew, for inference alone
        any_model.is_loaded_in_4bit = True  # what PEFT asks for
    return model


def _packed(bnb: Any, layer: Any, weight: torch.Tensor, settings: QuantizationSettings) -> Any:
    import torch

    storage = getattr(torch, settings.bnb_4bit_quant_storage)
    said = {"compress_statistics": settings.bnb_4bit_use_double_quant, "quant_type": settings.bnb_4bit_quant_type, "quant_storage": storage}
    packed, layer.quant_state = bnb.functional.quantize_4bit(weight, blocksize=BLOCK, **said)
    told = {**said, "blocksize": BLOCK, "quant_state": layer.quant_state, "bnb_quantized": True, "module": layer}
    return bnb.nn.Params4bit(packed, requires_grad=False, **told)


def _bitsandbytes() -> Any:
    return library("bitsandbytes", "4-bit weights need bitsandbytes", "recipes")
