"""Sizes of a Hugging Face configuration that cannot be: refused where it is read, by the key; two
that clash, where running it failed."""

from __future__ import annotations

from typing import Any

import jobs
import pytest

from bf16prof.closed_form.anatomy import anatomy_of
from bf16prof.errors import InputError
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.sizes import clash
from bf16prof.signatures import store
from bf16prof.signatures.inquiry import Inquiry

SOUND = {"model_type": "olmo2", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}


def read(config: dict[str, Any]) -> None:
    load_profile("cpu-demo", [Override("model.hf_config", config, "config.json")])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 0}, "config.json: model.hf_config.num_attention_heads: expected a whole number above 0, got 0"),
        ({"head_dim": 0}, "head_dim: expected a whole number above 0, got 0"),
        ({"vocab_size": -5}, "vocab_size: expected a whole number above 0, got -5"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers: expected a whole number above 0, got 2.5"),
        ({"hidden_size": True}, "hidden_size: expected a whole number above 0, got True"),
        ({"text_config": {"hidden_size": 0}}, "model.hf_config.text_config.hidden_size: expected a whole number above 0, got 0"),
    ],
)
def test_what_is_no_size_is_refused_where_it_is_read(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        read({**SOUND, **changes})

    assert said in caught.value.message


@pytest.mark.parametrize("changes", [{}, {"head_dim": None}, {"head_dim": 0, "qk_rope_head_dim": 64}, {"intermediate_size": [64, 64]}])
def test_what_another_value_decides_is_no_fault(changes: dict[str, Any]) -> None:
    read({**SOUND, **changes})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 66}, "model.hf_config.hidden_size (66) is not a multiple of num_attention_heads (4)"),
        ({"num_key_value_heads": 3}, "model.hf_config.num_attention_heads (4) is not a multiple of num_key_value_heads (3)"),
        ({"head_dim": 15}, "model.hf_config.head_dim (15) is odd"),
        ({"pad_token_id": 100}, "model.hf_config.pad_token_id (100) is not below vocab_size (100)"),
        ({"num_experts": 2, "num_experts_per_tok": 3}, "model.hf_config.num_experts_per_tok (3) is more than num_experts (2)"),
        ({"text_config": {"d_model": 9, "n_heads": 2}}, "model.hf_config.text_config.d_model (9) is not a multiple of n_heads (2)"),
    ],
)
def test_two_sizes_clash(changes: dict[str, Any], said: str) -> None:
    assert (clash({**SOUND, **changes}) or "").startswith(said)


@pytest.mark.parametrize("changes", [{}, {"hidden_size": 66, "head_dim": 16}])
def test_sizes_that_do_not_clash(changes: dict[str, Any]) -> None:
    assert clash({**SOUND, **changes}) is None


def test_a_clash_is_told_where_the_model_could_not_be_run() -> None:
    asked = jobs.job(jobs.profile(model__hf_config={**SOUND, "hidden_size": 66}))
    store.give_up(Inquiry.of(asked), "shape '[2, 4]' is invalid")
    try:
        with pytest.raises(InputError, match=r"hidden_size \(66\) is not a multiple of num_attention_heads \(4\): shape .* is invalid"):
            anatomy_of(asked)
    finally:
        store.forget()
