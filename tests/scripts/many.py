"""Many scripts at the price of one import: they are run by `forks.py`, and what became of them is
read here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from bf16prof.dry_run.runner import Files
from bf16prof.dry_run.script.task import ScriptTask
from bf16prof.files import write_json
from bf16prof.records import MemoryRecord
from bf16prof.runs import load_records
from bf16prof.scripts.command import read_script

HERE = Path(__file__).parent
STEPS = 5
H100 = "h100-80gb"


def dry(folder: Path, words: Sequence[str], gpu: str | None, steps: int = STEPS) -> dict[str, object]:
    """The job of a dry run in that folder, as rank 0 of two."""
    folder.mkdir(parents=True)
    write_json(Files(folder, 0).task, ScriptTask(read_script(words), 2, 0, gpu, steps))
    return {"kind": "dry", "folder": str(folder)}


def run_all(root: Path, jobs: Sequence[dict[str, object]]) -> None:
    """Run jobs of `forks.py`, one after the other."""
    (root / "jobs").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    words = [sys.executable, str(HERE / "forks.py"), str(root / "jobs")]
    subprocess.run(words, check=True, cwd=root, env={**os.environ, "PYTHONPATH": str(HERE)})


def record(folder: Path) -> MemoryRecord:
    """The record of a dry run."""
    path = Files(folder, 0).record
    assert path.exists(), (folder / "log").read_text()[-3000:]
    return load_records(path)[0]
