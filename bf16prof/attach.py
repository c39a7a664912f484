"""Attach to a job that somebody else launches: `torchrun ... -m bf16prof.attach -d RUN train.py
--its args`, under any launcher.

Each process runs the script as it is, and writes what it saw as one rank file into the run
directory; nothing is launched. `bf16prof report RUN` joins the ranks.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bf16prof.errors import Bf16profError, InputError
from bf16prof.scripts.command import read_script
from bf16prof.started_by import rank_variables

FOLDER_VARIABLE = "BF16PROF_OUTPUT_DIR"
"""Stands for `--output-dir`, where a launcher passes on variables more easily than arguments."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one rank; the script's own exit code, and 2 where it cannot be run at all."""
    from bf16prof.measuring.results import GuestTask
    from bf16prof.measuring.script.running import run_attached

    own, words = _split(list(sys.argv[1:] if arguments is None else arguments))
    try:
        given = _parser().parse_args(own)
        if given.output_dir is None:
            raise InputError("--output-dir is missing", hint=f"all ranks write into one run directory; {FOLDER_VARIABLE} stands for it")
        os.environ.update(rank_variables())
        task = GuestTask(read_script(words), given.warmup, given.steps, given.stop)
        return run_attached(task, given.output_dir, replace=given.force)
    except Bf16profError as error:
        sys.stderr.write(f"bf16prof: {error.message}\n" + (f"  hint: {error.hint}\n" if error.hint else ""))
        return error.exit_code


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Our own arguments and the script with its own: what begins with the first word that is
    neither a flag of ours nor a value of one.

    DeepSpeed's launcher puts a `--local_rank` before everything, which is meant for the script.
    """
    own: list[str] = []
    given: list[str] = []
    while arguments and arguments[0].startswith("-") and arguments[0] not in ("--", "-m"):
        flag = arguments.pop(0)
        if flag.startswith(LOCAL_RANK):
            given.append(flag)
            continue
        own.append(flag)
        if "=" not in flag and flag in VALUES and arguments:
            own.append(arguments.pop(0))
    words = arguments[1:] if arguments[:1] == ["--"] else arguments
    name = 2 if words[:1] == ["-m"] else 1
    return own, [*words[:name], *given, *words[name:]]


LOCAL_RANK = ("--local_rank=", "--local-rank=")
VALUES = ("-d", "--output-dir", "--output_dir", "--warmup", "--steps")


def _parser() -> argparse.ArgumentParser:
    usage = "LAUNCHER -m bf16prof.attach -d RUN [options] SCRIPT ARGUMENTS... (or: ... -m MODULE ARGUMENTS...)"
    parser = argparse.ArgumentParser("bf16prof.attach", usage=usage, description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    folder = os.environ.get(FOLDER_VARIABLE)
    parser.set_defaults(output_dir=Path(folder) if folder else None)
    parser.add_argument("-d", "--output-dir", "--output_dir", type=Path, help=f"the run directory, or {FOLDER_VARIABLE}")
    parser.add_argument("--warmup", type=int, default=3, help="steps that are watched closely, before those that are timed (3)")
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed; the script runs on as if nobody were there (10)")
    parser.add_argument("--stop", action="store_true", help="end the script after these steps")
    parser.add_argument("--force", action="store_true", help="replace the result of this rank in the run directory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
