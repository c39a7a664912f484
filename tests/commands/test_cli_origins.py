"""Where the values of a command come from: flags, variables, profiles, and models and
configurations of the user's own."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
from command_line import Main, main, refused

from bf16prof import runs
from bf16prof.cases import Job, Selection
from bf16prof.commands import request
from bf16prof.errors import InputError
from bf16prof.records import Case

__all__ = ["main"]

# Where values come from.


def origin_of(main: Main, key: str, *arguments: str) -> tuple[Any, str]:
    code, out, _ = main("profiles", "show", "deepspeed-bf16-example", "--resolved", "--json", *arguments)
    assert code == 0
    document = json.loads(out)
    return document["profile"][key], document["origins"].get(key, "default")


OVERRIDABLE = {
    "sequence_length": ("64", 64, "128", 128, 512),
    "micro_batch_size": ("3", 3, "5", 5, 1),
    "gradient_accumulation_steps": ("2", 2, "4", 4, 1),
}


@pytest.mark.parametrize("name", OVERRIDABLE)
def test_flags_over_variables_over_the_profile_and_each_is_named(name: str, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    flag_text, flag_value, variable_text, variable_value, own = OVERRIDABLE[name]
    key, flag, variable = f"workload.{name}", "--" + name.replace("_", "-"), f"BF16PROF_{name.upper()}"

    # GIVEN nothing, THEN the profile's own
    assert origin_of(main, key) == (own, "preset deepspeed-bf16-example")

    # GIVEN the variable, THEN it wins and is named
    monkeypatch.setenv(variable, variable_text)
    assert origin_of(main, key) == (variable_value, variable)

    # GIVEN the flag too, THEN the flag wins and is named; --set is below it
    assert origin_of(main, key, flag, flag_text) == (flag_value, flag)
    assert origin_of(main, key, flag, flag_text, "--set", f"{key}=9") == (flag_value, flag)


def test_checkpointing_by_flag_and_variable(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "workload.activation_checkpointing"
    monkeypatch.setenv("BF16PROF_ACTIVATION_CHECKPOINTING", "0")

    assert origin_of(main, key) == (False, "BF16PROF_ACTIVATION_CHECKPOINTING")
    assert origin_of(main, key, "--activation-checkpointing") == (True, "--activation-checkpointing")


def test_set_and_defaults_are_named_too(main: Main) -> None:
    key = "deepspeed.zero_optimization.stage3_param_persistence_threshold"

    assert origin_of(main, key, "--set", "deepspeed.zero_optimization.param_persistence_threshold=5") == (5, "--set")
    assert origin_of(main, "workload.seed") == (42, "default")


def test_a_wrong_variable_is_named(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BF16PROF_SEQUENCE_LENGTH", "long")
    assert "BF16PROF_SEQUENCE_LENGTH" in refused(main("estimate"))

    monkeypatch.setenv("BF16PROF_SEQUENCE_LENGTH", "-4")
    assert "BF16PROF_SEQUENCE_LENGTH: workload.sequence_length: " in refused(main("estimate"))


@pytest.mark.parametrize(
    ("variable", "value", "flag", "other", "field", "values"),
    [
        ("BF16PROF_ZERO", "2", "--zero", "1", "zero_stage", (2, 1)),
        ("BF16PROF_GPUS", "3", "--gpus", "5", "world_size", (3, 5)),
        ("BF16PROF_RECIPE", "bf16-full", "--recipe", "fp32", "recipe", ("bf16-full", "fp32")),
        ("BF16PROF_PROFILE", "cpu-demo", "--profile", "gpt2-xl", "profile", ("cpu-demo", "gpt2-xl")),
        ("BF16PROF_OFFLOAD", "optimizer", "--offload", "none", "offload", ("optimizer", "none")),
    ],
)
def test_selectors_have_variables_and_flags_win(  # noqa: PLR0917 - one row of the table
    variable: str, value: str, flag: str, other: str, field: str, values: tuple[Any, Any], main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    def selected(*arguments: str) -> set[Any]:
        return {record["case"][field] for record in json.loads(main("estimate", "--json", *arguments)[1])["records"]}

    monkeypatch.setenv(variable, value)

    assert selected() == {values[0]}
    assert selected(flag, other) == {values[1]}


# Models and configurations of the user's own.

LLAMA = {"model_type": "llama", "hidden_size": 8, "vocab_size": 301, "rope_theta": 1e4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with files of the user's own in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny-llama").mkdir()
    for name in ("tiny-llama/config.json", "other.json", "config.json"):
        (tmp_path / name).write_text(json.dumps(LLAMA))
    (tmp_path / "sized.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 3, "hidden_act": "gelu_10"}))
    (tmp_path / "mine.py").write_text("raise SystemExit('imported')")
    (tmp_path / "hf.toml").write_text('[model]\nhf_config = "other.json"\nattn_implementation = "eager"\n[workload]\nsequence_length = 5\n')
    (tmp_path / "factory.toml").write_text("[model]\nfactory = 'mine:make'\nvocab_size = 9\n[workload]\nsequence_length = 5\n")
    return tmp_path


def ds_json(folder: Path, **content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("--hf-config", "tiny-llama/config.json"), "llama"),
        (("--hf-config", "other.json"), "llama"),
        (("--hf-config", "sized.json"), "llama-8x3"),
        (("--model", "mine:make"), "make"),
        (("--model", "pkg.mine:Things.make"), "Things.make"),
        (("--model", "mine:make", "--set", "name=called"), "called"),
    ],
)
def test_a_case_is_called_after_the_model_that_was_asked_for(
    arguments: tuple[str, ...], name: str, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No closed form knows these, and says so of the case; nothing of the user's is imported."""
    message = refused(main("estimate", "--gpus", "2", "--zero", "3", "--recipe", "bf16-full", *arguments))
    assert message.startswith("bf16prof: zero3-w2-bf16-full: no closed form: ")
    assert "bf16prof simulate" in message

    seen: list[str] = []

    def expand(selection: Selection) -> list[Job]:
        seen.append(selection.profile.name)
        raise InputError("seen enough")

    monkeypatch.setattr(request, "expand", expand)
    refused(main("estimate", *arguments))
    assert seen == [name]


@pytest.mark.usefixtures("folder")
def test_there_is_one_model_and_a_flag_wins_over_a_variable(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("--hf-config", "other.json", "--model", "mine:make")
    assert "--hf-config and --model exclude each other" in refused(main("estimate", *both))

    monkeypatch.setenv("BF16PROF_MODEL", "nonsense")
    assert "BF16PROF_MODEL: model.factory: expected PACKAGE.MODULE:FUNCTION" in refused(main("estimate"))
    assert "no closed form" in refused(main("estimate", "--hf-config", "other.json"))

    monkeypatch.setenv("BF16PROF_HF_CONFIG", "none.json")
    assert "BF16PROF_HF_CONFIG and BF16PROF_MODEL exclude each other" in refused(main("estimate"))
    assert "no closed form" in refused(main("estimate", "--model", "mine:make"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("name", "key", "value", "origin"),
    [
        ("hf.toml", "model.hf_config.hidden_size", 8, "other.json"),
        ("hf.toml", "model.attn_implementation", "eager", "hf.toml"),
        ("factory.toml", "model.factory", "mine:make", "factory.toml"),
        ("factory.toml", "model.vocab_size", 9, "factory.toml"),
    ],
)
@pytest.mark.parametrize("resolved", [(), ("--resolved",)])
def test_profiles_of_other_models_are_shown(  # noqa: PLR0917 - one row of the table
    name: str, key: str, value: object, origin: str, resolved: tuple[str, ...], main: Main
) -> None:
    code, out, _ = main("profiles", "show", name, *resolved, "--json")
    document = json.loads(out)

    assert code == 0
    assert (document["profile"][key], document["origins"][key], document["parameters"]) == (value, origin, None)
    assert re.search(r"\(parameters\) +\? +computed", main("profiles", "show", name, *resolved)[1])


def cases(main: Main, *arguments: str | Path) -> set[tuple[int, int, str]]:
    code, out, err = main("estimate", "-p", "cpu-demo", "--json", *arguments)
    assert code == 0, err
    found = [record["case"] for record in json.loads(out)["records"]]
    return {(case["zero_stage"], case["world_size"], case["recipe"]) for case in found}


BF16_FULL = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


def test_a_deepspeed_json_says_the_case_and_flags_and_variables_win(folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    ds = ("--ds-config", ds_json(folder, bf16=BF16_FULL, zero_optimization={"stage": 2}), "--gpus", "2")

    assert cases(main, *ds) == {(2, 2, "bf16-full")}
    assert cases(main, *ds, "--zero", "1,3") == {(1, 2, "bf16-full"), (3, 2, "bf16-full")}
    assert cases(main, *ds, "--recipe", "fp32") == {(2, 2, "fp32")}
    assert "unknown recipe" in refused(main("estimate", *ds, "--recipe", "int8"))
    assert "leave --recipe out" in refused(main("estimate", *ds, "--recipe", "ds-config"))
    assert "leave --recipe out" in refused(main("estimate", "--recipe", "ds-config"))
    monkeypatch.setenv("BF16PROF_ZERO", "3")
    assert cases(main, *ds) == {(3, 2, "bf16-full")}
    monkeypatch.setenv("BF16PROF_DS_CONFIG", str(folder / "none.json"))
    assert "cannot read" in refused(main("estimate"))
    assert cases(main, *ds) == {(3, 2, "bf16-full")}


def test_batch_sizes_of_a_deepspeed_json(folder: Path, main: Main) -> None:
    ds = ("--ds-config", ds_json(folder, train_batch_size=12, bf16={"enabled": True}))

    assert {world for _, world, _ in cases(main, *ds)} == {1, 2, 4}, "of 1, 2, 4, 8, ... those that divide it"
    message = refused(main("estimate", *ds, "--gpus", "4,5"))
    assert "train_batch_size is not equal to micro_batch_per_gpu * gradient_acc_step * world_size: 12 != 2 * 1 * 5" in message
    assert cases(main, *ds, "--gpus", "4", "--micro-batch-size", "3") == {(0, 4, "bf16-fp32-master")}
    assert "12 != 5 * 0 * 4" in refused(main("estimate", *ds, "--gpus", "4", "--set", "workload.micro_batch_size=5"))
    both = ("--micro-batch-size", "5", "--gradient-accumulation-steps", "7")
    assert cases(main, *ds, "--gpus", "4", *both) == {(0, 4, "bf16-fp32-master")}, "the job's batch size follows from the user's own"


def test_a_predicted_case_has_the_batch_of_its_number_of_ranks(folder: Path, main: Main) -> None:
    """Logits of 2 micro-batches, or of 1, in bf16: the only bytes of ZeRO-0 that depend on the
    number of ranks."""
    ds = ("--ds-config", ds_json(folder, train_batch_size=4, gradient_accumulation_steps=2, bf16={"enabled": True}), "--gpus", "1,2")

    records = json.loads(main("estimate", "-p", "cpu-demo", "--device", "cpu", "--json", *ds)[1])["records"]

    assert [r["components"]["activations"] for r in records] == [n * 128 * (257 * 2 + 16) + 2 for n in (2, 1)]


def test_a_precision_that_is_no_recipe_has_a_case_of_its_own(folder: Path, main: Main) -> None:
    autocast = {"enabled": True, "dtype": "bfloat16"}

    message = refused(main("estimate", "--gpus", "2", "--ds-config", ds_json(folder, bf16={"enabled": True}, torch_autocast=autocast)))

    assert "zero0-w2-ds-config: no closed form: the DeepSpeed JSON describes a precision that is no recipe's" in message


def test_measuring_a_hugging_face_model_without_transformers_is_one_line(folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from bf16prof.measuring import accelerator

    monkeypatch.setattr(accelerator, "package_version", lambda name: None if name == "transformers" else "1")

    for command in ("measure", "simulate"):
        message = refused(main(command, "--hf-config", folder / "other.json"))
        assert "needs transformers, which is not installed" in message
        assert "pip install 'bf16prof[hf]'" in message


def test_a_recipe_shows_what_runs_measured_it_to_cost(main: Main, tmp_path: Path) -> None:
    record = dataclasses.replace(fixtures.measure(Case("demo", 1, 2, "bf16-full")), quality=(fixtures.watched(),))
    runs.save(dataclasses.replace(fixtures.run([record]), path=tmp_path))

    _, shown, _ = main("recipes", "show", "bf16-full", "--run", str(tmp_path))
    assert re.search(r"measured, zero1-w2-bf16-full +EDQ 0.9000, 25.00 % of updates lost, loss 3.5 \(1 step\)", shown)
    assert "measured" not in main("recipes", "show", "bf16-pure", "--run", str(tmp_path))[1]
    rows = json.loads(main("recipes", "list", "--json", "--run", str(tmp_path))[1])["recipes"]
    assert {row["id"]: [found["edq"] for found in row["measured"]] for row in rows if row["measured"]} == {"bf16-full": [0.9]}
    for arguments in (["list"], ["show", "bf16-full"]):
        assert refused(main("recipes", *arguments, "--run", str(tmp_path / "none"))).startswith("bf16prof: cannot read")


def test_a_recipe_without_the_library_that_runs_it_is_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from bf16prof.measuring import accelerator

    monkeypatch.setattr(accelerator, "package_version", lambda name: None if name == "torch-optimi" else "1")

    for command in ("measure", "simulate"):
        message = refused(main(command, "--zero", "0", "--recipe", "bf16-kahan"))
        assert "bf16-kahan (optimi.AdamW) needs torch-optimi, which is not installed" in message
        assert "pip install 'bf16prof[recipes]'" in message
    assert main("estimate", "--zero", "0", "--recipe", "bf16-kahan")[0] == 0
