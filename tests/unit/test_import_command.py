"""`bf16prof import`: the case, the estimate beside it, exit codes, and that rounding is no
error."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from command_line import Main, main, refused
from logs import BREAKDOWN, EXAMPLE, LOSSES, SAMPLES, by_quantity, written

from bf16prof import runs
from bf16prof.records import Case
from bf16prof.vocabulary import Source

__all__ = ["main"]

PUBLISHED = "published:deepspeed-bf16-example"
CASE = ("--zero", "3", "--gpus", "4", "--recipe", "bf16-fp32-master")
EXAMPLE_CASE = ("-p", "deepspeed-bf16-example", "--set", "model.vocab_size=50000", *CASE)


def test_an_imported_run_has_its_estimate_beside_it_and_is_a_run_like_ones_own(main: Main, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    code, out, err = main("import", EXAMPLE, *written(tmp_path, LOSSES, SAMPLES), *EXAMPLE_CASE, "-d", folder, "--fail-over", "0.01%")

    assert code == 0, err
    assert "predicted: fits h100-80gb" in out, "the verdict stands over the table, and says whose it is"
    rows = {line.split()[0]: line for line in out.splitlines() if "GiB  " in line and "(" in line}
    assert "allocated" in rows, out
    assert "parameters" not in rows, "the table has what was logged, and no more"
    assert "read example-stdout.log: output of DeepSpeed's bf16 example (33); not understood: 1" in err
    assert f"next: bf16prof report {folder} --open" in err
    run = runs.load(folder)
    assert [record.source for record in run.records] == [Source.IMPORT, Source.ESTIMATE]
    (case,) = {record.case for record in run.records}
    assert dataclasses.replace(case, workload="") == Case("deepspeed-bf16-example", 3, 4, "bf16-fp32-master")
    assert run.records[1].gpu == "h100-80gb", "the GPU that nvidia-smi names"
    assert run.records[1].parameters == run.records[0].parameters == 6_855_902_032
    assert run.manifest.profile["model"]["vocab_size"] == 50_000
    assert (folder / "loss.csv").read_text().splitlines()[:2] == ["case,step,loss", "zero3-w4-bf16-fp32-master,0,10.98828125"]
    assert (folder / "report.html").is_file()
    assert main("report", folder, "--fail-over", "0.01%", "-o", tmp_path / "again.html")[0] == 0


@pytest.mark.parametrize(
    ("logged", "flags", "gpu"),
    [
        ("NVIDIA GH200 480GB", (), "gh200-96gb"),
        ("NVIDIA H100 80GB HBM3", (), "h100-80gb"),
        ("NVIDIA V100", (), "h100-80gb"),
        ("NVIDIA GH200 480GB", ("--gpu", "a100-40gb"), "a100-40gb"),
    ],
)
def test_the_estimate_is_for_the_gpu_that_the_log_names(logged: str, flags: tuple[str, ...], gpu: str, main: Main, tmp_path: Path) -> None:
    samples = SAMPLES.replace("NVIDIA H100 80GB HBM3", logged)

    code, _, err = main("import", EXAMPLE, *written(tmp_path, samples), *EXAMPLE_CASE, *flags, "-d", tmp_path / "run")

    assert code == 0, err
    assert [record.gpu for record in runs.load(tmp_path / "run").records] == [logged, gpu]


def test_a_prediction_outside_the_tolerance_leaves_with_4_and_the_run_written(main: Main, tmp_path: Path) -> None:
    code, _, err = main("import", EXAMPLE, *EXAMPLE_CASE[:4], *CASE[:4], "--recipe", "fp32", "-d", tmp_path / "run", "--fail-over", "5%")

    assert code == 4
    assert "allocated_bytes" in err
    assert runs.load(tmp_path / "run").records


def test_json_is_one_document(main: Main, tmp_path: Path) -> None:
    code, out, _ = main("import", EXAMPLE, *EXAMPLE_CASE, "-d", tmp_path / "run", "--json")
    document = json.loads(out)

    assert code == 0
    assert [record["source"] for record in document["records"]] == ["import", "estimate"]
    allocated = by_quantity(document, "bf16-fp32-master")["allocated_bytes"]
    assert allocated["values"]["import"] == 27_642_820_608
    assert allocated["rounding"] == 0
    assert abs(allocated["errors"]["estimate"]) < 0.0001


def test_without_a_profile_there_is_a_run_and_no_estimate(main: Main, tmp_path: Path) -> None:
    code, _, err = main("import", BREAKDOWN, "--zero", "2", "--gpus", "2", "--recipe", "bf16-fp32-master", "-d", tmp_path / "run")

    assert code == 0
    assert "no estimate beside it: no --profile" in err
    (record,) = runs.load(tmp_path / "run").records
    assert record.case == Case("deepspeed-breakdown", 2, 2, "bf16-fp32-master")
    assert record.parameters is None


def test_a_deepspeed_json_says_stage_and_precision(main: Main, tmp_path: Path) -> None:
    config = tmp_path / "ds.json"
    config.write_text('{"bf16": {"enabled": true}, "optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 2}}')

    bare = main("import", EXAMPLE, "--gpus", "4", "--ds-config", config, "-d", tmp_path / "bare", "--json")
    with_profile = main("import", EXAMPLE, "--gpus", "4", "--ds-config", config, "-p", "gpt2-xl", "-d", tmp_path / "run", "--json")

    for code, out, err in (bare, with_profile):
        assert code == 0, err
        case = json.loads(out)["records"][0]["case"]
        assert (case["zero_stage"], case["recipe"]) == (2, "bf16-fp32-master")
    assert [r["source"] for r in json.loads(with_profile[1])["records"]] == ["import", "estimate"]


def test_another_model_than_the_profiles_is_said(main: Main, tmp_path: Path) -> None:
    _, _, err = main("import", EXAMPLE, "-p", "gpt2-xl", *CASE, "-d", tmp_path / "run")

    assert "the log has 6,855,902,032 parameters, the profile 1,557,611,200: this is another model" in err


def test_a_recipe_that_no_engine_here_runs_is_imported_without_estimate(main: Main, tmp_path: Path) -> None:
    code, _, err = main("import", EXAMPLE, "-p", "gpt2-xl", "--zero", "1", "--gpus", "4", "--recipe", "nemo-bf16", "-d", tmp_path / "run")

    assert code == 0
    assert "no estimate beside it" in err
    assert [r.case.recipe for r in runs.load(tmp_path / "run").records] == ["nemo-bf16"]


def test_a_model_in_the_place_of_a_log_is_told_how_it_is_said(main: Main) -> None:
    code, _, err = main("import", EXAMPLE, "llama3.1-8b", *CASE)

    assert code == 2
    assert "there is no log called llama3.1-8b" in err
    assert "--model llama3.1-8b" in err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "what was logged does not say which case it is: add --gpus, --zero, --recipe"),
        (("--gpus", "4", "--zero", "3"), "add --recipe"),
        (("--gpus", "4", "--zero", "2,3", "--recipe", "fp32"), "--zero: a run is of one case; these are 2"),
        (("--gpus", "4,8", "--zero", "3", "--recipe", "fp32"), "--gpus: a run is of one case"),
        (("--gpus", "4", "--zero", "3", "--recipe", "fp32,bf16-full"), "--recipe: a run is of one case"),
        (("--gpus", "4", "--zero", "5", "--recipe", "fp32"), "the ZeRO stage is 0, 1, 2 or 3"),
        (("--gpus", "0", "--zero", "3", "--recipe", "fp32"), "a number of ranks from 1"),
        (("--gpus", "1", "--zero", "3", "--recipe", "fp32"), "--gpus 1: the log speaks of rank 1"),
        (("--gpus", "4", "--zero", "3", "--recipe", "x"), "unknown recipe"),
        (("-p", "nothing", *CASE), "unknown profile"),
        (("-p", "gpt2-xl", *CASE, "--gpu", "abacus"), "unknown GPU"),
        ((*CASE, "--ds-config", "/nowhere.json", "--set", "x"), ""),
    ],
)
def test_a_case_that_is_not_one_is_refused_in_one_line(arguments: tuple[str, ...], reason: str, main: Main, tmp_path: Path) -> None:
    result = main("import", EXAMPLE, *arguments, "-d", tmp_path / "run")
    if not reason:
        assert result[0] == 0, "stage and precision are the flags', so the file is not needed"
        return

    assert reason in refused(result)
    assert not (tmp_path / "run").exists()


def test_the_hint_names_the_deepspeed_json_of_the_log(main: Main) -> None:
    assert "(the log names configs/baseline.json)" in refused(main("import", EXAMPLE))


def test_a_file_of_which_nothing_is_understood_is_refused(main: Main, tmp_path: Path) -> None:
    assert "none of its 1 lines is understood" in refused(main("import", *written(tmp_path, "hello"), *CASE))


def test_the_published_run_stands_beside_ones_own_import(main: Main, tmp_path: Path) -> None:
    main("import", EXAMPLE, *EXAMPLE_CASE, "-d", tmp_path / "run")

    code, out, _ = main("report", PUBLISHED, tmp_path / "run", "-o", tmp_path / "both.md")

    assert code == 0
    assert "[deepspeed-bf16-example, published]" in out
    assert "as printed" in (tmp_path / "both.md").read_text()
