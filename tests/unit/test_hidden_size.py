"""The hidden size that DeepSpeed's "auto" is resolved from, against what the configuration classes
of transformers answer."""

from __future__ import annotations

from typing import Any

import pytest
from jobs import model_settings

from bf16prof.profiles.hidden_size import HiddenSize, hidden_size, of_config
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings

pytestmark = pytest.mark.filterwarnings("ignore")


def theirs(config: Any) -> Any:
    """The rule of transformers' trainer_config_finalize, asked of a configuration object."""
    parts: list[Any] = [config, getattr(config, "text_config", None)]
    for part in parts:
        if hasattr(part, "hidden_size"):
            return part.hidden_size
        if hasattr(part, "hidden_sizes"):
            return max(part.hidden_sizes)
    return None


ODD = ("higgs_audio_v2_tokenizer", "xcodec", "gemma4_unified_audio", "nemotron3_5_transcribe_audio")
"""Audio codecs whose hidden size is computed from others of their values."""


def test_every_model_type_of_transformers_is_answered_as_its_class_does() -> None:
    from transformers import CONFIG_MAPPING

    asked = 0
    for type_ in CONFIG_MAPPING:
        try:
            config = CONFIG_MAPPING[type_]()
        except Exception:  # noqa: BLE001 - the few classes that have no default
            continue
        expected = theirs(config)
        if type_ in ODD or not isinstance(expected, int):
            continue
        for said in (config.to_dict(), {"model_type": type_}):
            found = of_config(said)
            assert found is not None, type_
            assert found.value == expected, type_
        asked += 1
    assert asked > 300


SAID: list[tuple[dict[str, Any], HiddenSize]] = [
    ({"model_type": "llama", "hidden_size": 2048}, HiddenSize(2048, "hidden_size")),
    ({"model_type": "gpt2", "n_embd": 96}, HiddenSize(96, "n_embd")),
    ({"model_type": "gpt2", "hidden_size": 64}, HiddenSize(64, "hidden_size")),
    ({"model_type": "t5", "d_model": 1024}, HiddenSize(1024, "d_model")),
    ({"model_type": "gemma3", "text_config": {"hidden_size": 2560}}, HiddenSize(2560, "text_config.hidden_size")),
    ({"model_type": "swin", "hidden_sizes": [96, 768, 384]}, HiddenSize(768, "max(hidden_sizes)")),
    ({"model_type": "llava", "text_config": {"model_type": "mistral", "vocab_size": 5}},
     HiddenSize(4096, "text_config.hidden_size, the default of mistral")),
    ({"model_type": "somebody's own", "hidden_size": 17}, HiddenSize(17, "hidden_size")),
]  # fmt: skip


@pytest.mark.parametrize(("config", "expected"), SAID, ids=range(len(SAID)))
def test_where_it_is_said(config: dict[str, Any], expected: HiddenSize) -> None:
    assert of_config(config) == expected


@pytest.mark.parametrize("config", [
    {"model_type": "somebody's own"}, {"model_type": "somebody's own", "hidden_size": "4096"},
    {"model_type": "somebody's own", "hidden_size": True}, {"model_type": "x", "hidden_sizes": []}, {"model_type": "x", "text_config": 5},
])  # fmt: skip
def test_where_it_is_not_known(config: dict[str, Any]) -> None:
    assert of_config(config) is None


def test_of_every_kind_of_model() -> None:
    assert hidden_size(model_settings()) == HiddenSize(12, "model.hidden_size")
    assert hidden_size(HuggingFaceSettings(hf_config={"model_type": "llama", "hidden_size": 64})) == HiddenSize(64, "hidden_size")
    assert hidden_size(FactorySettings(factory="a.b:c")) is None
