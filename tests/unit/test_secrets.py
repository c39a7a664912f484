"""Secrets in people's configurations and variables reach no run, no record and no report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Main, main
from logs import LOSSES

from bf16prof.measure.machine import ALLOWED_ENVIRONMENT, environment
from bf16prof.profiles.secrets import TAKEN_OUT, command_without_secrets, without_secrets

__all__ = ["main"]

MARK = "s3cr3t-canary"
CONFIG = json.loads((Path(__file__).parents[1] / "data" / "hf-gpt2.json").read_text())
SECRETS = {
    "hub_token": MARK, "use_auth_token": MARK, "api_key": MARK, "WANDB_API_KEY": MARK, "slack_webhook": MARK, "webhook_url": MARK,
    "aws_secret_access_key": MARK, "password": MARK, "accessToken": MARK, "push_to": f"https://user:{MARK}@host/path",
    "report_to": f"hf_{MARK}abcdefgh", "nested": {"auth": {"token": MARK}, "tokens": [MARK, MARK]}, "credentials": [MARK],
}  # fmt: skip
HARMLESS = {
    "pad_token_id": 3, "bos_token_id": [1, 2], "num_key_value_heads": 4, "use_auth_token": True, "architectures": ["GPT2LMHeadModel"],
    "activation_function": "gelu_new", "hybrid_override_pattern": "M-M-M*-M-", "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    "layer_types": ["full_attention"], "tokenizer_class": "GPT2Tokenizer", "attention_type": "block_sparse", "keys_to_ignore": ["x"],
    "transformers_version": "5.0.0", "_name_or_path": "org/model-7b",
}  # fmt: skip


def test_secrets_are_taken_out_and_nothing_else() -> None:
    assert MARK not in json.dumps(without_secrets(SECRETS))
    assert without_secrets(HARMLESS) == HARMLESS


def test_a_command_line_keeps_no_secret() -> None:
    typed = ["bf16prof", "--set", f'deepspeed.more.monitor.api_key="{MARK}"', f"https://me:{MARK}@host", "--seq=3", "--set", "a.b=[1, 2]"]

    assert command_without_secrets(typed) == (
        "bf16prof", "--set", f"deepspeed.more.monitor.api_key={TAKEN_OUT}", TAKEN_OUT, "--seq=3", "--set", "a.b=[1, 2]",
    )  # fmt: skip


@pytest.mark.parametrize("name", ["BF16PROF_API_KEY", "BF16PROF_FOO", "BF16PROF_HUB", "HF_TOKEN", "WANDB_API_KEY", "MY_VARIABLE"])
def test_a_variable_that_is_not_on_the_list_is_not_recorded(name: str) -> None:
    assert environment({name: MARK}) == {}


def test_a_variable_on_the_list_is_recorded_unless_its_value_is_a_secret() -> None:
    assert environment({"BF16PROF_PROFILE": "gpt2-xl"}) == {"BF16PROF_PROFILE": "gpt2-xl"}
    assert environment({"BF16PROF_PROFILE": f"https://user:{MARK}@host"}) == {}
    assert "BF16PROF_PARENT" not in ALLOWED_ENVIRONMENT


def test_no_secret_of_a_configuration_reaches_a_run_or_a_page(main: Main, tmp_path: Path) -> None:
    config, ds_config, log = tmp_path / "config.json", tmp_path / "ds.json", tmp_path / "losses.csv"
    config.write_text(json.dumps({**CONFIG, **SECRETS}))
    ds_config.write_text(
        json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}, "comms_logger": {"enabled": False, **SECRETS}})
    )
    log.write_text(LOSSES)
    selection = ("--hf-config", config, "--ds-config", ds_config, "--gpus", "2")
    outputs = [part for suffix in (".json", ".html", ".md", ".csv") for part in ("-o", tmp_path / f"out{suffix}")]
    code, out, err = main("import", log, *selection, "-d", tmp_path / "run", "--json", "--verbose", *outputs)
    config.unlink()
    ds_config.unlink()

    assert code == 0, err
    assert MARK not in out + err
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or MARK not in path.read_text(), path
