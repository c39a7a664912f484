"""`bf16prof plan` from the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import report_fixtures as fixtures
from command_line import Main, csv_rows, main, refused
from test_cli import FLAGS

from bf16prof import runs
from bf16prof.planning.written import launch_line

__all__ = ["main"]

PLAN = (
    "plan",
    "--no-verify",
    "-p",
    "gpt2-xl",
    "--gpu",
    "rtx-4090-24gb",
    "--gpus",
    "4",
    "--zero",
    "2,3",
    "--recipe",
    "bf16-fp32-master",
    "--offload",
    "none",
)


def test_a_plan_is_one_document_with_its_records(main: Main, tmp_path: Path) -> None:
    files = [tmp_path / f"p{suffix}" for suffix in (".json", ".csv", ".md", ".html")]
    code, out, err = main(*PLAN, "--json", *(part for file in files for part in ("-o", file)))

    found = json.loads(out)
    assert code == 0
    assert found["schema_version"] == 1
    assert found["plans"][0]["case"] == found["records"][0]["case"]
    assert found["plans"][0]["peak_bytes"] == found["records"][0]["run_peak_allocated_bytes"]
    assert json.loads(files[0].read_text()) == found
    assert len(csv_rows(files[1])) == len(found["plans"])
    assert "zero3-w4-bf16-fp32-master" in files[2].read_text()
    assert "zero3-w4-bf16-fp32-master" in files[3].read_text()
    assert runs.load_records(files[0])
    assert err.startswith("next: bf16prof simulate --profile gpt2-xl --zero ")


@pytest.mark.parametrize(("ranks", "line"), [(4, "--num_gpus 4"), (12, "--num_nodes 2 --num_gpus 6"), (16, "--num_nodes 2 --num_gpus 8")])
def test_the_launch_line_starts_every_rank(ranks: int, line: str) -> None:
    case = dataclasses.replace(fixtures.case(), world_size=ranks)
    choice: Any = SimpleNamespace(plan=SimpleNamespace(case=case))

    assert launch_line(choice, 8, "ds.json") == f"deepspeed {line} train.py --deepspeed_config ds.json"


def test_the_command_after_a_plan_names_what_is_trained(main: Main) -> None:
    _, _, err = main(*PLAN, "--sequence-length", "128", "--set", "workload.seed=7", "--expandable-segments", "--json")

    command = err.removeprefix("next: ").split()
    assert command[:2] == ["bf16prof", "simulate"]
    assert "--sequence-length 128 --set workload.seed=7 " in err
    assert "--expandable-segments" in command
    assert {word for word in command if word.startswith("--")} <= FLAGS["simulate"]


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_plan_keeps_to_the_width_and_cuts_nothing(width: int, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))

    code, out, _ = main(*PLAN)

    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= width
    for word in ("tokens/s", "bf16-fp32-master", "micro-batch", "at the training peak", "upper bound"):
        assert word in out


def test_a_written_config_is_never_replaced_without_force(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text("mine")

    assert "the file exists" in refused(main(*PLAN, "--write", path))
    assert path.read_text() == "mine"
    code, _, err = main(*PLAN, "--write", path, "--force")

    assert code == 0
    assert json.loads(path.read_text())["zero_optimization"]["stage"] in (2, 3)
    assert "activation checkpointing" in err
    assert [p.name for p in tmp_path.iterdir()] == ["ds.json"]


def test_where_nothing_fits_the_advice_is_the_answer(main: Main, tmp_path: Path) -> None:
    arguments = (
        "plan",
        "--no-verify",
        "-p",
        "llama3-8b",
        "--gpu",
        "l4-24gb",
        "--gpus",
        "1",
        "--zero",
        "2",
        "--recipe",
        "bf16-full",
        "--offload",
        "none",
    )

    code, out, _ = main(*arguments)
    assert code == 0
    assert "None of " in out
    assert "--offload optimizer" in out
    code, _, err = main(*arguments, "--write", tmp_path / "ds.json")
    assert code == 2
    assert "nothing written" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--margin", "100%"), "--margin 100%"),
        (("--gpus", "1,2", "--write", "ds.json"), "a DeepSpeed JSON is of one number of GPUs, these are 2"),
        (("--gpu", "none"), "unknown GPU"),
        (("-o", "plan.pdf"), "known: .json, .csv, .md, .html"),
        (("--zero", "3", "--set", "deepspeed.zero_optimization.stage3_allgather_sequential=true"), "no peaks in closed form"),
        (("--recipe", "nemo-bf16"), "no DeepSpeed engine runs nemo-bf16"),
        (("--model", "some.where:make"), "no closed form"),
        (("--offload", "optimizer", "--zero", "0"), "offload_optimizer needs ZeRO stage"),
    ],
)
def test_what_cannot_be_planned_is_one_line(arguments: tuple[str, ...], said: str, main: Main) -> None:
    assert said in refused(main("plan", "--no-verify", "-p", "gpt2-xl", *arguments))


def test_several_numbers_of_gpus_are_one_table(main: Main) -> None:
    code, out, err = main(*PLAN, "--gpus", "1,2,4")

    assert code == 0
    assert "by the number of GPUs" in out
    assert "nothing fits" in out  # on one
    assert "zero3-w4-bf16-fp32-master" in out
    assert err.startswith("next: ")


def test_the_micro_steps_of_a_deepspeed_json_are_kept(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "bf16": {"enabled": True}}))

    _, out, _ = main(*PLAN, "--ds-config", path, "--json")

    assert {plan["gradient_accumulation_steps"] for plan in json.loads(out)["plans"]} == {4}
