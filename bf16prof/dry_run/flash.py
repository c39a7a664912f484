"""FlashAttention 2 in a dry run: the package's functions, by PyTorch's operator of the same
kernels.

PyTorch carries FlashAttention's own code (aten/src/ATen/native/transformers/cuda/flash_attn), so
what the package allocates is what `_flash_attention_forward` and its backward do. Sequences that
fill one row are told apart by where they begin; transformers finds that in the values of positions,
which a dry run does not have: all sequences are equally long here.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bf16prof.cases import Job
from bf16prof.engine.constraints import FLASH, asks_for_flash


@contextlib.contextmanager
def flash_attention(job: Job) -> Iterator[None]:
    """Put them in the place of the package, where the job's model asks for it; put back at the
    end."""
    if not asks_for_flash(job):
        yield
        return
    utils: Any = importlib.import_module("transformers.modeling_flash_attention_utils")
    model: Any = importlib.import_module("transformers.modeling_utils").PreTrainedModel
    real_check, sequences = model._check_and_adjust_attn_implementation, _sequences(job)

    def check(self: Any, wanted: str | None, *args: Any, **keywords: Any) -> Any:
        if wanted != FLASH:
            return real_check(self, wanted, *args, **keywords)
        if not self._supports_flash_attn:
            raise ValueError(f"{type(self).__name__} does not support FlashAttention")
        return wanted

    def starts(positions: Tensor) -> Any:
        tokens = positions.numel()
        offsets = torch.empty(sequences + 1, dtype=torch.int32, device=positions.device)
        return (offsets, offsets), (-(-tokens // sequences), -(-tokens // sequences))

    with contextlib.ExitStack() as stack:
        for owner, name, instead in (
            (model, "_check_and_adjust_attn_implementation", check),
            (utils, "_lazy_imports", lambda *_, **__: (_rows, _packed, None, None, None)),
            (utils, "_is_packed_sequence", lambda *_: sequences > 0),
            (utils, "prepare_fa_kwargs_from_position_ids", starts),
        ):
            stack.enter_context(mock.patch.object(owner, name, instead))
        yield


def _sequences(job: Job) -> int:
    """How many sequences a row holds; 0 where it is one."""
    workload = job.profile.workload
    return workload.packed_sequences * workload.micro_batch_size


def _rows(q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
    """`flash_attn_func`: each row of a batch is a sequence."""
    return _attention(q, k, v, (None, None, q.shape[1], k.shape[1], dropout_p, causal), softmax_scale)


def _packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """`flash_attn_varlen_func`: one row of tokens, and where sequences begin in it."""
    return _attention(q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal), softmax_scale)


def _attention(q: Tensor, k: Tensor, v: Tensor, told: tuple[Any, ...], scale: float | None) -> Tensor:
    """Heads are made a multiple of 8 wide, as in the package."""
    width = q.shape[-1]
    if missing := -width % 8:
        q, k, v = (torch.nn.functional.pad(each, [0, missing]) for each in (q, k, v))
        scale = scale or float(width) ** -0.5
    out: Tensor = torch.ops.aten._flash_attention_forward(q, k, v, *told, False, scale=scale)[0]
    return out[..., :width]
