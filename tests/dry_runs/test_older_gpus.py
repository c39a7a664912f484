"""GPUs before compute capability 8.0: the closed form of every peak against the dry run, and which attention runs there."""

from __future__ import annotations

import pytest
from hugging_face import config
from judged import Judgement, judge
from test_estimate_against_simulate import holds

from bf16prof.cases import Job, Selection, expand
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.records import Device
from bf16prof.simulate.runner import Options

pytestmark = pytest.mark.timeout(560)

MODELS = ("gpt2", "llama")
CASES = [
    *((model, gpu, stage, recipe) for model in MODELS for gpu, stage, recipe in [
        ("t4", 3, "bf16-full"), ("v100-32gb", 2, "fp16-fp32-master"), ("titan rtx", 3, "fp32"), ("80GiB", 3, "bf16-full"),
    ]),
]  # fmt: skip
SEQUENCE, SEQUENCES = 256, 4


def job(model_type: str, gpu: str, stage: int, recipe: str) -> Job:
    """A case of a tiny model with sequences that are long for it, so that score matrices show."""
    values = {
        "model.hf_config": config(model_type, attention_dropout=0.0, max_position_embeddings=SEQUENCE) if model_type == "llama" else config(model_type, attn_pdrop=0.0, n_positions=SEQUENCE),
        "optimizer.torch_adam": False, "optimizer.fused": False, "workload.data": "synthetic", "workload.sequence_length": SEQUENCE,
        "workload.micro_batch_size": SEQUENCES, "workload.activation_checkpointing": False,
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

    holds(each)
    assert each.job.gpu is not None
    assert set(each.job.gpu.caveats()) < set(each.dry.notes)


@pytest.mark.parametrize("model", MODELS)
def test_only_bf16_keeps_score_matrices(judged: dict[tuple[str, str], Judgement], model: str) -> None:
    """`can_use_mem_efficient_attention` takes no bf16 below 8.0, where flash attention does not run: the math backend is left, in fp32."""
    activations = {gpu: sum(item.bytes for item in judged[model, gpu].dry.peak_items if "softmax" in item.name) for _, gpu, *_ in CASES}
    heads = judged[model, "t4"].job.profile.model.model_dump()["hf_config"]["n_head" if model == "gpt2" else "num_attention_heads"]

    assert activations["t4"] >= 4 * SEQUENCES * heads * SEQUENCE**2
    assert max(activations[gpu] for gpu in ("v100-32gb", "titan rtx", "80GiB")) < activations["t4"] / 2
