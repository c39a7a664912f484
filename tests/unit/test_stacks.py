"""A process that hangs says where, whatever it does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bf16prof.dry_run.script.stacks import place, where

TRIES = 100

HANGS = """\
import sys
from pathlib import Path
from bf16prof.dry_run.script.stacks import answer_into

def train():
    print("ready", flush=True)
    sys.stdin.read()

answer_into(Path(sys.argv[1]))
"""


@pytest.mark.parametrize(
    ("hangs", "line"), [("train()", 7), ("print('ready', flush=True)\nwhile True: pass", 11)], ids=["in a call", "in the module"]
)
def test_a_process_says_where_it_stands(hangs: str, line: int, tmp_path: Path) -> None:
    script, file = tmp_path / "hangs.py", tmp_path / "stack"
    script.write_text(HANGS + hangs)
    with subprocess.Popen([sys.executable, str(script), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        stands = where(process.pid, file)
        for _ in range(TRIES):  # it has printed, and may not have come to the next line yet
            if stands == f"hangs.py:{line}":
                break
            stands = where(process.pid, file)
        process.kill()

    assert stands == f"hangs.py:{line}"
    assert not where(process.pid, tmp_path / "none")


def test_the_phase_is_the_engines() -> None:
    frames = [
        ("/x/site-packages/torch/distributed/distributed_c10d.py", 9, "all_reduce"),
        ("/x/site-packages/deepspeed/runtime/engine.py", 8, "backward"),
        ("/home/me/train.py", 31, "main"),
    ]
    stack = "".join(f'  File "{path}", line {line} in {name}\n' for path, line, name in frames)

    assert place(stack) == "train.py:31 in backward"
    assert not place("")
