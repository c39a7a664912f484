"""Small runs of every command with a random fault each, and what each leaves behind: processes,
file handles, temporary files, shared memory, locks, and run directories that nobody can read.

`test_soak.py` makes a few; `make soak` two hundred (`benchmarks/soak.py`).
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from harness import TINY, alive, environment, inside, measure_arguments

from bf16prof.errors import InputError
from bf16prof.locks import is_held
from bf16prof.measuring.shared_memory import SHARED_MEMORY
from bf16prof.runs import LOCK, MANIFEST, Status, load

DATA = Path(__file__).parents[1] / "data"
MARK = "SOAK"
"""A variable that every process of a run inherits: who has its value is of this run, whoever its
parent is."""
LIMIT_S = 600.0
ENOUGH_TO_DIE_S = 5.0
SMALLEST_FILE = 4000
"""Bytes that a file may have on a disk that is full: a log's first lines, and no record."""

CASE = ("--zero", "1", "--recipe", "bf16-full", "--gpus", "2")
LOG = str(DATA / "example-stdout.log")
_SETS = tuple(word for value in TINY for word in ("--set", value))
COMMANDS: dict[str, tuple[str, ...]] = {
    "estimate": ("estimate", "-p", "cpu-demo", *CASE, "-o", "{folder}/out.html"),
    "plan": ("plan", "-p", "cpu-demo", "--gpus", "2", "--gpu", "h100-80gb", "--no-verify", "-o", "{folder}/out.json"),
    "import": ("import", LOG, "-p", "cpu-demo", *CASE, "-d", "{folder}/run"),
    "explain": ("explain", LOG, "-p", "cpu-demo", "--zero", "3", "--recipe", "bf16-full", "--gpus", "4", "--json"),
    "report": ("report", "{folder}/old", "-o", "{folder}/out.html"),
    "simulate": ("simulate", "-p", "cpu-demo", *CASE, *_SETS, "-o", "{folder}/out.json"),
    "measure": ("measure",),
}
SLOW = ("simulate", "measure")
"""Commands that import torch."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong: a signal after a share of the usual time, how the process starts, its
    variables; and exit codes that are right.

    `spoils`: the command cannot end well (`0` is no right answer).
    """

    codes: tuple[int, ...]
    number: signal.Signals | None = None
    starts: Callable[[], object] | None = None
    stdout: str = os.devnull
    env: Mapping[str, str] = field(default_factory=dict)
    only: tuple[str, ...] = tuple(COMMANDS)


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SMALLEST_FILE, SMALLEST_FILE))


def _few_files() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))


RANK_FAULTS = ("raise", "os._exit", "sys.exit", "SIGTERM", "garble", "no memory")
"""What a rank does in its second step (`inside/sitecustomize.py`)."""

FAULTS: dict[str, Fault] = {
    "nothing": Fault((0,)),
    **{n.name: Fault((0, 128 + n), n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)},
    "SIGKILL": Fault((0, -9), signal.SIGKILL),
    "stdout is full": Fault((2,), stdout="/dev/full"),
    "the disk is full": Fault((0, 2, 3), starts=_small_files),
    "few file handles": Fault((0, 2, 3), starts=_few_files, only=("estimate", "plan", "import", "explain", "report")),
    "no folder for temporary files": Fault((0,), env={"TMPDIR": "/nonexistent"}),
    **{f"a rank: {how}": Fault((3,), env=inside(how), only=("measure",)) for how in RANK_FAULTS},
}


@dataclass(frozen=True)
class Soaked:
    """One run: the command, the fault, the exit code, what it said on stderr, and everything that
    is wrong with how it ended."""

    command: str
    fault: str
    code: int
    said: str
    wrong: tuple[str, ...]


def draw(seed: int, slow: float) -> tuple[str, str, float]:
    """A command (a slow one with that probability), a fault that it can have, and when a signal
    comes, as a share of the usual time."""
    rng = random.Random(seed)
    command = rng.choice(SLOW if rng.random() < slow else [name for name in COMMANDS if name not in SLOW])
    fault = rng.choice([name for name, each in FAULTS.items() if command in each.only])
    return command, fault, rng.random()


def soak(seed: int, folder: Path, old_run: Path, usual_s: Mapping[str, float], slow: float = 0.2) -> Soaked:
    """One run in that folder, which is new."""
    return suffer(draw(seed, slow), folder, old_run, usual_s)


def suffer(drawn: tuple[str, str, float], folder: Path, old_run: Path, usual_s: Mapping[str, float]) -> Soaked:
    """One run of a command with a fault at a moment (see `draw`), in that folder, which is new."""
    command, name, moment = drawn
    fault = FAULTS[name]
    folder.mkdir()
    shutil.copytree(old_run, folder / "old")
    temporary = folder / "tmp"
    temporary.mkdir()
    words = [word.format(folder=folder) for word in COMMANDS[command]]
    if command == "measure":
        words = measure_arguments(folder / "run", *CASE[:4], sets=TINY, steps=10**6 if name.startswith("a rank") else 2)
    mark = f"{os.getpid()}-{folder}"
    shared, handles = set(SHARED_MEMORY.iterdir()), psutil.Process().num_fds()
    env = environment(**{MARK: mark, "TMPDIR": str(temporary), **fault.env})
    with Path(fault.stdout).open("w") as stdout, (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "bf16prof", *words], env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
            preexec_fn=lambda: _start(fault),  # noqa: PLW1509 - there are no threads here
        )  # fmt: skip
        if fault.number is not None:
            while process.poll() is None and not _has_begun(process.pid):
                time.sleep(0.005)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment * usual_s.get(command, 1.0))
            process.send_signal(fault.number)
        code = process.wait(LIMIT_S)
    left = _left(mark, temporary if code != -signal.SIGKILL else None, shared)  # who is killed cannot tidy up
    wrong = [*_of_end(code, fault, folder), *left, *_of_runs(folder)]
    if psutil.Process().num_fds() != handles:
        wrong.append(f"{psutil.Process().num_fds() - handles} file handles are left")
    said = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    if not wrong:
        shutil.rmtree(folder)
    return Soaked(command, name, code, said, tuple(wrong))


def _start(fault: Fault) -> None:
    """In the new process. A shell starts background jobs with SIGINT ignored, nohup with SIGHUP,
    and what is ignored stays so."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    if fault.starts is not None:
        fault.starts()


def _has_begun(pid: int) -> bool:
    """Whether the program's own first instructions have run: it catches SIGHUP, which Python does
    not. Before, a signal ends Python."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
        return bool(int(caught.split()[1], 16) >> (signal.SIGHUP - 1) & 1)
    return False


def _of_end(code: int, fault: Fault, folder: Path) -> Iterator[str]:
    text = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
    if code not in fault.codes:
        yield f"exit code {code}, and not one of {fault.codes}: {text[-300:]}"
    if "Traceback" in text:
        yield "a traceback"


def _left(mark: str, temporary: Path | None, shared: set[Path]) -> Iterator[str]:
    """What is left of a run: its processes, its temporary files, its shared memory."""
    deadline = time.monotonic() + ENOUGH_TO_DIE_S
    while (family := alive(list(_of_run(mark)))) and time.monotonic() < deadline:
        time.sleep(0.05)
    yield from (f"process {process.pid} is left: {process.cmdline()}" for process in family)
    for process in family:
        process.kill()
    yield from (f"{path} is left" for path in (temporary.iterdir() if temporary else ()))
    yield from (f"{path} is left" for path in set(SHARED_MEMORY.iterdir()) - shared)


def _of_run(mark: str) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(MARK) == mark:
                yield process


def _of_runs(folder: Path) -> Iterator[str]:
    """Run directories that cannot be read, or that say they go on; hidden files."""
    run = folder / "run"
    if not (run / MANIFEST).exists():
        return
    try:
        if load(run).manifest.status is Status.RUNNING:
            yield "its run goes on for ever"
    except InputError as error:
        yield f"its run cannot be read: {error.message}"
    if is_held(run / LOCK):
        yield "its lock is held"
