"""A 4-bit base under an adapter: what bitsandbytes keeps of a weight, by the rule that the page
states; how it is said, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from command_line import Main, main, refused
from hugging_face import config
from jobs import job, profile

from bf16prof.engine.attribution import _of_quantization
from bf16prof.models.modules import build_trained
from bf16prof.profiles.adapters import QuantizationSettings
from bf16prof.profiles.identity import workload_digest
from bf16prof.profiles.schema import Profile
from bf16prof.profiles.training_args import read_training_args
from bf16prof.rounding import ceil_div

__all__ = ["main"]

TABLE, NUMBERS, SCALAR = 4 * 256, 4 * 16, 4


def adapted(**quantization: object) -> Profile:
    return profile(
        model__hf_config=config("llama"), peft={"r": 4, "target_modules": "all-linear"}, quantization=quantization,
    )  # fmt: skip


@pytest.mark.parametrize("double", [True, False])
def test_a_weight_takes_half_a_byte_an_element_and_its_scales(double: bool) -> None:
    model = build_trained(adapted(bnb_4bit_use_double_quant=double).model_copy(update={"peft": None}), torch.bfloat16)
    packed = {name: each for name, each in model.named_parameters() if hasattr(each, "quant_state")}

    assert len(packed) == 2 * 7, "the linear layers of both blocks; the head and the embedding stay as they are"
    for name, parameter in packed.items():
        elements, blocks = parameter.quant_state.shape.numel(), ceil_div(parameter.quant_state.shape.numel(), 64)
        scales = blocks + 4 * ceil_div(blocks, 256) + SCALAR + TABLE if double else 4 * blocks
        held = [each for each in _of_quantization(parameter.quant_state) if each is not None]
        assert parameter.nbytes == elements // 2, name
        assert sum(each.untyped_storage().nbytes() for each in held) == scales + NUMBERS, name
        assert not parameter.requires_grad


def test_no_quantized_model_is_built_inside_zero_init() -> None:
    inside = profile(model__hf_config=config("llama"), workload__sequence_length=32, workload__zero_init=True, peft={"r": 4})

    assert job(inside, 3).is_inside_zero_init
    assert not job(inside.model_copy(update={"quantization": QuantizationSettings()}), 3).is_inside_zero_init


def test_it_is_a_case_of_its_own() -> None:
    assert workload_digest(adapted()) != workload_digest(adapted(bnb_4bit_quant_type="fp4"))
    assert workload_digest(adapted()) != workload_digest(adapted().model_copy(update={"quantization": None}))


def test_what_cannot_be_is_one_line(main: Main, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config("llama")), encoding="utf-8")
    lora = ("--lora", "r=4,targets=all-linear")

    assert "are not trained: say an adapter" in refused(main("simulate", file, "--load-in-4bit"))
    assert "models of its own" in refused(main("simulate", "cpu-demo", "--load-in-4bit", *lora))
    assert "(--load-in-4bit) is left to the dry run" in refused(main("estimate", file, "--load-in-4bit", *lora, "--gpus", "2"))
    assert "expected" in refused(main("simulate", file, *lora, "--set", "quantization.bits=4"))


def test_training_arguments_of_qlora_mean_it(tmp_path: Path) -> None:
    file = tmp_path / "args.yaml"

    def read(text: str) -> dict[str, object]:
        file.write_text(f"finetuning_type: lora\nlora_rank: 8\nlora_target: all\n{text}", encoding="utf-8")
        return {name: told.value for name, told in read_training_args(file).quantization.items()}

    assert read("quantization_bit: 4\n") == {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    assert read("load_in_4bit: true\nbnb_4bit_quant_type: fp4\nbnb_4bit_use_double_quant: false\n") == {
        "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False,
    }  # fmt: skip
    assert read("quantization_bit: 8\n") == read("load_in_4bit: false\n") == {}
