"""The command line: flags and help, exit codes and one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import Main, Result, main, program, refused
from typer.testing import CliRunner

import bf16prof
from bf16prof.app import make_app
from bf16prof.closed_form import predict
from bf16prof.errors import Bf16profError, InputError, Refused, RunFailed, ToleranceExceeded

__all__ = ["main"]

# Flags and help.

SELECTORS = {"--profile", "-p", "--zero", "--recipe", "-r", "--offload"}
OVERRIDES = {
    "--sequence-length", "--micro-batch-size", "--gradient-accumulation-steps", "--activation-checkpointing",
    "--no-activation-checkpointing", "--zero-init", "--no-zero-init", "--set", "--seq", "--batch-size", "--gas", "--lora", "--liger",
    "--sp", "--tp", "--pp", "--ep", "--eval-batch-size", "--packed-sequences", "--dpo", "--reward", "--no-reward",
    "--load-in-4bit", "--no-load-in-4bit", "--fused-loss",
}  # fmt: skip
FOREIGN = {"--hf-config", "--download", "--model", "--ds-config", "--training-args", "--optim"}
OUTPUT = {"--json", "--output", "-o", "--force", "--quiet", "-q"}
FLAGS = {
    "estimate": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "subject", "--engine", "--gpus", "--gpu", "--gpus-per-node", "--device", "--calibrate", "--verbose", "-v",
        "--expandable-segments", "--fail-unless-fits", "--figure", "--trace", "--no-trace",
    },
    "measure": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "subject", "--engine",
        "--nproc-per-node", "--num-gpus", "--warmup", "--steps", "--timeout", "--output-dir", "-d", "--fail-over", "--verbose", "-v",
        "--simulate", "--quality", "--figure", "--trace", "--no-trace",
        "--nnodes", "--node-rank", "--rdzv-endpoint", "--hostfile", "-H", "--include", "-i", "--exclude", "-e", "--launcher", "--resume",
    },
    "simulate": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "subject", "--engine", "--gpus", "--gpu", "--device", "--verbose", "-v", "--expandable-segments", "--snapshot",
        "--gpus-per-node", "--fail-unless-fits", "--figure", "--steps", "--rank", "--timeout",
    },
    "import": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "--gpus", "--gpu", "--output-dir", "-d", "--fail-over", "--verbose", "-v", "files", "--figure",
    },
    "explain": SELECTORS | OVERRIDES | FOREIGN | {"--gpus", "--gpu", "--json", "--quiet", "-q", "files"},
    "plan": SELECTORS | OVERRIDES | FOREIGN | OUTPUT | {
        "subject", "--engine", "--gpus", "--gpu", "--gpus-per-node", "--margin", "--expandable-segments", "--micro-batch-limit",
        "--calibrate", "--write", "--verbose", "-v", "--verify", "--no-verify", "--fail-unless-fits", "--trace", "--no-trace",
        "--search-dimensions", "--no-search-dimensions", "--dry-runs",
    },
    "report": OUTPUT | {"--open", "--verbose", "-v", "--fail-over", "runs", "--figure", "--tensorboard", "--wandb"},
    "doctor": {"--json"},
    "cache list": {"--json"},
    "cache clear": {"--quiet", "-q"},
    "profiles list": {"--json"},
    "profiles show": OVERRIDES | {"--json", "--resolved", "name"},
    "recipes list": {"--json", "--run"},
    "recipes show": {"--json", "--run", "name"},
}  # fmt: skip
"""The frozen command line: what is here, people type in scripts. Add to it freely; take nothing
away."""


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that can be run, by its full name."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for part, sub in command.commands.items():
        yield from commands(sub, f"{name} {part}".strip())


app = make_app()
COMMANDS = dict(commands(typer.main.get_command(app)))


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
    result = CliRunner().invoke(app, [*name.split(), "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}, prog_name="bf16prof")

    assert result.exit_code == 0
    examples = result.stdout.partition("Examples:")[2]
    assert len(re.findall(rf"^ bf16prof {name} |^ bf16prof {name}$", examples, re.MULTILINE)) == 2
    exits = " ".join(examples.split())
    assert "Exit codes: 0 ok, 1 internal error, 2 bad input, 3 the run failed, 4 outside --fail-over" in exits
    assert "or not --fail-unless-fits, 130/143/129 interrupted." in exits


@pytest.mark.parametrize("arguments", [("--help",), ("-h",), ("estimate", "-h"), ("profiles", "--help")])
def test_help_is_no_error(arguments: tuple[str, ...], main: Main) -> None:
    code, out, err = main(*arguments)

    assert (code, err) == (0, "")
    assert "Usage: " in out
    assert "Exit codes" in out


def test_without_arguments_there_are_three_lines_to_try(main: Main) -> None:
    code, out, err = main()

    assert (code, err) == (0, "")
    lines = [line.split("   ")[0].split() for line in out.splitlines() if line.startswith("  bf16prof ")]
    assert len(lines) == 3
    for _, name, *flags in lines:
        known = {flag for parameter in COMMANDS[name].params for flag in parameter.opts}
        assert {flag for flag in flags if flag.startswith("-")} <= known


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("columns", [60, 80, 120])
def test_no_flag_of_a_help_page_is_cut_and_no_line_is_too_wide(name: str, columns: int) -> None:
    environment = {"COLUMNS": str(columns), "NO_COLOR": "1"}
    pages = {level: CliRunner().invoke(app, [*name.split(), level], env=environment).stdout for level in ("-h", "--help", "--help-all")}

    for parameter in COMMANDS[name].params:
        for flag in (*parameter.opts, *parameter.secondary_opts):
            assert parameter.param_type_name == "argument" or re.search(rf"{flag}(?![\w-])", pages["--help"]), flag
        assert not parameter.envvar or (parameter.envvar in pages["--help-all"])
    texts = pages["--help"].partition("Examples:")[0].splitlines()
    assert max(map(len, texts)) <= max(columns, 64), "the longest flag takes 64"
    assert len(pages["-h"]) <= len(pages["--help"]) + 80
    assert pages["--help"].count("BF16PROF_") <= 1


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
        (("estimate", "--profile", "gpt5"), ["unknown profile 'gpt5'", "did you mean ", "gpt2-xl"]),
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
        (("estimate", "--hf-config", "/"), ["the folder / has no config.json"]),
        (("estimate", "--ds-config", "none.json"), ["cannot read none.json: No such file"]),
        (("estimate", "--model", "train.py"), ["--model: model.factory: expected PACKAGE.MODULE:FUNCTION, got 'train.py'"]),
        (("estimate", "--bogus"), ["--bogus"]),
        (("estimate", "extra"), ["unknown model 'extra'", "a Hugging Face id", "MODULE:FUNCTION"]),
        (("estimate", "two", "models"), ["models"]),
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
        (("estimate", "-o", "x.jpg"), ["x.jpg", ".json, .csv, .md, .html, .png, .svg, .pdf"]),
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
    """`bf16prof estimate` in a process of its own, some other code in the place of the
    prediction."""
    source = (
        "import os, signal, sys, bf16prof.cli, bf16prof.closed_form.predict as p\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell starts background jobs with SIGINT ignored
        f"p.predict = lambda *_: {statement}\nsys.argv = ['bf16prof', 'estimate']\nbf16prof.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stdout, done.stderr


CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.mark.parametrize("number", CODES)
def test_an_interruption_is_one_line_and_its_exit_code(number: signal.Signals) -> None:
    result = program_whose_prediction_runs(f"(os.kill(os.getpid(), {number:d}), __import__('time').sleep(5))")

    assert result == (CODES[number], "", "bf16prof: interrupted\n")


@pytest.mark.parametrize("number", CODES)
def test_an_interruption_that_somebody_swallows_still_ends_the_program(number: signal.Signals) -> None:
    """As Python does where it happens in a finalizer; the second signal finds the first at work."""
    kill = f"os.kill(os.getpid(), {number:d})"
    source = f"import os\ntry:\n    {kill}\nexcept BaseException:\n    {kill}\n    {kill}"
    code, out, err = program_whose_prediction_runs(f"(exec({source!r}), (_ for _ in ()).throw(__import__('typer').Exit(0)))")

    assert (code, out, err) == (CODES[number], "", "bf16prof: interrupted\n")


def test_an_interruption_that_python_turns_into_another_error_is_one_too() -> None:
    """A class is made at that moment."""
    named = f"type('Name', (), {{'__set_name__': lambda *_: os.kill(os.getpid(), {signal.SIGINT:d})}})"

    assert program_whose_prediction_runs(f"type('Made', (), {{'name': {named}()}})") == (130, "", "bf16prof: interrupted\n")


@pytest.mark.parametrize("number", CODES)
def test_before_anything_is_imported_a_signal_ends_it_in_one_line(number: signal.Signals, tmp_path: Path) -> None:
    """The first library that is imported takes its time."""
    (tmp_path / "typer.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "bf16prof", "estimate"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - there are no threads here
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (CODES[number], "", "bf16prof: interrupted\n")


@pytest.mark.parametrize("number", CODES)
def test_a_signal_after_the_end_changes_no_exit_code(number: signal.Signals) -> None:
    """While Python takes its modules apart, it has no handlers any more: the default would end the
    process by the signal."""
    late = f"type('Late', (), {{'__del__': lambda self, kill=os.kill, pid=os.getpid(): kill(pid, {number:d})}})()"

    assert program_whose_prediction_runs(f"(setattr(sys, 'late', {late}), (_ for _ in ()).throw(__import__('typer').Exit(0)))") == (
        0,
        "",
        "",
    )


def test_what_was_ignored_from_the_start_stays_ignored() -> None:
    """As under nohup."""
    source = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    inner = (
        "import os, signal, sys, bf16prof.cli, bf16prof.closed_form.predict as p\n"
        "p.predict = lambda *_: (os.kill(os.getpid(), signal.SIGHUP), 1 / 0)\nsys.argv = ['bf16prof', 'estimate']\nbf16prof.cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", f"import sys; {source}", "-c", inner], capture_output=True, text=True, check=False)

    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_the_entry_imports_nothing_that_takes_time() -> None:
    source = "import sys, bf16prof.__main__; print(sorted({'typer', 'rich', 'pydantic', 'psutil', 'json'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


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
