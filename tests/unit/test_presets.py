"""The presets of the models that people train: the model and nothing else, with the published
number of parameters."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS

from bf16prof.cases import check_profile
from bf16prof.errors import InputError
from bf16prof.models.modules import build
from bf16prof.models.shapes import NoInventory, inventory
from bf16prof.profiles import load as loading
from bf16prof.profiles.assumed import ASSUMED
from bf16prof.profiles.load import load_profile, preset_names
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.shipped import preset_files, preset_ids, shipped_text

pytestmark = DEEPSPEED_WARNINGS

PUBLISHED = {
    "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360,
    "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264, "qwen3-30b-a3b": 30_532_122_624,
    "mistral-7b": 7_248_023_552, "mixtral-8x7b": 46_702_792_704,
    "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320,
    "gemma3-1b": 999_885_952, "gemma3-4b": 4_300_079_472, "gemma3-12b": 12_187_325_040, "gemma3-27b": 27_432_406_640,
    "phi-4": 14_659_507_200, "deepseek-v2-lite": 15_706_484_224,
    "olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344, "olmo2-13b": 13_716_198_400, "olmo2-32b": 32_234_279_936,
    "gpt-oss-20b": 20_914_757_184, "smollm3-3b": 3_075_098_624,
}  # fmt: skip
"""`safetensors.total` that the Hugging Face Hub's API gives for the checkpoints (of Qwen3 0.6B and
1.7B less the tied head, which those files hold twice; of GPT-OSS the count of its model card, since
its files pack experts in four bits)."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_transformers_builds_as_many_parameters_as_were_published(name: str) -> None:
    profile = load_profile(name).profile
    with torch.device("meta"):
        module = build(profile.model, activation_checkpointing=False)

    assert sum(parameter.numel() for parameter in module.parameters()) == PUBLISHED[name]
    assert f"{PUBLISHED[name]:,} parameters" in profile.description


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_describes_the_model_only(name: str) -> None:
    found = load_profile(name)
    table = json.loads(shipped_text(preset_files()[name]))

    check_profile(found.profile)
    assert set(table) == {"description", "names", "model"}
    assert isinstance(found.profile.model, HuggingFaceSettings)
    for key, origin in found.origins.items():
        if key not in ("name", "description", "names") and not key.startswith("model."):
            assert origin.startswith(ASSUMED), key


def test_a_preset_without_closed_form_says_so_in_one_line() -> None:
    without = []
    for name, count in PUBLISHED.items():
        try:
            assert sum(spec.numel for spec in inventory(load_profile(name).profile.model)) == count
        except NoInventory as error:
            assert "\n" not in error.message
            without.append(name)
    assert {name.split("-")[0] for name in without} <= {"gemma3", "deepseek", "olmo2", "gpt", "smollm3"}


def test_ids_are_read_as_the_files_say_and_belong_to_one_preset() -> None:
    ids = preset_ids()

    for name, each in ids.items():
        assert each == (name, *load_profile(name).profile.names)
    listed = [model_id.casefold() for each in ids.values() for model_id in each[1:]]
    assert len(listed) == len(set(listed)) > 60
    assert all(model_id.count("/") == 1 for model_id in listed)


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        ("Llama-3.1-8B", "llama3.1-8b"), ("LLAMA_3.1_8b", "llama3.1-8b"), ("llama31-8b", "llama3.1-8b"), ("qwen 2.5 7b", "qwen2.5-7b"),
        ("Mistral7B", "mistral-7b"), ("gemma-2-9b", "gemma2-9b"), ("phi4", "phi-4"), ("OLMo-2-13B", "olmo2-13b"),
        ("GPT OSS 20b", "gpt-oss-20b"),
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b"), ("meta-llama/Llama-3.1-8B", "llama3.1-8b"), ("qwen/qwen3-30b-a3b", "qwen3-30b-a3b"),
        ("google/gemma-3-4b-it", "gemma3-4b"),
        ("openai-community/gpt2-xl", None), ("qwen2.5-77b", None), ("gemma-29b", None), ("llama3.18-b", None),
    ],
)  # fmt: skip
def test_presets_are_found_by_the_names_people_type(typed: str, name: str | None) -> None:
    if name is None:
        with pytest.raises(InputError, match="unknown profile"):
            load_profile(typed)
    else:
        assert load_profile(typed).profile.name == name


def test_one_file_is_parsed_per_use(monkeypatch: pytest.MonkeyPatch) -> None:
    parsed: list[str] = []
    parse = loading._parsed

    def watched(source: Any) -> dict[str, Any]:
        parsed.append(source.label)
        return parse(source)

    monkeypatch.setattr(loading, "_parsed", watched)

    preset_names()
    preset_ids()
    assert parsed == []
    load_profile("Qwen/Qwen2.5-7B")
    assert parsed == ["qwen2.5-7b"]
