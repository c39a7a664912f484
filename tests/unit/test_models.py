"""The parameter inventory, computed without torch, against real modules: ours and Hugging Face's,
on the meta device."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import model_settings, profile

from bf16prof.models.modules import build
from bf16prof.models.shapes import CAST_BY_AUTOCAST, families, inventory
from bf16prof.profiles.models import Model, ModelSettings


def module_inventory(model: Model) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and holder's class of every parameter of the torch module, each shared one once,
    in torch's own order."""
    with torch.device("meta"):
        module = build(model, activation_checkpointing=False)
    return [
        (name, tuple(parameter.shape), type(module.get_submodule(name.rpartition(".")[0])).__name__)
        for name, parameter in module.named_parameters()
    ]


def our_inventory(model: Model) -> list[tuple[str, tuple[int, ...], str]]:
    return [(p.name, p.shape, p.layer) for p in inventory(model)]


def test_the_families_are_known() -> None:
    assert families() == ["gpt2", "llama", "transformer-postln"]


@st.composite
def models(draw: st.DrawFn) -> ModelSettings:
    """A small model of any family whose sizes fit together."""
    family = draw(st.sampled_from(["gpt2", "llama", "transformer-postln"]))
    llama = family == "llama"
    kv_heads = draw(st.integers(1, 5))
    heads = kv_heads * (draw(st.integers(1, 4)) if llama else 1)
    return model_settings(
        family=family,
        hidden_size=heads * draw(st.integers(1, 9)) * (2 if llama else 1),
        num_heads=heads,
        num_kv_heads=kv_heads,
        num_layers=draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 300)),
        max_sequence_length=draw(st.integers(1, 70)),
        intermediate_size=draw(st.none() | st.integers(1, 99)),
        tie_embeddings=draw(st.sampled_from([None, False] if family == "transformer-postln" else [None, False, True])),
    )


@given(models())
@settings(deadline=None, max_examples=60)
def test_the_inventory_is_the_modules_own(model: ModelSettings) -> None:
    assert our_inventory(model) == module_inventory(model)


@pytest.mark.parametrize("name", ["deepspeed-bf16-example", "gpt2-xl", "llama3-8b", "llama3-70b", "cpu-demo", "gpu-check"])
def test_the_inventory_of_a_preset_is_its_modules_own(name: str) -> None:
    model = profile(name).model

    assert our_inventory(model) == module_inventory(model)


def hugging_face(config: Any) -> Counter[int]:
    """How many parameters of each size Hugging Face's own model has, shared ones once."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return Counter(p.numel() for p in model.parameters())


def our_sizes(model: Model) -> Counter[int]:
    return Counter(p.numel for p in inventory(model))


def test_gpt2_xl_has_hugging_faces_parameters() -> None:
    from transformers import GPT2Config

    assert our_sizes(profile("gpt2-xl").model) == hugging_face(GPT2Config(n_embd=1600, n_layer=48, n_head=25))


def test_the_small_gpt2_has_hugging_faces_parameters() -> None:
    from transformers import GPT2Config

    assert our_sizes(profile("gpu-check").model) == hugging_face(GPT2Config())


@pytest.mark.parametrize(
    ("name", "hidden", "intermediate", "layers", "heads"), [("llama3-8b", 4096, 14336, 32, 32), ("llama3-70b", 8192, 28672, 80, 64)]
)
def test_llama3_has_hugging_faces_parameters(name: str, hidden: int, intermediate: int, layers: int, heads: int) -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        vocab_size=128256,
    )  # fmt: skip

    assert our_sizes(profile(name).model) == hugging_face(config)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_small_llamas_have_hugging_faces_parameters(tie: bool, kv_heads: int) -> None:
    from transformers import LlamaConfig

    model = model_settings(family="llama", hidden_size=84, num_heads=6, num_kv_heads=kv_heads, intermediate_size=101, tie_embeddings=tie)
    config = LlamaConfig(
        hidden_size=84, intermediate_size=101, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=kv_heads, vocab_size=31,
        tie_word_embeddings=tie,
    )  # fmt: skip

    assert our_sizes(model) == hugging_face(config)


@pytest.mark.parametrize("tie", [None, True, False])
def test_small_gpt2s_have_hugging_faces_parameters(tie: bool | None) -> None:
    from transformers import GPT2Config

    model = model_settings(family="gpt2", intermediate_size=29, tie_embeddings=tie)
    config = GPT2Config(n_embd=12, n_layer=3, n_head=3, vocab_size=31, n_positions=9, n_inner=29, tie_word_embeddings=tie is not False)

    assert our_sizes(model) == hugging_face(config)


def test_the_published_block_is_a_transformer_encoder_layer() -> None:
    """The example's model wraps nn.TransformerEncoderLayer-like blocks; PyTorch's own layer has the
    same twelve parameters."""
    with torch.device("meta"):
        layer = torch.nn.TransformerEncoderLayer(12, 3, 48)

    ours = [p.numel for p in inventory(model_settings()) if p.name.startswith("layers.0.")]
    assert Counter(ours) == Counter(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama", "transformer-postln"])
def test_autocast_casts_the_parameters_that_deepspeed_casts(family: str) -> None:
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

    model = model_settings(family=family, hidden_size=12)
    with torch.device("meta"):
        module = build(model, activation_checkpointing=False)
    safe = tuple(LOWER_PRECISION_SAFE_MODULES)

    names = {parameter: name for name, parameter in module.named_parameters()}
    cast = {names[parameter] for m in module.modules() if type(m) in safe for parameter in m.parameters(recurse=False)}

    assert {p.name for p in inventory(model) if p.cast_by_autocast} == cast
    assert {cls.__name__ for cls in safe} == CAST_BY_AUTOCAST


@pytest.mark.parametrize("family", ["gpt2", "llama", "transformer-postln"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_models_train(family: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = model_settings(family=family, num_layers=1, hidden_size=12)
    module = build(model, activation_checkpointing=checkpointing)
    tokens = torch.randint(model.vocab_size, (2, 5))

    logits = module(tokens)
    logits.sum().backward()

    assert logits.shape == (2, 5, model.vocab_size)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_causal_models_do_not_look_ahead(family: str) -> None:
    torch.manual_seed(0)
    module = build(model_settings(family=family, hidden_size=12), activation_checkpointing=False)
    tokens = torch.randint(31, (1, 5))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 31

    with torch.no_grad():
        before, after = module(tokens), module(changed)

    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.equal(before[:, -1], after[:, -1])
