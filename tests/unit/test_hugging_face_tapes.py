"""The passes of transformers' models on a tape: parameters, what is left in the end, layers that repeat, models without a tape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hugging_face import TINY, config, drawn
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.leaves import Leaves, in_layers
from bf16prof.closed_form.predict import predict
from bf16prof.closed_form.program import Program, key_of, program, record
from bf16prof.engine.constraints import admit
from bf16prof.errors import InputError
from bf16prof.models.autograd.tape import Event, Precision, Tape
from bf16prof.models.shapes import huggingface as shapes
from bf16prof.models.shapes import inventory
from bf16prof.models.tapes import ForwardRun, network
from bf16prof.models.tapes.huggingface import model_types
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.records import Device, MemoryRecord, Phase

BF16 = Precision(2)
AUTOCAST = Precision(4, 2)
H100 = (9, 0)
MIXED_LAYERS: dict[str, dict[str, Any]] = {
    "gemma2": {"num_hidden_layers": 7, "sliding_window": 8},
    "gemma3_text": {"num_hidden_layers": 13, "sliding_window": 8, "sliding_window_pattern": 4},
    "qwen2": {"num_hidden_layers": 6, "use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8},
    "qwen3_moe": {"num_hidden_layers": 7, "mlp_only_layers": [0, 3], "decoder_sparse_step": 2},
}
"""Layers of several kinds, each of which occurs more often than the tape holds it."""


def run(content: dict[str, Any], *, checkpointing: bool = False, attention: str | None = None) -> ForwardRun:
    model = HuggingFaceSettings(hf_config=content, attn_implementation=attention)
    return ForwardRun(model, batch=2, sequence=16, checkpointing=checkpointing, capability=H100, dtype="bf16")


def layers(of: ForwardRun) -> Sequence[int]:
    return range(len(network(of).kinds))


def highest(events: Sequence[Event]) -> tuple[int, int]:
    """The highest level of storages, and the last."""
    level = best = 0
    for event in events:
        if event.kind == "memory":
            level += event.bytes
            best = max(best, level)
    return best, level


def walked(whole: Program) -> tuple[int, int]:
    level = best = 0
    for section, _ in whole.sections:
        for segment in section.segments:
            best = max(best, level + segment.highest)
            level += segment.net
    return best, level


def peaks(content: dict[str, Any], recipe: str = "bf16-full", **values: Any) -> MemoryRecord:
    sets = {
        "model.hf_config": content, "optimizer.torch_adam": False, "optimizer.fused": False, "workload.data": "synthetic",
        "workload.sequence_length": 16, **{key.replace("__", "."): value for key, value in values.items()},
    }  # fmt: skip
    profile = load_profile("cpu-demo", [Override(key, value, "test") for key, value in sets.items()]).profile
    job: Job = admit(expand(Selection(profile, [1], [2], [recipe], Device.GPU, find_gpu("h100-80gb"))))[0][0]
    return predict(job)


def forward(record: MemoryRecord) -> int:
    return record.phases[Phase.FORWARD].peak_bytes or 0


def test_all_model_types_have_a_tape() -> None:
    assert set(model_types()) == set(shapes.model_types()) == set(TINY)


@settings(deadline=None, max_examples=8)
@pytest.mark.parametrize("model_type", sorted(TINY))
@given(data=st.data())
def test_every_parameter_is_used_and_has_a_gradient(model_type: str, data: st.DataObject) -> None:
    of = run(dict(data.draw(drawn(model_type))))
    try:
        known = network(of)
    except InputError:
        return  # the message is another test's
    tape = Tape(BF16)
    loss = known.loss(tape, layers(of))
    tape.backward(loss, tape.new(1, 4, "ones_like"))

    expected = {key_of(each.name): each.numel for each in inventory(of.model)}
    assert {key: each.numel for key, each in tape._parameters.items()} == expected
    assert sorted(event.subject for event in tape.events if event.kind == "gradient") == sorted(expected)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [BF16, AUTOCAST])
@pytest.mark.parametrize("model_type", sorted(TINY))
def test_logits_and_gradients_are_all_that_is_left(model_type: str, precision: Precision, checkpointing: bool) -> None:
    of = run(config(model_type), checkpointing=checkpointing)
    whole = program(of, precision, False, True, 1)
    vocabulary, parameters = of.model.vocab_size, sum(each.numel for each in inventory(of.model))
    logits = of.tokens * vocabulary * (precision.autocast or precision.parameter)

    left = sum(whole.net.values()) - parameters * precision.parameter - logits
    assert 0 <= left <= 16  # the loss, its gradient


@pytest.mark.parametrize("zero3", [False, True])
@pytest.mark.parametrize("attention", [None, "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", sorted(MIXED_LAYERS))
def test_layers_of_a_kind_repeat(model_type: str, checkpointing: bool, attention: str | None, zero3: bool) -> None:
    of = run(config(model_type, **MIXED_LAYERS[model_type]), checkpointing=checkpointing, attention=attention)

    assert walked(program(of, AUTOCAST, zero3, True, 1)) == highest(record(of, Tape(AUTOCAST, zero3=zero3), layers(of)))


@pytest.mark.parametrize(
    ("content", "values", "reason"),
    [
        (config("phi", qk_layernorm=True), {}, "model.hf_config.qk_layernorm"),
        (config("falcon", alibi=True), {}, "rotary positions and sdpa only"),
        (config("bloom", slow_but_exact=True), {}, "slow_but_exact"),
        (config("opt", layerdrop=0.1), {}, "layerdrop"),
        (config("llama", hidden_act="mish"), {}, "the activation function 'mish'"),
        (config("llama", attention_dropout="much"), {}, "attention_dropout: expected a share"),
        (config("llama", is_causal=False), {}, "not causal"),
        (config("qwen2", layer_types=["linear_attention"] * 2), {}, "layer_types"),
        (config("gemma2"), {"model__attn_implementation": "sdpa"}, "has no sdpa"),
        (config("llama"), {"model__attn_implementation": "flash_attention_2"}, "'flash_attention_2'"),
        (config("llama", attn_implementation="flash_attention_2"), {}, "'flash_attention_2'"),
        (config("mixtral"), {"recipe": "fp32"}, "parameters in bf16, not in fp32"),
        (config("mixtral", num_experts_per_tok=99), {}, "num_experts_per_tok (99) is more than"),
        (config("mixtral", intermediate_size=76), {}, "multiple of 8 elements, not of 76"),
    ],
)  # fmt: skip
def test_what_has_no_tape_says_why(content: dict[str, Any], values: dict[str, str], reason: str) -> None:
    found = peaks(content, **values)

    assert found.peak_allocated_bytes is None
    assert found.allocated_bytes is not None
    assert reason in found.notes[0]
    assert "simulate" in found.notes[0]


@pytest.mark.parametrize("model_type", sorted(TINY))
def test_checkpointing_lowers_forward(model_type: str) -> None:
    layered = {"gpt2": "n_layer", "bloom": "n_layer"}.get(model_type, "num_hidden_layers")
    content = config(model_type, **{layered: 8})

    assert forward(peaks(content, workload__activation_checkpointing=True)) < forward(peaks(content))


def test_a_window_needs_a_mask_only_where_the_sequence_reaches_it() -> None:
    wide, narrow, reached = (forward(peaks(config("mistral", sliding_window=window))) for window in (None, 17, 16))

    assert wide == narrow < reached


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_may_say_which_attention(key: str) -> None:
    """transformers obeys either key, and what the profile says before them."""
    eager, sdpa = (forward(peaks(config("llama"), model__attn_implementation=kind)) for kind in ("eager", "sdpa"))

    assert forward(peaks(config("llama", **{key: "eager"}))) == eager != sdpa
    assert forward(peaks(config("llama", **{key: "eager"}), model__attn_implementation="sdpa")) == sdpa


def test_eager_attention_keeps_the_scores() -> None:
    content = config("llama")
    short, long = (
        [forward(peaks(content, workload__sequence_length=length, model__attn_implementation=kind)) for kind in ("sdpa", "eager")]
        for length in (16, 64)
    )

    assert long[1] - long[0] > 8 * (short[1] - short[0])


def test_dropout_keeps_masks() -> None:
    without, with_ = (forward(peaks(config("gpt2", resid_pdrop=share, embd_pdrop=share))) for share in (0.0, 0.1))

    assert with_ > without


def test_experts_hand_their_gradients_over_together() -> None:
    of = run(config("qwen3_moe"))
    events = record(of, Tape(BF16, zero3=True), layers(of))
    handed = [(event.kind, event.subject) for event in events if event.kind in {"gradient", "release backward"}]

    end = handed.index(("release backward", (1, "mlp")))
    assert {subject for _, subject in handed[end - 3 : end]} == {
        (1, f"mlp.{name}") for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }


def test_what_is_in_a_leaf_comes_again_in_every_container() -> None:
    trace = [(-1, ""), (0, "block"), (0, "mlp"), (1, "block"), (1, "self_attn"), (1, "mlp"), (0, "mlp")]
    numels = {(layer, f"{name}.weight"): 10 for layer in (0, 1) for name in ("self_attn", "mlp")}
    leaves = Leaves({(0, "mlp"), (1, "mlp")}, trace, numels, in_layers("model"))

    assert leaves.is_reused((0, "mlp.weight"), 0, 1)
    assert leaves.is_reused((1, "mlp.weight"), 2, 11)
    assert leaves.is_reused((0, "mlp.weight"), 3, 41)
    assert not leaves.is_reused((0, "mlp.weight"), 3, 40)
