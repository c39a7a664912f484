"""Models of others and what they are called with: images, tokens that a file does not name,
infinite numbers, and who is to blame."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS

from bf16prof.dry_run.hardware.asking import UnequalDtypes
from bf16prof.engine.training import UNEQUAL_DTYPES, called_as_described, mixed_on_cpu
from bf16prof.errors import InputError
from bf16prof.models import foreign
from bf16prof.profiles.assumed import ASSUMED, image_inputs
from bf16prof.profiles.load import Override, Resolved, load_profile
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, ModelSettings

pytestmark = DEEPSPEED_WARNINGS

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
IDS = {"input_ids": torch.zeros(2, 16, dtype=torch.int64)}
MINE = FactorySettings(factory="a.b:c")


def load(tmp_path: Path, content: str | dict[str, Any]) -> Resolved:
    path = tmp_path / "config.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_profile(None, [Override("name", "x", "test"), Override("model.hf_config", str(path), "test")])


def model_of(found: Resolved) -> HuggingFaceSettings:
    assert isinstance(found.profile.model, HuggingFaceSettings)
    return found.profile.model


def test_an_infinite_number_is_what_transformers_reads(tmp_path: Path) -> None:
    text = '{"model_type": "mamba2", "vocab_size": 64, "time_step_limit": [0.0, Infinity], "odd": NaN, "least": -Infinity}'

    settings = model_of(load(tmp_path, text))

    assert json.loads(json.dumps(settings.hf_config, allow_nan=False)) == settings.hf_config, "it can be stored as it is"
    assert settings.hf_config["odd"] is None
    config = foreign._config(settings.hf_config)
    assert tuple(config.time_step_limit) == (0.0, math.inf)
    assert config.least == -math.inf


def test_a_number_that_is_merely_large_stays_one() -> None:
    assert foreign._infinite({"a": [1e30, 7, "x"]}) == {"a": [1e30, 7, "x"]}


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart"])
def test_tokens_that_the_file_does_not_name_are_no_crash(model_type: str) -> None:
    config = foreign._config({"model_type": model_type, "vocab_size": 64})
    assert config.decoder_start_token_id is not None
    assert config.pad_token_id is not None


def test_tokens_that_it_names_stay() -> None:
    config = foreign._config({"model_type": "t5", "vocab_size": 64, "decoder_start_token_id": 7, "pad_token_id": 5})
    assert (config.decoder_start_token_id, config.pad_token_id) == (7, 5)


def test_a_plain_image_model_is_called_with_images_and_that_is_assumed(tmp_path: Path) -> None:
    found = load(tmp_path, {"model_type": "vit", "image_size": 32, "patch_size": 8, "num_labels": 10, **SMALL})

    inputs = model_of(found).inputs
    assert (inputs["pixel_values"].dtype, inputs["pixel_values"].shape) == ("parameters", ("micro_batch", 3, 32, 32))
    assert (inputs["labels"].dtype, inputs["labels"].shape, inputs["labels"].high) == ("int64", ("micro_batch",), 10)
    assert found.origins["model.inputs"].startswith(ASSUMED)
    model = foreign.from_hf_config(model_of(found), None)
    assert type(model).__name__ == "ViTForImageClassification"
    assert model(torch.zeros(1, 3, 32, 32), labels=torch.zeros(1, dtype=torch.int64)).loss.dim() == 0


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_size": [32, 48], "num_channels": 1}, ["micro_batch", 1, 32, 48]),
        ({"image_size": 32, "architectures": ["ViTModel"]}, ["micro_batch", 3, 32, 32]),
        ({"image_size": 32, "vocab_size": 9}, None),
        ({"image_size": 32, "text_config": {}}, None),
        ({"image_size": True and "large"}, None),
        ({"image_size": [0, 3]}, None),
        ({}, None),
    ],
)
def test_only_plain_image_models_are_taken_for_one(config: dict[str, Any], expected: list[object] | None) -> None:
    found = image_inputs({"hf_config": {"model_type": "x", **config}})
    assert (found.value["pixel_values"]["shape"] if found else None) == expected
    assert found is None or ("labels" in found.value) is ("architectures" not in config)


def test_a_model_without_a_vocabulary_is_no_mistake_in_its_file() -> None:
    settings = HuggingFaceSettings(hf_config={"model_type": "resnet"})
    with pytest.raises(InputError) as caught:
        _ = settings.vocab_size
    assert "has no vocab_size" in caught.value.message
    assert "[model.inputs.pixel_values]" in caught.value.hint


def test_what_a_model_does_not_take_is_said_with_what_it_was_called_with() -> None:
    with pytest.raises(InputError) as caught, called_as_described(MINE, IDS, "pixels"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert caught.value.message.startswith("the model failed when it was called with input_ids int64 [2, 16]: RuntimeError: ")
    assert "[model.inputs.pixels] dtype = " in caught.value.hint


def test_tensors_of_different_dtypes_are_the_calls_fault() -> None:
    assert UnequalDtypes.__name__ == UNEQUAL_DTYPES
    with pytest.raises(InputError, match="a matrix product of bfloat16 and int64"), called_as_described(MINE, IDS, "x"):
        raise UnequalDtypes("a matrix product of bfloat16 and int64")


def test_buffers_that_a_cpu_does_not_take_are_named() -> None:
    layer = torch.nn.BatchNorm1d(6)
    assert mixed_on_cpu(layer) == ""
    layer.weight.data, layer.bias.data = layer.weight.data.bfloat16(), layer.bias.data.bfloat16()
    with pytest.raises(InputError) as caught, called_as_described(MINE, IDS, "x", lambda: mixed_on_cpu(layer)):
        layer(torch.zeros(4, 6, dtype=torch.bfloat16))
    assert "buffers in float32 beside parameters in bfloat16" in caught.value.hint


def test_a_model_that_looks_at_values_is_told_to_be_measured() -> None:
    class DataDependentOutputException(RuntimeError):
        pass

    with pytest.raises(InputError, match="depends on values of tensors") as caught, called_as_described(MINE, IDS, "x"):
        json.loads("1", parse_int=lambda _: (_ for _ in ()).throw(DataDependentOutputException("aten.nonzero")))
    assert "measure" in caught.value.hint


@pytest.mark.parametrize("error", [InputError("ours"), MemoryError()])
def test_other_errors_pass(error: Exception) -> None:
    with pytest.raises(type(error)), called_as_described(MINE, IDS, "x"):
        raise error


def test_a_fault_in_a_model_of_ours_is_ours() -> None:
    family = ModelSettings(family="gpt2", hidden_size=8, num_layers=1, num_heads=2, vocab_size=9, max_sequence_length=8)
    with pytest.raises(RuntimeError), called_as_described(family, IDS, "x"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
