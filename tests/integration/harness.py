"""bf16prof as its users start it: in a process of its own, watched from outside, and gone with all
its ranks at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bf16prof.measuring.surroundings import UNWANTED_VARIABLES

LIMIT_S = 500
"""Seconds that one command may take, on a machine that does other things as well."""

TINY = (
    "model.hidden_size=66", "model.vocab_size=101", "model.num_layers=3", "model.num_heads=2", "model.intermediate_size=131",
    "workload.data=synthetic", "workload.sequence_length=32", "workload.micro_batch_size=2",
)  # fmt: skip
"""A model of 64,102 parameters whose tensors do not divide evenly among ranks."""

SHORT = (
    *TINY[5:], "optimizer.torch_adam=true", "optimizer.fused=true",
    *(f"deepspeed.zero_optimization.{key}" for key in (
        "reduce_bucket_size=500000", "stage3_prefetch_bucket_size=500000", "stage3_param_persistence_threshold=1000",
    )),
)  # fmt: skip
"""Its workload and what cpu-demo says of the engine, for models that have sizes of their own."""

TEXT = (*TINY, "model.vocab_size=257", "workload.data=pydoc")
"""The same over the bytes of the Python language reference."""

INSIDE = Path(__file__).with_name("inside")
"""Code that runs inside ranks when asked to (see `inside/sitecustomize.py`)."""

Record = dict[str, Any]
"""A record as `--json` prints it."""


@dataclass(frozen=True)
class Finished:
    """How a command ended and what it printed."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> dict[str, Any]:
        """What `--json` printed."""
        found: dict[str, Any] = json.loads(self.stdout)
        return found

    def record(self, source: str, stage: int, recipe: str) -> Record:
        """The one record of that source for that case, of a run that went well."""
        assert self.code == 0, "\n".join([self.stderr, *(case["log_tail"] for case in self.document["cases"])])
        (found,) = (
            r for r in self.document["records"] if (r["source"], r["case"]["zero_stage"], r["case"]["recipe"]) == (source, stage, recipe)
        )
        return dict(found)


def environment(**changes: str) -> dict[str, str]:
    """This environment without what a launcher or a terminal may have left in it; a test that wants
    a model's code traced says so."""
    kept = {key: value for key, value in os.environ.items() if key not in UNWANTED_VARIABLES and not key.startswith("BF16PROF_")}
    return {**kept, "NO_COLOR": "1", "DS_ACCELERATOR": "cpu", "BF16PROF_TRACE": "0", **changes}


def inside(what: str) -> dict[str, str]:
    """The variables that let every rank do something more: see `inside/sitecustomize.py`."""
    return {"PYTHONPATH": str(INSIDE), "INSIDE": what}


def start(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: Path | None = None, before: Sequence[str] = ()
) -> subprocess.Popen[str]:
    """Start `bf16prof ARGUMENTS` and do not wait. `before`: what is typed before it, and becomes
    it."""
    return subprocess.Popen(
        [*before, sys.executable, "-m", "bf16prof", *arguments],
        env=environment(**(env or {})),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509 - there are no threads here
    )


def finish(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> Finished:
    """Wait for the end of a command; end it and everything it started when it takes too long, or
    when the test does."""
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
    except BaseException:
        end(process)
        raise
    return Finished(process.returncode, stdout, stderr)


def bf16prof(*arguments: str, env: Mapping[str, str] | None = None) -> Finished:
    """Run `bf16prof ARGUMENTS` to its end."""
    return finish(start(*arguments, env=env))


def measure_arguments(folder: Path, *arguments: str, sets: Sequence[str] = TINY, warmup: int = 1, steps: int = 2) -> list[str]:
    """The arguments of `bf16prof measure` for a small model into that folder."""
    return [
        "measure", *(word for value in sets for word in ("--set", value)),
        "--warmup", str(warmup), "--steps", str(steps), "--timeout", "120", "--output-dir", str(folder), *arguments,
    ]  # fmt: skip


def measure(
    folder: Path, *arguments: str, sets: Sequence[str] = TINY, warmup: int = 1, steps: int = 2, env: Mapping[str, str] | None = None
) -> Finished:
    """Run `bf16prof measure --json` for a small model to its end."""
    return bf16prof(*measure_arguments(folder, "--json", *arguments, sets=sets, warmup=warmup, steps=steps), env=env)


def end(process: subprocess.Popen[str]) -> None:
    """Kill a command and everything it started."""
    family = descendants(process)
    process.kill()
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    process.communicate()


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Every process that this one has started, directly or not, and that lives."""
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; a zombie that nobody has buried does not."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def wait_for(what: str, happened: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait until something has happened; an assertion fails if it does not."""
    deadline = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < deadline, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)


def read_json(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Training:
    """A command that is training: its process, its run directory, the case that runs, everything it
    started, and its ranks' pids."""

    process: subprocess.Popen[str]
    folder: Path
    case: Path
    family: list[psutil.Process]
    ranks: list[int]

    def gone(self) -> bool:
        """Whether nothing that the command started is alive."""
        return not alive(self.family)


@contextlib.contextmanager
def training(folder: Path, *arguments: str, env: Mapping[str, str] | None = None, world_size: int = 2) -> Iterator[Training]:
    """Start a measurement without end, wait until all ranks have written steps, and leave nothing
    of it behind."""
    process = start(*measure_arguments(folder, "--zero", "1", "--recipe", "bf16-full", *arguments, steps=10**6), env=env)
    family: list[psutil.Process] = []
    try:
        case = folder / f"zero1-w{world_size}-bf16-full"
        files = [case / f"rank{rank}.json" for rank in range(world_size)]

        def trains() -> bool:
            assert process.poll() is None, finish(process)
            return all(file.exists() and read_json(file)["steps"] for file in files)

        wait_for("every rank has written a step", trains)
        family = descendants(process)
        yield Training(process, folder, case, family, [read_json(file)["pid"] for file in files])
    finally:
        end(process)
        for child in alive(family):
            child.kill()


def without_the_second(first: subprocess.Popen[str], second: subprocess.Popen[str], folder: Path) -> Finished:
    """How the first of two nodes ends when the second is killed while both train; of the first's
    own processes none is left.

    `folder`: where the ranks write what they have measured.
    """
    try:
        files = [folder / f"rank{rank}.json" for rank in (0, 1)]
        wait_for("both ranks have written a step", lambda: all(file.exists() and read_json(file)["steps"] for file in files))
        own = descendants(first)
        end(second)
        done = finish(first)
    finally:
        for process in (first, second):
            if process.poll() is None:
                end(process)
    assert alive(own) == []
    return done
