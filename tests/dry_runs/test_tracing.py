"""Signatures: recorded from real code, held against the passes that are written by hand, and
against dry runs of what has none.

All traces of this file are made at once, and kept in a folder of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hugging_face import config
from judged import judge

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form import anatomy
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.runner import Options
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.records import MemoryRecord
from bf16prof.reductions import processor_of
from bf16prof.signatures import shipped, store
from bf16prof.signatures.general import General
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.signatures.sampling import generalized
from bf16prof.signatures.shipped import FOLDER
from bf16prof.signatures.signature import Signature
from bf16prof.tracing.session import Session
from bf16prof.vocabulary import Device, Phase

pytestmark = [pytest.mark.timeout(290), pytest.mark.xdist_group("tracing")]

SCALAR = 512
"""A block: the tapes leave out one of the scalars with which autograd begins."""

LORA = """
from torch import nn

class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.down, self.up = base, nn.Linear(base.in_features, 8, bias=False), nn.Linear(8, base.out_features, bias=False)
        base.requires_grad_(False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(500, 256).requires_grad_(False)
        self.layers = nn.ModuleList(nn.Sequential(Adapted(nn.Linear(256, 512)), nn.GELU(), Adapted(nn.Linear(512, 256))) for _ in range(3))
        self.attention = nn.MultiheadAttention(256, 4, batch_first=True)
        self.head = nn.Linear(256, 500, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.attention(x, x, x, need_weights=False)[0])

def adapted():
    return Net()
"""
"""Most parameters frozen, one tied, and a module that uses another's parameters without calling
it."""

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 1000, "max_position_embeddings": 256}
LLAMA = config("llama", **SIZES, head_dim=64)
FAMILIES = {
    family: {"model.family": family, "model.num_layers": 4, "model.hidden_size": 256, "model.num_heads": 4, "model.vocab_size": 1000}
    for family in ("llama", "gpt2", "transformer-postln")
}
BATCH_NORM = {"model_type": "mobilenet_v2", "image_size": 32, "depth_multiplier": 0.25}
"""Its buffers are made of ones and zeros, which `zero.Init` casts."""
IMAGES = {"model.inputs": {"pixel_values": {"dtype": "parameters", "shape": ["micro_batch", 3, 32, 32]}}}
T5 = {"model_type": "t5", "d_model": 256, "d_kv": 64, "d_ff": 512, "num_layers": 3, "num_heads": 4, "vocab_size": 2000}


def job(stage: int, model: dict[str, Any], *, recipe: str = "bf16-full", device: Device = Device.GPU) -> Job:
    sets = {"workload.sequence_length": 128, "workload.micro_batch_size": 2, "workload.data": "synthetic", **model}
    if device is Device.GPU:
        sets |= {"optimizer.torch_adam": False, "optimizer.fused": False}
    profile = load_profile("cpu-demo", [Override(key, value, "test") for key, value in sets.items()]).profile
    gpu = find_gpu("h100-80gb") if device is Device.GPU else None
    return admit(expand(Selection(profile, [stage], [2], [recipe], device, gpu)))[0][0]


HAND = {
    (name, stage): job(stage, {**model, "workload.activation_checkpointing": stage == 3})
    for name, model in FAMILIES.items()
    for stage in (1, 3)
}
PLAIN = job(2, {"model.hf_config": LLAMA})
OTHERS = {
    "an encoder and a decoder": job(3, {"model.hf_config": T5}),
    "frozen parameters, stage 2": job(2, {"model.factory": "adapted_model:adapted", "model.vocab_size": 500}),
    "frozen parameters, stage 3": job(3, {"model.factory": "adapted_model:adapted", "model.vocab_size": 500}),
    "LoRA, checkpointed, stage 3": job(
        3,
        {
            "model.hf_config": LLAMA,
            "workload.activation_checkpointing": True,
            "workload.zero_init": False,
            "peft": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
        },
    ),
    "buffers made inside zero.Init": job(3, {"model.hf_config": BATCH_NORM, "workload.zero_init": True, **IMAGES}),
    "Liger's loss, stage 2": job(2, {"model.hf_config": LLAMA, "workload.liger": "loss"}),
    "Liger, stage 3": job(3, {"model.hf_config": LLAMA, "workload.liger": "all"}),
    "packed sequences": job(3, {"model.hf_config": LLAMA, "workload.packed_sequences": 3}),
    "packed sequences, FlashAttention": job(
        2, {"model.hf_config": {**LLAMA, "attn_implementation": "flash_attention_2"}, "workload.packed_sequences": 3}
    ),
    "CPU ranks": job(2, {}, recipe="bf16-fp32-master", device=Device.CPU),
}


SHIPPED = admit(expand(Selection(load_profile("olmo2-1b").profile, [3], [8], ["bf16-full"], Device.GPU, find_gpu("h100-80gb"))))[0][0]
"""A preset whose signature comes with the package."""


DEEP = job(
    3,
    {
        "model.hf_config": {**LLAMA, "num_hidden_layers": 9},
        "workload.activation_checkpointing": True,
        "workload.micro_batch_size": 5,
    },
)
"""A batch that is none of those from which others follow."""


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Everything that is traced here, in a cache of its own."""
    folder: Path = tmp_path_factory.mktemp("traced")
    (folder / "adapted_model.py").write_text(LORA, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BF16PROF_CACHE", str(folder))
        patch.setenv("PYTHONPATH", str(folder))
        patch.setattr(shipped, "FOLDER", folder)
        store.forget()
        session = Session()
        session.answer([Inquiry.of(each) for each in (*HAND.values(), *OTHERS.values(), PLAIN, SHIPPED, DEEP)])
        found = generalized(Inquiry.of(DEEP), session.record, [128])
        assert found is not None
        store.keep_general(Inquiry.of(DEEP), found)
        session.close()
        yield folder
        store.forget()


def traced(job: Job) -> MemoryRecord:
    """The estimate from the signature, though the pass is written down."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(anatomy, "_asks", lambda job: True)
        return predict(job)


@pytest.mark.parametrize(("name", "stage"), HAND)
def test_a_recorded_pass_is_the_one_that_was_written_by_hand(recorded: Path, name: str, stage: int) -> None:
    by_hand, found = predict(HAND[name, stage]), traced(HAND[name, stage])

    assert found.components == by_hand.components
    assert found.items == by_hand.items
    difference = {phase: (found.phases[phase].peak_bytes or 0) - (by_hand.phases[phase].peak_bytes or 0) for phase in by_hand.phases}
    assert difference[Phase.FORWARD] == difference[Phase.STEP] == difference[Phase.INIT] == 0
    assert difference[Phase.BACKWARD] in (0, SCALAR)
    assert found.peak_phase is by_hand.peak_phase
    assert found.work == by_hand.work


def test_what_is_not_written_down_agrees_with_its_dry_run(recorded: Path) -> None:
    for name, judged in zip(OTHERS, judge(list(OTHERS.values()), Options(expandable_segments=True)), strict=True):
        assert judged.steady_error_bytes == 0, name
        assert abs(judged.worst) < 0.001, (name, judged.errors)
        assert judged.names_the_phase, name


def test_with_ligers_loss_nobody_has_the_whole_logits(recorded: Path) -> None:
    plain = predict(PLAIN)
    fused = predict(OTHERS["Liger's loss, stage 2"])

    tokens, vocabulary = 2 * 128, 1000
    assert (plain.phases[Phase.FORWARD].peak_bytes or 0) - (fused.phases[Phase.FORWARD].peak_bytes or 0) >= tokens * vocabulary * 2
    assert fused.allocated_bytes == plain.allocated_bytes, "a loop as the Trainer's keeps no logits"


def test_what_was_recorded_is_kept_for_other_processes_as_long_as_a_function_stays_as_it_was(recorded: Path) -> None:
    store.forget()
    of_a_function = Inquiry.of(OTHERS["frozen parameters, stage 2"])

    assert store.find(Inquiry.of(HAND["llama", 1])) is not None
    assert store.find(of_a_function) is not None
    store.forget()
    (recorded / "adapted_model.py").write_text(f"{LORA}\n", encoding="utf-8")
    assert store.find(of_a_function) is None


def test_what_ships_is_what_the_model_does(recorded: Path) -> None:
    """With the releases that it was recorded with; `make signatures` says what has changed."""
    asked = Inquiry.of(SHIPPED)
    found = store.find(asked)
    general = FOLDER / shipped.general_file_of(asked).name
    if general.exists():
        ships = General.unpacked(general.read_bytes()).at(asked.point, processor_of(SHIPPED.gpu))
    else:
        ships = Signature.unpacked((FOLDER / shipped.file_of(asked).name).read_bytes())

    assert found is not None
    assert ships is not None
    if found.versions == ships.versions:
        for what in ("events", "parameters", "held", "modules", "outputs", "loss_bytes"):
            assert getattr(found, what) == getattr(ships, what), what


def test_a_few_passes_through_a_few_layers_tell_those_of_any_batch_through_all(recorded: Path) -> None:
    general, exact = store.general_of(Inquiry.of(DEEP)), store.find(Inquiry.of(DEEP))

    assert general is not None
    assert exact is not None
    found = general.at((5, 128), processor_of(DEEP.gpu))
    assert found is not None
    assert len(found.events) == len(exact.events) > 1000
    for what in ("events", "parameters", "held", "modules", "outputs", "loss_bytes"):
        assert getattr(found, what) == getattr(exact, what), what


def test_recipes_ranks_and_accumulation_ask_the_same() -> None:
    asked = Inquiry.of(PLAIN)
    more = job(1, {"model.hf_config": LLAMA, "workload.gradient_accumulation_steps": 4})

    assert Inquiry.of(dataclasses.replace(more, case=dataclasses.replace(more.case, world_size=64))) == asked
    assert Inquiry.of(job(3, {"model.hf_config": LLAMA})) != asked
    assert Inquiry.of(job(1, {"model.hf_config": LLAMA, "workload.activation_checkpointing": True})) != asked
