"""The command line: exit codes, one-line errors, help, flags, output files, precedence, and hostile names."""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import report_fixtures as fixtures
import typer
from jobs import write_profile
from typer.testing import CliRunner

import bf16prof
from bf16prof import cli, runs
from bf16prof.cases import Job, Selection
from bf16prof.commands import request
from bf16prof.errors import Bf16profError, InputError, Refused, RunFailed, ToleranceExceeded
from bf16prof.estimate import predict
from bf16prof.records import Case

Result = tuple[int, str, str]
Main = Callable[..., Result]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    """The whole program in this process: arguments in; exit code, stdout and stderr out."""
    before = signal.getsignal(signal.SIGTERM)
    for name in [name for name in os.environ if name.startswith("BF16PROF_") or name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")]:
        monkeypatch.delenv(name)

    def call(*arguments: str | Path) -> Result:
        monkeypatch.setattr(sys, "argv", ["bf16prof", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, out, err

    yield call
    signal.signal(signal.SIGTERM, before)
    gc.enable()


def refused(result: Result) -> str:
    """The one line of a refusal: exit code 2, nothing on stdout, no traceback, at most a hint after it."""
    code, out, err = result
    lines = err.splitlines()
    assert code == 2, err
    assert out == ""
    assert lines[0].startswith("bf16prof: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  hint: ")), err
    assert err.isascii() or all(c.isprintable() or c == "\n" for c in err)
    return err


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    environment |= options.pop("env", {})
    return subprocess.run(
        [sys.executable, "-m", "bf16prof", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60, env=environment, **options,
    )  # fmt: skip


def csv_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# Flags and help.

SELECTORS = {"--profile", "-p", "--zero", "--recipe", "-r", "--offload"}
OVERRIDES = {
    "--sequence-length", "--micro-batch-size", "--gradient-accumulation-steps", "--activation-checkpointing",
    "--no-activation-checkpointing", "--set",
}  # fmt: skip
FOREIGN = {"--hf-config", "--model", "--ds-config"}
OUTPUT = {"--json", "--output", "-o", "--force", "--quiet", "-q"}
FLAGS = {
    "estimate": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "--gpus", "--gpu", "--gpus-per-node", "--device", "--calibrate", "--verbose", "-v",
    },
    "measure": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "--nproc-per-node", "--num-gpus", "--warmup", "--steps", "--timeout", "--output-dir", "-d", "--fail-over", "--verbose", "-v",
        "--simulate", "--quality",
    },
    "simulate": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "--gpus", "--gpu", "--device", "--verbose", "-v", "--expandable-segments", "--snapshot",
    },
    "import": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "--gpus", "--gpu", "--output-dir", "-d", "--fail-over", "--verbose", "-v", "files",
    },
    "plan": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "--gpus", "--gpu", "--gpus-per-node", "--margin", "--expandable-segments", "--micro-batch-limit", "--calibrate", "--write",
        "--verbose", "-v",
    },
    "report": OUTPUT | {"--open", "--fail-over", "runs"},
    "doctor": {"--json"},
    "profiles list": {"--json"},
    "profiles show": OVERRIDES | {"--json", "--resolved", "name"},
    "recipes list": {"--json", "--run"},
    "recipes show": {"--json", "--run", "name"},
}  # fmt: skip
"""The frozen command line: what is here, people type in scripts. Add to it freely; take nothing away."""


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that can be run, by its full name."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, sub in command.commands.items():
        yield from commands(sub, f"{name} {part}".strip())


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


def test_the_flags_are_frozen() -> None:
    found = {name: {flag for p in command.params for flag in (*p.opts, *p.secondary_opts)} for name, command in COMMANDS.items()}

    for name, flags in FLAGS.items():
        assert found[name] == flags, name


def test_the_variables_that_stand_for_flags_are_named_after_them() -> None:
    for command in COMMANDS.values():
        for parameter in command.params:
            if parameter.envvar:
                assert parameter.envvar == f"BF16PROF_{parameter.name.upper()}"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_two_examples_and_the_exit_codes(name: str) -> None:
    result = CliRunner().invoke(cli.app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}, prog_name="bf16prof")

    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:")[2]
    assert len(re.findall(rf"^ bf16prof {name} |^ bf16prof {name}$", examples, re.MULTILINE)) == 2
    assert "Exit codes: 0 ok, 1 internal error, 2 bad input, 3 the run failed, 4 outside --fail-over, 130 interrupted." in examples


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("estimate", "-h"), ("profiles", "--help")])
def test_help_is_no_error(arguments: tuple[str, ...], main: Main) -> None:
    code, out, err = main(*arguments)

    assert (code, err) == (0, "")
    assert "Usage: " in out
    assert "Exit codes" in out


def test_version(main: Main) -> None:
    assert main("--version") == (0, f"bf16prof {bf16prof.__version__}\n", "")


def test_the_module_is_the_same_program() -> None:
    done = program("--version")

    assert (done.returncode, done.stdout, done.stderr) == (0, f"bf16prof {bf16prof.__version__}\n", "")


def test_underscores_in_flags_are_read_as_dashes_and_values_are_left_alone(main: Main) -> None:
    arguments = ("--sequence_length=64", "--micro_batch_size", "3", "--set", "workload.data=text:a_b")

    code, out, _ = main("profiles", "show", "gpt2-xl", "--json", *arguments)

    assert code == 0
    profile = json.loads(out)["profile"]
    assert (profile["workload.sequence_length"], profile["workload.micro_batch_size"], profile["workload.data"]) == (64, 3, "text:a_b")
    assert "--steps" in refused(main("measure", "--num_gpus", "1", "--steps=0"))


# Exit codes.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("estimate", "--profile", "gpt5"), ["unknown profile 'gpt5'", "presets: "]),
        (("estimate", "--profile", "none.toml"), ["cannot read none.toml"]),
        (("estimate", "--recipe", "int8"), ["unknown recipe 'int8'", "known: "]),
        (("estimate", "--recipe", "nemo-bf16"), ["no DeepSpeed engine runs nemo-bf16", "nearest that run: bf16-fp32-master"]),
        (("estimate", "--gpu", "tpu"), ["unknown GPU 'tpu'", "h100-80gb"]),
        (("estimate", "--zero", "4"), ["--zero 4"]),
        (("estimate", "--zero", "three"), ["--zero three: expected whole numbers, as 1,2,4"]),
        (("estimate", "--zero", ","), ["--zero ,"]),
        (("estimate", "--zero", "1,,x"), ["--zero 1,,x"]),
        (("estimate", "--gpus", "0"), ["--gpus 0"]),
        (("estimate", "--gpus", "2.5"), ["--gpus 2.5"]),
        (("estimate", "--gpus", "9" * 5000), ["--gpus 999"]),
        (("estimate", "--device", "tpu"), ["--device", "tpu"]),
        (("estimate", "--offload", "disk"), ["--offload", "disk"]),
        (("estimate", "--sequence-length", "long"), ["--sequence-length", "BF16PROF_SEQUENCE_LENGTH", "integer"]),
        (("estimate", "--sequence-length", "0"), ["--sequence-length: workload.sequence_length"]),
        (("estimate", "--sequence-length", "513"), ["workload.sequence_length (513) is longer than model.max_sequence_length (512)"]),
        (("estimate", "--set", "nonsense"), ["--set 'nonsense': expected section.key=value"]),
        (("estimate", "--set", "model.bogus=1"), ["--set: model.bogus: unknown key"]),
        (("estimate", "--set", "workload.data=cloud"), ["unknown data 'cloud'"]),
        (("estimate", "--set"), ["--set"]),
        (("estimate", "--hf-config", "none.json"), ["cannot read none.json: No such file"]),
        (("estimate", "--hf-config", "/"), ["cannot read /: Is a directory"]),
        (("estimate", "--ds-config", "none.json"), ["cannot read none.json: No such file"]),
        (("estimate", "--model", "train.py"), ["--model: model.factory: expected PACKAGE.MODULE:FUNCTION, got 'train.py'"]),
        (("estimate", "--bogus"), ["--bogus"]),
        (("estimate", "extra"), ["extra"]),
        (("simulacrum",), ["simulacrum"]),
        (("profiles", "show"), ["name"]),
        (("profiles", "show", "gpt5"), ["unknown profile 'gpt5'"]),
        (("recipes", "show", "int8"), ["unknown recipe 'int8'"]),
        (("report", "nowhere"), ["cannot read nowhere/run.json"]),
        (("report", "nowhere", "--fail-over", "few"), ["--fail-over few"]),
        (("report", "nowhere", "--fail-over", "nan"), ["--fail-over nan"]),
        (("report", "nowhere", "--fail-over=-1%"), ["--fail-over -1%"]),
        (("report",), ["RUN"]),
        (("measure", "--steps", "0"), ["--steps"]),
        (("measure", "--fail-over", "x"), ["--fail-over x"]),
        (("measure", "--profile", "gpt5"), ["unknown profile 'gpt5'"]),
        (("estimate", "-o", "x.pdf"), ["x.pdf", ".json, .csv, .md, .html"]),
        (("estimate", "-o", "none/x.csv"), ["none/x.csv", "does not exist"]),
        (("estimate", "-o", "x" * 300 + ".csv"), ["File name too long"]),
        (("estimate", "-o", "/dev/full"), ["/dev/full"]),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(arguments: tuple[str, ...], expected: list[str], main: Main) -> None:
    message = refused(main(*arguments))

    assert all(part in message for part in expected), message


def test_a_case_that_deepspeed_refuses_is_refused_with_recipes_that_work(main: Main) -> None:
    message = refused(main("estimate", "--zero", "0", "--recipe", "bf16-full"))
    assert "zero0-w1-bf16-full" in message
    assert "recipes that work here: bf16-pure" in message

    assert "bf16-master with --offload optimizer" in refused(main("estimate", "--zero", "3", "--recipe", "bf16-master"))
    assert main("estimate", "--zero", "3", "--recipe", "bf16-master", "--offload", "optimizer")[0] == 0


@pytest.mark.parametrize(
    ("error", "code"),
    [(Bf16profError, 1), (InputError, 2), (Refused, 2), (RunFailed, 3), (ToleranceExceeded, 4)],
)
def test_every_error_has_its_exit_code(error: type[Bf16profError], code: int, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise error("it\nbroke", hint="mend \x1b[31mit")

    monkeypatch.setattr(predict, "predict", fail)

    assert main("estimate") == (code, "", "bf16prof: it\\nbroke\n  hint: mend \\x1b[31mit\n")


def program_whose_prediction_runs(statement: str) -> Result:
    """`bf16prof estimate` in a process of its own, some other code in the place of the prediction."""
    source = (
        "import os, signal, sys, bf16prof.cli, bf16prof.estimate.predict as p\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts background jobs with SIGINT ignored
        f"p.predict = lambda *_: {statement}\nsys.argv = ['bf16prof', 'estimate']\nbf16prof.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_is_one_line_and_exit_code_130(number: signal.Signals) -> None:
    result = program_whose_prediction_runs(f"(os.kill(os.getpid(), {number:d}), __import__('time').sleep(5))")

    assert result == (130, "", "bf16prof: interrupted\n")


def test_an_internal_error_is_exit_code_1() -> None:
    code, out, err = program_whose_prediction_runs("1 / 0")

    assert (code, out) == (1, "")
    assert "ZeroDivisionError" in err


def test_measuring_without_torch_is_one_line_and_a_hint(tmp_path: Path) -> None:
    blocker = (
        "import sys\nclass Blocker:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'deepspeed'):\n            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    (tmp_path / "sitecustomize.py").write_text(blocker)

    done = program("measure", cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})

    assert "torch" in refused((done.returncode, done.stdout, done.stderr))
    assert "bf16prof doctor" in done.stderr
    assert not (tmp_path / "runs").exists()


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
    """The published 25.74 and 16.17 GiB (DeepSpeedExamples training/bf16_master_weight), to 0.2 %; the peaks 31.38 and 18.93 to 1 %."""
    recipes = "bf16-fp32-master,bf16-full-autocast"
    arguments = ("--profile", "deepspeed-bf16-example", "--zero", "3", "--gpus", "4", "--recipe", recipes, "--json")

    code, out, _ = main("estimate", *arguments)

    assert code == 0
    baseline, low = json.loads(out)["records"]
    assert baseline["case"] == {
        "profile": "deepspeed-bf16-example", "zero_stage": 3, "world_size": 4, "recipe": "bf16-fp32-master", "offload": "none",
    }  # fmt: skip
    assert baseline["parameters"] == low["parameters"] == 6_858_007_633
    assert baseline["allocated_bytes"] / 2**30 == pytest.approx(25.74, rel=0.002)
    assert low["allocated_bytes"] / 2**30 == pytest.approx(16.17, rel=0.002)
    assert sum(baseline["components"].values()) == baseline["allocated_bytes"]
    assert baseline["run_peak_allocated_bytes"] / 2**30 == pytest.approx(31.38, rel=0.01)
    assert low["run_peak_allocated_bytes"] / 2**30 == pytest.approx(18.93, rel=0.01)
    assert [baseline["peak_phase"], low["peak_phase"]] == ["step", "backward"]
    for record in (baseline, low):
        assert [record["reserved_bytes"], record["step_time_s"]] == [None, None]


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
    assert files[2].read_text().startswith("|")
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
        (("--hf-config", "tiny-llama/config.json"), "tiny-llama"),
        (("--hf-config", "other.json"), "other"),
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


def test_a_configuration_in_the_root_is_called_by_its_stem() -> None:
    (name, _, setting) = request._named_model("hf_config", Path("/config.json"), "--hf-config")

    assert (name.key, name.value) == ("name", "config")
    assert (setting.key, setting.value) == ("model.hf_config", "/config.json")


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
    """Logits of 2 micro-batches, or of 1, in bf16: the only bytes of ZeRO-0 that depend on the number of ranks."""
    ds = ("--ds-config", ds_json(folder, train_batch_size=4, gradient_accumulation_steps=2, bf16={"enabled": True}), "--gpus", "1,2")

    records = json.loads(main("estimate", "-p", "cpu-demo", "--device", "cpu", "--json", *ds)[1])["records"]

    assert [r["components"]["activations"] for r in records] == [n * 128 * (257 * 2 + 16) + 2 for n in (2, 1)]


def test_a_precision_that_is_no_recipe_has_a_case_of_its_own(folder: Path, main: Main) -> None:
    autocast = {"enabled": True, "dtype": "bfloat16"}

    message = refused(main("estimate", "--gpus", "2", "--ds-config", ds_json(folder, bf16={"enabled": True}, torch_autocast=autocast)))

    assert "zero0-w2-ds-config: no closed form: the DeepSpeed JSON describes a precision that is no recipe's" in message


def test_measuring_a_hugging_face_model_without_transformers_is_one_line(folder: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from bf16prof.measure import accelerator

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
    assert refused(main("recipes", "list", "--run", str(tmp_path / "none"))).startswith("bf16prof: cannot read")


def test_a_recipe_without_the_library_that_runs_it_is_one_line(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    from bf16prof.measure import accelerator

    monkeypatch.setattr(accelerator, "package_version", lambda name: None if name == "torch-optimi" else "1")

    for command in ("measure", "simulate"):
        message = refused(main(command, "--zero", "0", "--recipe", "bf16-kahan"))
        assert "bf16-kahan (optimi.AdamW) needs torch-optimi, which is not installed" in message
        assert "pip install 'bf16prof[recipes]'" in message
    assert main("estimate", "--zero", "0", "--recipe", "bf16-kahan")[0] == 0


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


# Reports of runs.


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    whole = fixtures.run()
    runs.save(runs.Run(folder, whole.manifest, whole.records))
    return folder


def test_a_report_reconciles_and_writes_the_page_into_the_run(run_folder: Path, main: Main) -> None:
    code, out, err = main("report", run_folder)

    assert code == 0
    assert (run_folder / "report.html").is_file()
    assert f"wrote {run_folder / 'report.html'}" in err
    assert out


@pytest.mark.parametrize(("tolerance", "code"), [("1%", 4), ("0.01", 4), ("40%", 0), ("0.4", 0)])
def test_the_tolerance_of_a_report(tolerance: str, code: int, run_folder: Path, main: Main) -> None:
    """The fixture's reserved memory is 1.4 times the allocated; the estimates of allocated are exact but one, 1,200 bytes off."""
    records = list(fixtures.run().records)
    records[0] = type(records[0])(**{**vars(records[0]), "peak_allocated_bytes": int((records[1].peak_allocated_bytes or 0) * 1.1)})
    runs.save(runs.Run(run_folder, fixtures.run().manifest, tuple(records)))

    found, _, err = main("report", run_folder, "--fail-over", tolerance)

    assert found == code
    assert (code == 0) == ("allowed" not in err)
    assert (run_folder / "report.html").is_file(), "the report is written before the verdict"


def test_json_of_a_report_has_comparisons(run_folder: Path, main: Main) -> None:
    code, out, _ = main("report", run_folder, "--json")

    document = json.loads(out)
    assert code == 0
    assert document["comparisons"][0]["quantity"] == "allocated_bytes"
    assert document["comparisons"][0]["errors"] == {"estimate": 0.0}


def test_two_runs_make_one_report_that_is_not_overwritten(run_folder: Path, main: Main, tmp_path: Path) -> None:
    both = tmp_path / "both.html"

    assert main("report", run_folder, run_folder, "-o", both)[0] == 0
    assert "the file exists" in refused(main("report", run_folder, run_folder, "-o", both))
    assert main("report", run_folder, run_folder, "-o", both, "--force")[0] == 0


def test_a_damaged_run_is_one_line_that_names_file_and_field(run_folder: Path, main: Main) -> None:
    content = json.loads((run_folder / "records.json").read_text())
    content["records"][3]["parameters"] = "many"
    (run_folder / "records.json").write_text(json.dumps(content))

    assert f"{run_folder / 'records.json'}: records.3.parameters: " in refused(main("report", run_folder))


# Planning.

PLAN = (
    "plan",
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
    assert "zero2-w4-bf16-fp32-master" in files[2].read_text()
    assert "zero2-w4-bf16-fp32-master" in files[3].read_text()
    assert runs.load_records(files[0])
    assert err.startswith("next: bf16prof simulate --profile gpt2-xl --zero ")


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
    for word in ("tokens/s", "bf16-fp32-master", "micro-batch", "fp32 master", "At the training peak", "upper bound"):
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
    arguments = ("plan", "-p", "llama3-8b", "--gpu", "l4-24gb", "--gpus", "1", "--zero", "2", "--recipe", "bf16-full", "--offload", "none")

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
    assert said in refused(main("plan", "-p", "gpt2-xl", *arguments))


def test_several_numbers_of_gpus_are_one_table(main: Main) -> None:
    code, out, err = main(*PLAN, "--gpus", "1,2,4")

    assert code == 0
    assert "by the number of GPUs" in out
    assert "nothing fits" in out  # on one
    assert "zero2-w4-bf16-fp32-master" in out
    assert err.startswith("next: ")


def test_the_micro_steps_of_a_deepspeed_json_are_kept(main: Main, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 4, "bf16": {"enabled": True}}))

    _, out, _ = main(*PLAN, "--ds-config", path, "--json")

    assert {plan["gradient_accumulation_steps"] for plan in json.loads(out)["plans"]} == {4}
