"""FlashAttention's package: where it runs, and what its backward asks for, against the kernel that
PyTorch calls for rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Main, main, refused
from hugging_face import config

from bf16prof.kernels import AttentionCall, KernelCall, scratch_bytes
from bf16prof.reductions import Processor

__all__ = ["main"]

GPU = Processor(132, 2048)


@pytest.mark.parametrize("key_heads", [8, 2])
def test_packed_rows_take_what_rows_do_and_a_block_between_sequences(key_heads: int) -> None:
    """`mha_bwd` and `mha_varlen_bwd` (flash_api.cpp): of 128 rows more for each sequence, dQ in
    fp32 and a sum."""
    sequences, tokens, heads, dim = 3, 256, 8, 64
    rows = AttentionCall(sequences, heads, tokens, dim, key_heads, tokens, dim, 2)
    packed = (sequences * tokens, heads, dim, key_heads, sequences * tokens, sequences, 2)

    difference = scratch_bytes(KernelCall("packed flash attention, backward", packed), GPU) - scratch_bytes(
        KernelCall("flash attention, backward", rows), GPU
    )
    assert difference == heads * 128 * sequences * (dim + 1) * 4


@pytest.mark.parametrize(("more", "expected"), [
    (("--device", "cpu"), "runs on GPUs only"),
    (("--recipe", "fp32"), "takes bf16 and fp16 only"),
    (("--gpu", "v100-32gb"), "needs compute capability 8.0"),
])  # fmt: skip
def test_where_it_does_not_run_is_one_line(more: tuple[str, ...], expected: str, main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")

    assert expected in refused(main("simulate", file, "--set", "model.attn_implementation=flash_attention_2", *more))
