"""What commands print and write: JSON, files and streams, and hostile names in all of them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import report_fixtures as fixtures
from command_line import Main, csv_rows, main, program, refused
from jobs import write_profile

__all__ = ["main"]

# JSON, files and streams.

JSON_COMMANDS = [
    ("estimate", "--profile", "cpu-demo"),
    ("estimate", "--profile", "cpu-demo", "--verbose"),
    ("profiles", "list"),
    ("profiles", "show", "gpt2-xl"),
    ("profiles", "show", "gpt2-xl", "--resolved"),
    ("recipes", "list"),
    ("recipes", "show", "bf16-full"),
]


@pytest.mark.parametrize("arguments", JSON_COMMANDS, ids=" ".join)
def test_json_is_one_document_on_stdout_and_nothing_else(arguments: tuple[str, ...], main: Main) -> None:
    code, out, err = main(*arguments, "--json")

    assert (code, err) == (0, "")
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert document["schema_version"] == 1
    assert isinstance(document["records"], list)


def test_the_published_run_from_the_command_line(main: Main) -> None:
    """The published 25.74 and 16.17 GiB (DeepSpeedExamples training/bf16_master_weight), to 0.2 %;
    the peaks 31.38 and 18.93 to 1 %."""
    recipes = "bf16-fp32-master,bf16-full-autocast"
    arguments = ("--profile", "deepspeed-bf16-example", "--zero", "3", "--gpus", "4", "--recipe", recipes, "--json")

    code, out, _ = main("estimate", *arguments)

    assert code == 0
    baseline, low = json.loads(out)["records"]
    digest = low["case"]["workload"]
    assert re.fullmatch("[0-9a-f]{12}", digest)
    assert baseline["case"] == {
        "profile": "deepspeed-bf16-example", "zero_stage": 3, "world_size": 4, "recipe": "bf16-fp32-master", "offload": "none",
        "workload": digest, "sequence_parallel": 1, "tensor_parallel": 1, "pipeline_parallel": 1, "expert_parallel": 1,
    }  # fmt: skip
    assert baseline["parameters"] == low["parameters"] == 6_858_007_633
    assert baseline["allocated_bytes"] / 2**30 == pytest.approx(25.74, rel=0.002)
    assert low["allocated_bytes"] / 2**30 == pytest.approx(16.17, rel=0.002)
    assert sum(baseline["components"].values()) == baseline["allocated_bytes"]
    assert baseline["run_peak_allocated_bytes"] / 2**30 == pytest.approx(31.38, rel=0.01)
    assert low["run_peak_allocated_bytes"] / 2**30 == pytest.approx(18.93, rel=0.01)
    assert [baseline["peak_phase"], low["peak_phase"]] == ["step", "backward"]
    for record in (baseline, low):
        assert record["step_time_s"] is None
        assert record["reserved_bytes"] >= record["run_peak_allocated_bytes"]


def test_json_says_what_was_refused_and_what_textbooks_say(main: Main) -> None:
    _, out, _ = main("estimate", "--profile", "cpu-demo", "--zero", "0,1", "--gpus", "2", "--recipe", "bf16-full", "--json")

    document = json.loads(out)
    assert [r["case"]["zero_stage"] for r in document["records"]] == [1]
    assert [r["case"]["zero_stage"] for r in document["refused"]] == [0]
    assert document["refused"][0]["alternatives"]
    assert set(document["textbook"][0]["bytes"]) == {"ZeRO paper", "example README"}


def test_files_are_written_in_the_format_of_their_suffix(main: Main, tmp_path: Path) -> None:
    files = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md", ".html")]

    code, _, _ = main("estimate", "-p", "cpu-demo", "--gpus", "2", *(part for f in files for part in ("-o", f)))

    assert code == 0
    records = json.loads(files[0].read_text())["records"]
    rows = csv_rows(files[1])
    assert len(rows) == len(records) > 1
    assert [int(row["allocated_bytes"]) for row in rows] == [r["allocated_bytes"] for r in records]
    asked, empty, table = files[2].read_text().split("\n", 2)
    assert asked.startswith("cpu-demo (transformer-postln), 2.79 M parameters ") and not empty and table.startswith("|")
    assert files[3].read_text().lower().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.csv", "out.html", "out.json", "out.md"], "nothing temporary is left"


def test_a_file_that_exists_is_kept_unless_forced(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("mine")

    assert "the file exists" in refused(main("estimate", "-p", "cpu-demo", "-o", path))
    assert path.read_text() == "mine"
    assert main("estimate", "-p", "cpu-demo", "-o", path, "--force")[0] == 0
    assert path.read_text() != "mine"


def test_a_full_disk_is_one_line(main: Main, tmp_path: Path) -> None:
    (tmp_path / "full.json").symlink_to("/dev/full")

    assert "cannot write" in refused(main("estimate", "-p", "cpu-demo", "-o", tmp_path / "full.json"))
    assert refused(main("estimate", "-p", "cpu-demo", "-o", tmp_path / "full.json")).count("No space left on device") == 1


@pytest.mark.parametrize("arguments", [("estimate",), ("recipes", "list", "--json"), ("--help",), ("--version",)], ids=" ".join)
def test_a_full_disk_behind_stdout_is_one_line(arguments: tuple[str, ...]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "bf16prof", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "bf16prof: cannot write the output: No space left on device"
    assert "Traceback" not in done.stderr


def test_a_folder_that_takes_no_files_is_one_line(main: Main) -> None:
    assert "cannot write /proc/self/x.csv" in refused(main("estimate", "-p", "cpu-demo", "-o", "/proc/self/x.csv"))


def test_a_pipe_may_be_the_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")

    with subprocess.Popen(
        [sys.executable, "-m", "bf16prof", "estimate", "-p", "cpu-demo", "-q", "-o", tmp_path / "pipe.csv"], stdout=subprocess.DEVNULL
    ) as process:
        header = (tmp_path / "pipe.csv").read_text().splitlines()[0]
        assert process.wait(timeout=30) == 0

    assert header.startswith("source,") or "allocated_bytes" in header
    assert (tmp_path / "pipe.csv").is_fifo()


TALKATIVE = [("estimate", "--json"), ("estimate", "--verbose"), ("profiles", "show", "gpt2-xl", "--resolved")]


@pytest.mark.parametrize("arguments", TALKATIVE, ids=" ".join)
def test_a_closed_pipe_ends_quietly(arguments: tuple[str, ...]) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "bf16prof", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        errors = process.stderr.read().decode()
        code = process.wait(timeout=30)

    assert [line for line in errors.splitlines() if not line.startswith("next: ")] == []
    assert code in (0, 1)


def test_a_pipe_is_never_cut_to_80_columns(main: Main) -> None:
    _, out, _ = main("estimate", "-p", "cpu-demo", "--gpus", "2")

    assert "bf16-full-autocast" in out
    assert max(len(line) for line in out.splitlines()) > 80
    assert "…" not in out


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}])
def test_a_pipe_has_no_escape_sequences(environment: dict[str, str]) -> None:
    done = program("estimate", "-p", "cpu-demo", env=environment)

    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr


def test_force_color_colours_a_pipe_and_no_color_wins() -> None:
    coloured = program("estimate", env={"FORCE_COLOR": "1"})
    plain = program("estimate", env={"FORCE_COLOR": "1", "NO_COLOR": "1"})

    colours = re.compile(r"\x1b\[(?:\d+;)*3[0-7]")
    assert colours.search(coloured.stdout)
    assert not colours.search(plain.stdout)


def test_hints_go_to_stderr_and_quiet_silences_them(main: Main) -> None:
    _, loud_out, loud_err = main("estimate", "-p", "cpu-demo")
    code, out, err = main("estimate", "-p", "cpu-demo", "-q")

    assert loud_err.startswith("next: bf16prof ")
    assert (code, err) == (0, "")
    assert out == loud_out


@pytest.mark.parametrize(
    ("more", "following"),
    [
        ((), "next: bf16prof plan --profile gpt2-xl --gpus 8 --gpu h100   (what fits, ranked)"),
        (
            ("--zero", "3", "--recipe", "bf16-full"),
            "next: bf16prof simulate --profile gpt2-xl --zero 3 --recipe bf16-full --gpus 8 --gpu h100",
        ),
        (
            ("--zero", "3", "--recipe", "bf16-full", "--batch-size", "2", "--activation-checkpointing"),
            "next: bf16prof simulate --profile gpt2-xl --zero 3 --recipe bf16-full --gpus 8 --gpu h100 --micro-batch-size 2 "
            "--activation-checkpointing",
        ),
        (
            ("--zero", "0", "--recipe", "fp32", "--batch-size", "99"),
            "next: bf16prof plan --profile gpt2-xl --gpus 8 --gpu h100   (what fits, ranked)",
        ),
    ],
)
def test_the_next_command_is_about_the_same_model(more: tuple[str, ...], following: str, main: Main) -> None:
    _, _, err = main("estimate", "-p", "gpt2-xl", "--gpus", "8", "--gpu", "h100", *more)

    assert err.splitlines()[-1] == following


# Hostile names.


@pytest.mark.parametrize("name", fixtures.HOSTILE, ids=range(len(fixtures.HOSTILE)))
def test_a_hostile_profile_name_is_inert_everywhere(name: str, main: Main, tmp_path: Path) -> None:
    # GIVEN a profile that names itself in a hostile way
    path = write_profile(tmp_path / "p.toml")
    path.write_text(f"name = {json.dumps(name)}\ndescription = {json.dumps(name)}\n{path.read_text()}")

    # WHEN its estimate is printed and written
    code, out, err = main("estimate", "-p", path, "--gpus", "2", "-o", tmp_path / "o.csv", "-o", tmp_path / "o.md")
    shown = main("profiles", "show", path, "--resolved")[1]

    # THEN nothing that a terminal would act on is printed
    assert code == 0
    assert all(c.isprintable() or c == "\n" for c in out + err + shown)
    # AND a spreadsheet sees text, in as many rows as there are records
    rows = csv_rows(tmp_path / "o.csv")
    assert len({len(row) for row in rows}) == 1
    assert not [cell for row in rows for cell in row.values() if cell and cell[0] in "=+@\t\r" and not cell[1:].replace(".", "").isdigit()]
    assert all(c.isprintable() or c == "\n" for c in (tmp_path / "o.csv").read_text(encoding="utf-8"))
    assert all(c.isprintable() or c == "\n" for c in (tmp_path / "o.md").read_text(encoding="utf-8"))
    # AND JSON keeps the name as it is
    assert json.loads(main("estimate", "-p", path, "--json")[1])["records"][0]["case"]["profile"] == name


@pytest.mark.parametrize("text", fixtures.HOSTILE, ids=range(len(fixtures.HOSTILE)))
@pytest.mark.parametrize(
    "flag", ["--profile", "--recipe", "--gpu", "--zero", "--set", "-o", "--offload", "--hf-config", "--model", "--ds-config"]
)
def test_hostile_arguments_are_refused_in_one_inert_line(
    flag: str, text: str, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    refused(main("estimate", flag, text))


def test_a_file_name_that_is_no_text_is_inert(main: Main, tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff\xfe.toml")
    write_profile(path)

    code, out, err = main("estimate", "-p", path, "-o", tmp_path / "o.csv", "-o", tmp_path / "o.html", "-o", tmp_path / "o.json")

    assert code == 0
    assert (out + err).encode("utf-8")
