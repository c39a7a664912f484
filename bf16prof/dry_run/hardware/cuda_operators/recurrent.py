"""Recurrent layers on the simulated GPU: cuDNN runs all steps of all layers in one operator, and
keeps a reserve for backward.

A CPU runs oneDNN, or one step at a time. Sources: aten/src/ATen/native/RNN.cpp (who is called),
aten/src/ATen/native/cudnn/RNN.cpp (what is allocated), aten/src/ATen/native/cuda/RNN.cu (single
cells). The size of cuDNN's reserve is not public; `RESERVED` is the least that backward can do
with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bf16prof.dry_run.tracker import GPU

MODES = {"rnn_relu": 0, "rnn_tanh": 1, "lstm": 2, "gru": 3}
"""`cudnnRNNMode_t`."""

GATES = {0: 1, 1: 1, 2: 4, 3: 3}
"""Rows of a weight matrix, in hidden sizes, by mode."""

RESERVED = {0: 1, 1: 1, 2: 5, 3: 4}
"""What backward needs of each step, in hidden sizes: the new state; LSTM: four gates and the cell;
GRU: three gates, and the hidden part of the new gate before it is multiplied (the derivatives of
the equations in PyTorch's documentation of these layers)."""

_ATEN = torch.ops.aten


def recurrent(mode: int) -> Callable[..., Any]:
    """`lstm.input`, `gru.input` or `rnn_*.input`, by cuDNN (`_cudnn_impl`)."""

    def run(input: Tensor, hx: Any, params: Sequence[Tensor], *rest: Any) -> Any:
        _, layers, dropout, train, bidirectional, batch_first = rest
        if not torch.backends.cudnn.enabled or input.numel() == 0 or any(each.dtype is not input.dtype for each in params):
            return NotImplemented
        hidden, cell = (hx[0], hx[1]) if isinstance(hx, tuple | list) else (hx, None)
        per_layer = len(params) // (layers * (2 if bidirectional else 1))
        size = params[1].shape[0] // GATES[mode]
        projected = hidden.shape[-1] if hidden.shape[-1] != size else 0
        out, hy, cy, _, _ = _ATEN._cudnn_rnn(
            input, list(params), per_layer, _weight_buffer(params), hidden, cell, mode, size, projected, layers, batch_first, dropout,
            train, bidirectional, [], _dropout_state(input, dropout, train),
        )  # fmt: skip
        return (out, hy) if cell is None else (out, hy, cy)

    return run


def _weight_buffer(params: Sequence[Tensor]) -> Tensor:
    """`try_get_weight_buf`: weights that do not lie in one buffer, as `flatten_parameters` leaves
    them, are copied into a new one.

    DeepSpeed moves parameters into buffers of its own, in its own order; those that it left alone
    are cuDNN's.
    """
    copied = 0 if all(_is_whole(each) for each in params) else sum(each.numel() for each in params)
    return torch.empty(copied, dtype=params[0].dtype, device=params[0].device)


def _is_whole(parameter: Tensor) -> bool:
    return not hasattr(parameter, "ds_id") and parameter.untyped_storage().nbytes() == parameter.numel() * parameter.itemsize


def _dropout_state(input: Tensor, dropout: float, train: bool) -> Tensor | None:
    """The generators' states, which PyTorch keeps for good; cuDNN's size for them is not public, so
    none are counted."""
    return torch.empty(0, dtype=torch.uint8, device=input.device) if dropout and train else None


def reserve(input: Tensor, *args: Any) -> Sequence[int]:
    """Bytes of the outputs' storages of `_cudnn_rnn`: the fourth is the reserve, where the call is
    made to train."""
    mode, size, layers, train, bidirectional = args[5], args[6], args[8], args[11], args[12]
    steps = input.numel() // input.shape[-1]
    return (0, 0, 0, steps * layers * (2 if bidirectional else 1) * RESERVED[mode] * size * input.itemsize if train else 0)


def contiguous_input(input: Tensor, *args: Any) -> int:
    """Scratch of `_cudnn_rnn`: cuDNN takes the steps first, so a batch that comes first is
    copied."""
    batch_first = args[9]
    return input.nbytes if batch_first and 1 not in input.shape[:2] and input.device == GPU else 0


def lstm_cell(input: Tensor, hx: Sequence[Tensor], w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> Any:
    """One step of an LSTM: `_thnn_fused_lstm_cell`, which keeps its gates and both cells."""
    hy, cy, _ = _ATEN._thnn_fused_lstm_cell(input @ w_ih.t(), hx[0] @ w_hh.t(), hx[1], *biases)
    return hy, cy


def gru_cell(input: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, *biases: Tensor | None) -> Any:
    """One step of a GRU: `_thnn_fused_gru_cell`, which keeps a workspace of five hidden sizes."""
    return _ATEN._thnn_fused_gru_cell(input @ w_ih.t(), hx @ w_hh.t(), hx, *biases)[0]


def cudnn_rnn_backward(input: Tensor, weight: Sequence[Tensor], *args: Any) -> Any:
    """Shapes of `_cudnn_rnn_backward`: the gradients of the weights are views of one buffer."""
    hx, cx, mask = args[2], args[3], args[-1]
    flat = weight[0].new_empty(sum(each.numel() for each in weight)) if mask[3] else None
    sizes = [each.numel() for each in weight]
    grads = [] if flat is None else [part.view(each.shape) for part, each in zip(torch.split(flat, sizes), weight, strict=True)]
    return (
        torch.empty_like(input) if mask[0] else None,
        torch.empty_like(hx) if mask[1] else None,
        torch.empty_like(cx) if mask[2] and cx is not None else None,
        grads,
    )


def fused_gru_cell(input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, *_: Any) -> Any:
    """Shapes of `_thnn_fused_gru_cell` (cuda/RNN.cu: GRU_WORKSPACE_MULTIPLIER is 5)."""
    return torch.empty_like(hx), hx.new_empty((hx.shape[0], hx.shape[1] * 5))


def fused_gru_cell_backward(grad: Tensor, workspace: Tensor, has_bias: bool) -> Any:
    """Shapes of `_thnn_fused_gru_cell_backward`."""
    gates = [grad.new_empty((grad.shape[0], 3 * grad.shape[1])) for _ in range(2)]
    sums = [gates[0].new_empty(gates[0].shape[1]) if has_bias else None for _ in range(2)]
    return (*gates, torch.empty_like(grad), *sums)


RECURRENT: dict[str, Callable[..., Any]] = {
    **{f"{name}.input": recurrent(mode) for name, mode in MODES.items()},
    "lstm_cell": lstm_cell,
    "gru_cell": gru_cell,
}
"""Composite operators that call other operators below on a GPU."""

SHAPES: dict[str, Callable[..., Any]] = {
    "_cudnn_rnn_backward": cudnn_rnn_backward,
    "_thnn_fused_gru_cell": fused_gru_cell,
    "_thnn_fused_gru_cell_backward": fused_gru_cell_backward,
}
"""Shape functions that PyTorch does not have."""
