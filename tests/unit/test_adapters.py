"""Adapters as people write them: what `--lora`, `[peft]` and PEFT's own file mean, and what PEFT
makes of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, write_profile

from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.errors import InputError
from bf16prof.profiles.adapters import AdapterSettings, read_lora
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.schema import Profile

__all__ = ["main"]

LLAMA = config("llama")


def profile(**peft: Any) -> Profile:
    overrides = [Override("model.hf_config", LLAMA, "test"), Override("workload.sequence_length", 8, "test")]
    return load_profile(None, [*overrides, *([Override("peft", peft, "test")] if peft else [])]).profile


@pytest.mark.parametrize(("text", "table"), [
    ("r=16", {"r": 16}),
    ("r=16,alpha=32.5,targets=q_proj+v_proj", {"r": 16, "lora_alpha": 32.5, "target_modules": ["q_proj", "v_proj"]}),
    ("rank=4, targets=all-linear, dora", {"r": 4, "target_modules": "all-linear", "use_dora": True}),
    ("r=4,rslora,dropout=0.1,bias=all,lora_bias=true", {"r": 4, "use_rslora": True, "lora_dropout": 0.1, "bias": "all", "lora_bias": True}),
    ("r=4,layers_to_transform=0+2", {"r": 4, "layers_to_transform": [0, 2]}),
])  # fmt: skip
def test_a_flag_is_a_table(text: str, table: dict[str, Any]) -> None:
    assert read_lora(text, "--lora") == table
    AdapterSettings.model_validate(table)


@pytest.mark.parametrize("text", ["", ",", "16", "r=16,q_proj"])
def test_a_flag_that_says_nothing_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        read_lora(text, "--lora")
    assert "q_proj+v_proj" in caught.value.hint


@pytest.mark.parametrize(("said", "expected"), [
    ("r=0", "peft.r: input should be greater than 0"),
    ("r=many", "peft.r: input should be a valid integer"),
    ("ranks=4", "peft.ranks: unknown key"),
    ("r=4,init_lora_weights=eva", "peft: expected LoRA, rsLoRA or DoRA"),
    ("r=4,peft_type=IA3", "peft.peft_type: input should be 'LORA'"),
])  # fmt: skip
def test_a_value_that_no_adapter_can_have_is_named(said: str, expected: str, main: Main, tmp_path: Path) -> None:
    assert expected in refused(main("estimate", write_profile(tmp_path / "p.toml"), "--lora", said))


def test_a_file_of_pefts_is_read_as_it_is(tmp_path: Path) -> None:
    import peft

    written = peft.LoraConfig(
        r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM", base_model_name_or_path="somebody/model"
    )
    written.inference_mode = True
    written.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    by_flag = AdapterSettings.model_validate(read_lora(str(tmp_path), "--lora"))
    toml = write_profile(tmp_path / "p.toml")
    toml.write_text('peft = "adapter_config.json"\n' + toml.read_text(encoding="utf-8"), encoding="utf-8")
    found = load_profile(str(toml))

    assert (by_flag.r, by_flag.target_modules, by_flag.use_dora, by_flag.task_type) == (4, ("q_proj",), True, "CAUSAL_LM")
    assert found.profile.peft == by_flag
    assert found.origins["peft.r"] == str(file)
    assert "somebody" not in json.dumps(found.profile.model_dump(mode="json"))


def test_every_key_is_one_of_pefts_and_means_the_same_by_default() -> None:
    import peft

    theirs = {each.name: each for each in dataclasses.fields(peft.LoraConfig)}
    ours = AdapterSettings().for_peft()

    assert set(AdapterSettings.model_fields) - {"autocast_adapter_dtype", "enable_input_require_grads"} <= set(theirs)
    usual = peft.LoraConfig()
    assert {key: getattr(usual, key) for key in ours} == ours


def test_a_profile_without_an_adapter_is_the_case_that_it_always_was() -> None:
    plain, adapted = profile(), profile(r=4)

    assert workload_digest(plain) != workload_digest(adapted)
    assert workload_digest(plain) == workload_digest(plain.model_copy(update={"peft": None}))


@pytest.mark.parametrize(("stage", "recipe", "peft", "is_known"), [
    (3, "bf16-fp32-master", {}, False),
    (3, "bf16-fp32-master", {"autocast_adapter_dtype": False}, True),
    (3, "fp32", {}, True),
    (2, "bf16-fp32-master", {}, True),
])  # fmt: skip
def test_where_an_adapter_stays_in_fp32_beside_bf16_the_dry_run_is_asked(
    stage: int, recipe: str, peft: dict[str, Any], is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bf16prof.closed_form.gap.anatomy_of", lambda job: None)

    gap = closed_form_gap(job(profile(r=4, **peft), stage, recipe=recipe))

    assert (gap is None) == is_known
    assert gap is None or "stay fp32 beside bf16" in gap
