"""GPUs before compute capability 8.0: the closed form of the passes against the dry run, and which
attention runs there."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from judged import Judgement, judge
from test_estimate_against_simulate import PEAK

from bf16prof.cases import Job, Selection, expand
from bf16prof.dry_run.runner import Options
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.vocabulary import Device, Phase

pytestmark = [pytest.mark.timeout(560), pytest.mark.xdist_group("older_gpus")]

SEQUENCE, SEQUENCES, HEADS = 256, 4, 4
SIZES = {"hidden_size": 64, "num_heads": HEADS, "num_layers": 2, "vocab_size": 101, "max_sequence_length": SEQUENCE}
MODELS: dict[str, dict[str, Any]] = {"gpt2": {"family": "gpt2", **SIZES}, "llama": {"family": "llama", "num_kv_heads": 2, **SIZES}}
"""Heads of a width that every kernel takes; in Llama two of them share their keys."""
CASES = [
    (model, gpu, stage, recipe)
    for model in MODELS
    for gpu, stage, recipe in [
        ("t4", 3, "bf16-full"),
        ("v100-32gb", 2, "fp16-fp32-master"),
        ("titan rtx", 3, "fp32"),
        ("80GiB", 3, "bf16-full"),
    ]
]


def job(family: str, gpu: str, stage: int, recipe: str) -> Job:
    """A case of a tiny model with sequences that are long for it, so that score matrices show."""
    values = {
        "model": MODELS[family], "optimizer.torch_adam": False, "optimizer.fused": False,
        "workload.data": "synthetic", "workload.sequence_length": SEQUENCE, "workload.micro_batch_size": SEQUENCES,
        "workload.activation_checkpointing": False,
    }  # fmt: skip
    profile = load_profile("cpu-demo", [Override(key, value, "test") for key, value in values.items()]).profile
    return admit(expand(Selection(profile, [stage], [2], [recipe], Device.GPU, find_gpu(gpu))))[0][0]


@pytest.fixture(scope="module")
def judged() -> dict[tuple[str, str], Judgement]:
    """By model and GPU."""
    found = judge([job(*case) for case in CASES], Options(expandable_segments=True))
    return {case[:2]: each for case, each in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_the_closed_form_is_what_the_dry_run_finds(judged: dict[tuple[str, str], Judgement], case: tuple[str, str, int, str]) -> None:
    each = judged[case[:2]]

    assert max(abs(each.errors[phase]) for phase in (Phase.FORWARD, Phase.BACKWARD)) <= PEAK, each.errors
    assert each.job.gpu is not None
    assert set(each.job.gpu.caveats()) < set(each.dry.notes)


@pytest.mark.parametrize(
    ("model", "gpu", "kept"),
    [
        ("gpt2", "t4", True),
        ("gpt2", "v100-32gb", False),
        ("gpt2", "titan rtx", False),
        ("llama", "t4", True),
        ("llama", "v100-32gb", True),
        ("llama", "titan rtx", True),
        ("gpt2", "80GiB", False),
        ("llama", "80GiB", False),
    ],
)
def test_which_attention_keeps_score_matrices(judged: dict[tuple[str, str], Judgement], model: str, gpu: str, kept: bool) -> None:
    """Flash attention begins at 8.0 (`check_flash_attention_hardware_support`). Before it the
    memory-efficient kernel takes fp16 and fp32, no bf16 (`less_than_sm80_mem_efficient_dtypes`),
    and no heads that share keys; what it does not take runs in full, in fp32."""
    scores = {item.bytes for item in judged[model, gpu].dry.peak_items if "_safe_softmax" in item.name}

    assert (max(scores, default=0) >= 4 * SEQUENCES * HEADS * SEQUENCE**2) is kept


@pytest.mark.parametrize("width", [64, 80, 128, 192])
def test_small_gpus_choose_the_attention_of_an_a100(width: int) -> None:
    """Signatures that ship rely on it (`Inquiry.as_shipped`)."""
    import torch

    from bf16prof.dry_run.hardware.cuda_operators.attention import Call, choose

    for dtype, grad, masked, dropout in itertools.product((torch.bfloat16, torch.float32), (True, False), (True, False), (0.0, 0.1)):
        query = torch.empty(2, 4, 8, width, dtype=dtype, requires_grad=grad)
        grouped = torch.empty(2, 2, 8, width, dtype=dtype, requires_grad=grad)
        mask = torch.zeros(2, 1, 8, 8, dtype=dtype) if masked else None
        for keys in (query, grouped):
            call = Call(query, keys, keys, mask, dropout, not masked, keys is grouped)
            assert len({choose(call, capability) for capability in ((8, 0), (8, 6), (8, 9), (12, 0), (12, 1))}) == 1
