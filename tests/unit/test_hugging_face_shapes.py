"""The closed form's list of parameters and buffers against what transformers builds from the same
configuration, on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS
from hugging_face import TINY, config, drawn
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from bf16prof.errors import InputError
from bf16prof.models.modules import build
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.models.shapes.huggingface import model_types, skeleton
from bf16prof.profiles.models import HuggingFaceSettings

pytestmark = DEEPSPEED_WARNINGS


def built(content: Mapping[str, Any]) -> nn.Module:
    """Transformers' own model, without values."""
    with torch.device("meta"):
        return build(HuggingFaceSettings(hf_config=dict(content)), activation_checkpointing=False)


def assert_same(content: Mapping[str, Any], module: nn.Module) -> None:
    """Names, shapes, holders and order of the parameters; names and sizes of the buffers."""
    found = skeleton(content)
    theirs = [(name, tuple(p.shape), type(module.get_submodule(name.rpartition(".")[0])).__name__) for name, p in module.named_parameters()]

    assert [(p.name, p.shape, p.layer) for p in found.parameters] == theirs
    assert {b.name: b.numel for b in found.buffers if b.is_registered} == {name: b.numel() for name, b in module.named_buffers()}
    assert all(b.dtype is torch.float32 for b in module.buffers())


def test_every_model_type_has_a_tiny_configuration() -> None:
    assert set(TINY) == set(model_types())


@pytest.mark.parametrize("model_type", TINY)
def test_a_model_without_keys_is_what_transformers_takes_for_granted(model_type: str) -> None:
    content = {"model_type": model_type}
    module = built(content)

    assert_same(content, module)
    assert type(module).__name__ == model_types()[model_type].architecture


@pytest.mark.parametrize("model_type", TINY)
def test_a_tiny_model_is_transformers_own(model_type: str) -> None:
    assert_same(config(model_type), built(config(model_type)))


@pytest.mark.parametrize("model_type", TINY)
@given(st.data())
@settings(deadline=None, max_examples=12, suppress_health_check=list(HealthCheck))
def test_a_drawn_model_is_transformers_own(model_type: str, data: st.DataObject) -> None:
    content = data.draw(drawn(model_type))
    try:
        module = built(content)
    except InputError:
        assume(False)

    try:
        assert_same(content, module)
    except NoInventory as error:  # the one thing drawn here that has no closed form, and says so
        assume("odd number of dimensions" not in error.message)
        raise


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
}  # fmt: skip


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")


def sizes(*values: int, **more: Any) -> dict[str, Any]:
    return {**dict(zip(SIZES, values, strict=True)), **more}


PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Llama-3.1-8B": ("llama", sizes(4096, 14_336, 32, 32, 8, 128_256, rope_scaling=LLAMA3), 8_030_261_248),
    "Llama-3.2-1B": ("llama", sizes(2048, 8192, 16, 32, 8, 128_256, head_dim=64, tie_word_embeddings=True), 1_235_814_400),
    "Mistral-7B": ("mistral", {}, 7_241_732_096),
    "Qwen2.5-7B": ("qwen2", sizes(3584, 18_944, 28, 28, 4, 152_064), 7_615_616_512),
    "Qwen3-8B": ("qwen3", sizes(4096, 12_288, 36, 32, 8, 151_936, head_dim=128), 8_190_735_360),
    "gemma-2b": ("gemma", sizes(2048, 16_384, 18, 8, 1, 256_000, head_dim=256), 2_506_172_416),
    "gemma-2-2b": ("gemma2", {}, 2_614_341_888),
    "gemma-3-1b": ("gemma3_text", sizes(1152, 6912, 26, 4, 1, 262_144, head_dim=256, sliding_window_pattern=6), 999_885_952),
    "phi-2": ("phi", sizes(2560, 10_240, 32, 32, 32, 51_200, partial_rotary_factor=0.4), 2_779_683_840),
    "Phi-3-mini-4k": ("phi3", {}, 3_821_079_552),
    "gpt2": ("gpt2", {}, 124_439_808),
    "pythia-160m": ("gpt_neox", sizes(768, 3072, 12, 12, 12, 50_304, rotary_pct=0.25), 162_322_944),
    "opt-125m": ("opt", {"word_embed_proj_dim": 768}, 125_239_296),
    "opt-350m": ("opt", {
        "hidden_size": 1024, "ffn_dim": 4096, "num_hidden_layers": 24, "num_attention_heads": 16, "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    }, 331_196_416),
    "bloom-560m": ("bloom", {"hidden_size": 1024, "n_layer": 24, "n_head": 16, "n_inner": None}, 559_214_592),
    "falcon-7b": ("falcon", {}, 6_921_720_704),
    "falcon-40b": ("falcon", {
        "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True,
    }, 41_303_293_952),
    "Mixtral-8x7B": ("mixtral", {"num_local_experts": 8}, 46_702_792_704),
    "Qwen1.5-MoE-A2.7B": ("qwen2_moe", {}, 14_315_784_192),
    "Qwen3-30B-A3B": ("qwen3_moe", sizes(2048, 6144, 48, 32, 4, 151_936, head_dim=128, moe_intermediate_size=768), 30_532_122_624),
}  # fmt: skip
"""Published models: what their configurations say beside transformers' defaults, and how many
parameters they have."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_its_parameters(name: str) -> None:
    model_type, keys, parameters = PUBLISHED[name]
    content = {"model_type": model_type, **keys}

    assert sum(p.numel for p in skeleton(content).parameters) == parameters
    assert_same(content, built(content))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TINY)
def test_autocast_casts_the_parameters_that_deepspeed_casts(model_type: str, tied: bool) -> None:
    from deepspeed.runtime.torch_autocast import LOWER_PRECISION_SAFE_MODULES

    content = config(model_type, tie_word_embeddings=tied)
    module = built(content)
    holders = [m for m in module.modules() if type(m) in LOWER_PRECISION_SAFE_MODULES]
    cast = {id(parameter) for holder in holders for parameter in holder.parameters(recurse=False)}

    assert {p.name for p in skeleton(content).parameters if p.cast_by_autocast} == {
        n for n, p in module.named_parameters() if id(p) in cast
    }


NOT_KNOWN: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "bert"}, "only transformers itself knows the parameters of the model of model_type 'bert'"),
    ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "the parameters of BertForMaskedLM; a checkpoint lists them too"),
    (config("llama", architectures=["LlamaForSequenceClassification"]), "the parameters of LlamaForSequenceClassification"),
    (config("llama", architectures=["x" * 500]), "xxx; a checkpoint"),
    (config("llama", architectures=[3]), "the model of model_type 'llama'"),
    (config("llama", hidden_size="wide"), "model.hf_config.hidden_size: expected a whole number above 0, got '.a text, taken out"),
    (config("llama", hidden_size=True), "hidden_size: expected a whole number above 0, got True"),
    (config("llama", num_hidden_layers=10**9), "num_hidden_layers: expected a whole number"),
    (config("llama", hidden_size=50), r"hidden_size \(50\) is not a multiple of num_attention_heads \(4\)"),
    (config("llama", attention_bias="no"), "attention_bias: expected true or false, got 'no'"),
    (config("llama", rope_scaling=[3]), r"rope_scaling: expected a table, got \[3\]"),
    (config("llama", rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "rope_type: 'dynamic' is not modelled"),
    (
        config("llama", num_attention_heads=4, num_key_value_heads=3),
        r"num_attention_heads \(4\) is not a multiple of num_key_value_heads \(3\)",
    ),
    (config("llama", rope_scaling={"rope_type": ["x"]}), "rope_type: .* is not modelled"),
    (config("llama", rope_parameters={"full_attention": {"rope_type": "default"}}), "one table per type of layer"),
    (config("phi", partial_rotary_factor=0.25, rope_scaling={"rope_type": "yarn"}), r"yarn over an odd number of dimensions \(3\)"),
    (config("phi", partial_rotary_factor="half"), "partial_rotary_factor: expected a share, got '.a text, taken out"),
    (config("gemma3_text", layer_types=["other"] * 7), "layer_types: 'other'"),
    (config("qwen3_moe", mlp_only_layers=3), "mlp_only_layers: expected a list, got 3"),
    (config("mixtral", output_router_logits=True), "model.hf_config.output_router_logits is not modelled"),
    (config("gpt2", add_cross_attention=True), "model.hf_config.add_cross_attention is not modelled"),
    (config("llama", return_dict=False), "model.hf_config.return_dict is not modelled"),
]


@pytest.mark.parametrize(("content", "expected"), NOT_KNOWN, ids=range(len(NOT_KNOWN)))
def test_what_is_not_known_says_so_in_one_line(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(NoInventory, match=expected) as caught:
        inventory(HuggingFaceSettings(hf_config=content))

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


def test_a_type_of_layer_that_is_not_there_has_no_buffers() -> None:
    content = config("gemma3_text", layer_types=["full_attention"] * 7)

    assert_same(content, built(content))


def test_building_a_model_leaves_its_configuration_as_it_was() -> None:
    content = config("llama", rope_scaling={"type": "linear", "factor": 2.0})

    built(content)

    assert content["rope_scaling"] == {"type": "linear", "factor": 2.0}
