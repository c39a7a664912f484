"""The light commands under every other Python that the package supports (`make pythons`): installed
without torch, from the pins.

Takes the interpreters that it finds (`python3.12`, ... on the PATH or pyenv's); names those that it
does not. Prints a line per version and command; the exit code is 1 where one fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.12", "3.13", "3.14")
COMMANDS = (
    ("estimate", "llama3.1-8b", "--gpus", "8", "--gpu", "h100", "--json"),
    ("plan", "gpt2-xl", "--gpus", "2", "--gpu", "h100", "--zero", "3", "--recipe", "bf16-full", "--json"),
    ("recipes", "list"),
    ("report", "published:deepspeed-bf16-example", "-o", "report.html"),
    ("doctor",),
)


def main() -> int:
    """Try them all; the exit code."""
    has_failed = False
    for version in VERSIONS:
        interpreter = _interpreter(version)
        if interpreter is None:
            sys.stdout.write(f"{version}: not on this machine\n")
            continue
        with tempfile.TemporaryDirectory() as folder:
            has_failed |= not _works(version, interpreter, Path(folder))
    return int(has_failed)


def _interpreter(version: str) -> str | None:
    of_pyenv = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    return str(of_pyenv[-1]) if of_pyenv else shutil.which(f"python{version}")


def _works(version: str, interpreter: str, folder: Path) -> bool:
    """Whether every command leaves with 0 where the package is installed alone."""
    steps = [[interpreter, "-m", "venv", "venv"], ["venv/bin/pip", "install", "-q", "-c", str(ROOT / "constraints.txt"), str(ROOT)]]
    for step in (*steps, *(["venv/bin/bf16prof", *command] for command in COMMANDS)):
        done = subprocess.run(step, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(folder)})
        if done.returncode:
            sys.stdout.write(f"{version}: {' '.join(step)}: exit code {done.returncode}\n{done.stderr[-2000:]}\n")
            return False
        if step not in steps:
            sys.stdout.write(f"{version}: {' '.join(step[1:])}: ok\n")
    return True


if __name__ == "__main__":
    sys.exit(main())
