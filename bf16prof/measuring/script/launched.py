"""One rank of `measure -- SCRIPT`: run by our own agent as `python -m
bf16prof.measuring.script.launched FOLDER`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from bf16prof.measuring.results import GuestTask
from bf16prof.measuring.script.running import run_attached
from bf16prof.processes import die_with_parent
from bf16prof.runs import SCRIPT, read
from bf16prof.whereabouts import deadline


def main() -> int:
    """Run the script that the folder names."""
    die_with_parent()
    folder = Path(sys.argv[1])
    task: GuestTask = read(folder / SCRIPT, GuestTask)
    for name in [name for name in os.environ if name.startswith("BF16PROF_PARENT")]:
        del os.environ[name]
    return run_attached(task, folder.parent, deadline=deadline(), is_launched=True)


if __name__ == "__main__":
    sys.exit(main())
