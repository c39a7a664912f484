"""The Python API: the terminal's answers as values, its arguments frozen, its errors one kind, no
torch."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main

import bf16prof
from bf16prof.errors import Bf16profError, InputError
from bf16prof.vocabulary import Device

__all__ = ["main"]  # a fixture

WORKLOAD = {
    "sequence_length", "micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "zero_init", "set_",
}  # fmt: skip
CASE = WORKLOAD | {
    "profile", "zero", "recipe", "offload", "hf_config", "download", "model", "ds_config", "training_args", "optim", "quiet",
}  # fmt: skip
ARGUMENTS = {
    bf16prof.estimate: CASE | {"subject", "gpus", "gpu", "device", "gpus_per_node", "expandable_segments", "calibrate", "trace"},
    bf16prof.simulate: CASE | {"subject", "gpus", "gpu", "device", "gpus_per_node", "expandable_segments", "snapshot", "script"},
    bf16prof.measure: CASE | {"script", "subject", "ranks", "warmup", "steps", "quality", "timeout", "simulate", "output_dir"},
    bf16prof.plan: CASE
    | {
        "subject", "gpus", "gpu", "gpus_per_node", "margin", "expandable_segments", "micro_batch_limit", "verify", "no_verify",
        "calibrate",
    },
    bf16prof.import_logs: CASE | {"files", "gpus", "gpu", "output_dir"},
}  # fmt: skip
"""Add to it freely; take nothing away: people have written these names down."""


@pytest.mark.parametrize("function", ARGUMENTS, ids=lambda function: function.__name__)
def test_the_arguments_are_frozen(function: Any) -> None:
    assert set(inspect.signature(function).parameters) >= ARGUMENTS[function]


def test_an_estimate_is_what_the_command_prints(main: Main) -> None:
    code, out, _ = main("estimate", "llama3.1-8b", "--zero", "2,3", "--gpus", "8", "--gpu", "h100", "--json")
    outcome = bf16prof.estimate("llama3.1-8b", zero=[2, 3], gpus=8, gpu="h100")

    assert code == 0
    assert json.loads(outcome.to_json()) == json.loads(out)


def test_a_plan_has_the_first_choice_of_the_command_and_all_others(main: Main) -> None:
    _, out, _ = main(
        "plan",
        "gpt2-xl",
        "--gpus",
        "2",
        "--gpu",
        "h100",
        "--zero",
        "1,2,3",
        "--recipe",
        "bf16-full",
        "--micro-batch-limit",
        "8",
        "--no-verify",
        "--json",
    )
    plans = bf16prof.plan("gpt2-xl", gpus="2", gpu="h100", zero="1,2,3", recipe="bf16-full", micro_batch_limit=8, no_verify=True)

    assert json.loads(plans.to_json()) == json.loads(out)
    assert len(plans.to_dataframe()) == len(json.loads(out)["plans"]) > 10


def test_flags_may_be_spelt_as_in_a_terminal() -> None:
    case: dict[str, Any] = {"gpus": 2, "zero": 3, "recipe": "bf16-full"}  # types know the long names only
    short, long = case | {"seq": 512, "gas": 2}, case | {"sequence_length": 512, "gradient_accumulation_steps": 2}

    assert bf16prof.estimate("gpt2-xl", **short).records == bf16prof.estimate("gpt2-xl", **long).records
    with pytest.raises(bf16prof.Bf16profError, match="sequence_length is said twice"):
        bf16prof.estimate("gpt2-xl", **short, sequence_length=512)


def test_what_is_printed_is_the_screen_of_the_command(main: Main) -> None:
    outcome = bf16prof.estimate("gpt2-xl", gpus=2, zero=3, recipe="bf16-full")
    plans = bf16prof.plan("gpt2-xl", gpus="2", gpu="h100", zero="3", recipe="bf16-full", micro_batch_limit=2, no_verify=True)
    _, out, _ = main("estimate", "gpt2-xl", "--gpus", "2", "--zero", "3", "--recipe", "bf16-full")

    assert repr(outcome) == "<Outcome of estimate gpt2-xl: 1 record>"
    assert "fits h100-80gb" in " ".join(str(outcome).split())
    assert outcome.records[0].case.label in out
    assert outcome.records[0].case.label in str(outcome)
    assert repr(plans).startswith("<Plans of gpt2-xl: ")
    assert "2 x h100-80gb" in str(plans)
    assert max(map(len, [*str(outcome).splitlines(), *str(plans).splitlines()])) <= 80


def test_records_have_a_frame_a_file_and_a_picture_for_notebooks(tmp_path: Path) -> None:
    outcome = bf16prof.estimate("gpt2-xl", zero="3", gpus="2", recipe="bf16-full", device=Device.GPU)
    page = outcome.save(tmp_path / "page.md")

    assert list(outcome.to_dataframe()["allocated_bytes"]) == [record.allocated_bytes for record in outcome.records]
    assert "bf16-full" in page.read_text(encoding="utf-8")
    assert "<table" in outcome._repr_html_()
    with pytest.raises(InputError, match="the file exists"):
        outcome.save(page)


def test_a_figure_is_plotlys(tmp_path: Path) -> None:
    outcome = bf16prof.estimate("gpt2-xl", zero=[1, 3], gpus=2, recipe="bf16-full", gpu="h100")

    assert {trace.type for trace in outcome.figure("memory").data} >= {"bar"}
    with pytest.raises(InputError, match="losses"):
        outcome.figure("losses")
    with pytest.raises(InputError, match="memroy"):
        outcome.figure("memroy")


def test_plans_are_saved_and_give_their_deepspeed_json(tmp_path: Path) -> None:
    plans = bf16prof.plan("gpt2-xl", gpus=2, gpu="h100", zero=3, recipe="bf16-full", micro_batch_limit=4, no_verify=True)

    assert json.loads(plans.deepspeed_json())["zero_optimization"]["stage"] == plans.records[0].case.zero_stage
    assert "bf16-full" in plans.save(tmp_path / "plans.md").read_text(encoding="utf-8")
    assert plans.save(tmp_path / "plans.html").read_text(encoding="utf-8").lower().startswith("<!doctype html>")
    with pytest.raises(InputError, match="the file exists"):
        plans.save(tmp_path / "plans.md")


def test_choices_are_taken_by_their_names() -> None:
    assert bf16prof.estimate("gpt2-xl", zero="3", gpus="2", device="cpu", trace=False).records[0].device is Device.CPU


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"gpus": "many"}, "--gpus many: expected whole numbers"),
        ({"zero": 7}, "--zero 7"),
        ({"device": "tpu"}, "expected one of gpu, cpu"),
        ({"nothing": 1}, "no argument nothing"),
        ({"output": "x.html"}, "no argument output"),
        ({"set_": ["a"]}, "--set"),
    ],
)
def test_what_is_wrong_is_one_kind_of_error(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(Bf16profError, match=message):
        bf16prof.estimate("gpt2-xl", **flags)


def test_variables_of_the_terminal_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BF16PROF_ZERO", "1")

    assert {record.case.zero_stage for record in bf16prof.estimate("gpt2-xl", gpus="2").records} == {0, 1, 2, 3}


def test_light_calls_import_no_torch() -> None:
    code = "import bf16prof; bf16prof.estimate('gpt2-xl', gpus=2); import sys; print('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_a_script_is_what_stands_after_two_dashes(main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The words reach the runner from both sides; a failed script has its record on the error, as
    the terminal shows it."""
    from bf16prof.dry_run import runner
    from bf16prof.dry_run.script import runner as of_scripts

    path = tmp_path / "train.py"
    path.write_text("")
    record = bf16prof.estimate("gpt2-xl", zero="3", gpus="4", recipe="bf16-full", trace=False).records[0]
    asked: list[list[str]] = []

    def run(task: Any, *_: Any) -> Any:
        asked.append([*task.script.words, task.world_size])
        failure = runner.DryRunFailed("it broke") if "--break" in task.script.words else None
        return of_scripts.ScriptOutcome(record, failure)

    monkeypatch.setattr(of_scripts, "simulate_script", run)
    outcome = bf16prof.simulate(script=[path, "--lr", 1], gpus="4")  # type: ignore[list-item]
    code, out, err = main("simulate", "--gpus", "4", "--json", "--", str(path), "--lr", "1")

    assert (code, asked) == (0, [[str(path), "--lr", "1", 4]] * 2), err
    assert json.loads(out)["records"] == json.loads(outcome.to_json())["records"]
    with pytest.raises(runner.DryRunFailed, match="it broke") as failed:
        bf16prof.simulate(script=[str(path), "--break"], gpus=4)
    assert list(failed.value.records.values()) == [record]
    with pytest.raises(InputError, match="zero: a script after -- says itself"):
        bf16prof.simulate(script=[str(path)], zero="3")
