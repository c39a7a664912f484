"""Who hangs where, as ranks have written it themselves."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from bf16prof.runs import where_file
from bf16prof.vocabulary import Phase
from bf16prof.whereabouts import WIDTH, Where, Whereabouts, hanging, read_where, where_they_were

THREAD = "\n\nThread 0x1 (most recent call first):\n"
WAITS = THREAD + '  File "/p/deepspeed/comm/comm.py", line 5 in all_reduce\n  File "t.py", line 9 in <module>\n'
COMPUTES = THREAD + '  File "/home/u/model.py", line 35 in forward\n  File "t.py", line 9 in <module>\n'


def rank(folder: Path, number: int, phases: int, stack: str = "") -> None:
    """A rank that has entered so many phases of its first step, and the stack that it hangs in."""
    whereabouts = Whereabouts(folder, number, None)
    for phase in list(Phase)[:phases]:
        whereabouts.enter(phase, 0)
    with where_file(folder, number).open("a") as stream:
        stream.write(stack)


def test_phases_are_words(tmp_path: Path) -> None:
    whereabouts = Whereabouts(tmp_path, 0, None)
    assert read_where(tmp_path, 0) == Where(0, 0, "starting")

    said = []
    for phase, step in ((Phase.INIT, 0), (None, 0), (Phase.FORWARD, 3), (Phase.BACKWARD, 3)):
        whereabouts.enter(phase, step)
        said.append(read_where(tmp_path, 0).what)
    whereabouts.say("x" * 500)

    assert said == ["in init", "between steps, after step 0", "in forward of step 3", "in backward of step 3"]
    assert where_file(tmp_path, 0).stat().st_size == WIDTH


def test_the_rank_that_has_come_least_far_hangs(tmp_path: Path) -> None:
    for number, phases in enumerate((4, 3, 4)):
        rank(tmp_path, number, phases)

    assert where_they_were(hanging(tmp_path, [0, 1, 2])) == "rank 1 was in backward of step 0"
    assert where_they_were(hanging(tmp_path, [0, 2])) == "ranks 0 and 2 were in the optimizer's part of step 0"
    assert where_they_were(hanging(tmp_path, [0, 3])) == "rank 3 was not there yet"
    assert where_they_were(hanging(tmp_path, [])) == ""


def test_who_waits_for_others_does_not_hang(tmp_path: Path) -> None:
    """However far the others have come: in a collective operation they wait."""
    rank(tmp_path, 0, 3, WAITS)
    rank(tmp_path, 1, 3, COMPUTES)
    rank(tmp_path, 2, 2, WAITS)

    assert where_they_were(hanging(tmp_path, [0, 1, 2])) == "rank 1 was in backward of step 0 (model.py, line 35 in forward)"


def test_the_line_is_one_of_the_users_own(tmp_path: Path) -> None:
    """Also where it waits inside of a library, however deep; with none of its own, it is the
    innermost of all."""
    library = '  File "/x/site-packages/torch/autograd/graph.py", line 9 in backward\n'
    rank(tmp_path, 0, 3, THREAD + library + '  File "/home/u/train.py", line 31 in main\n  File "/home/u/run.py", line 2 in <module>\n')
    rank(tmp_path, 1, 3, THREAD + library)

    assert [read_where(tmp_path, number).place for number in (0, 1)] == [" (train.py, line 31 in main)", " (graph.py, line 9 in backward)"]


def test_what_a_rank_has_forked_says_nothing(tmp_path: Path) -> None:
    program = (  # a process of its own: one that has mapped more than there is memory, as a tester may, cannot fork
        "import os, pathlib, sys\nfrom bf16prof.vocabulary import Phase\nfrom bf16prof.whereabouts import Whereabouts\n"
        "whereabouts = Whereabouts(pathlib.Path(sys.argv[1]), 0, None)\n"
        "if not (child := os.fork()):\n    whereabouts.enter(Phase.STEP, 7)\n    os._exit(0)\nos.waitpid(child, 0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)

    assert read_where(tmp_path, 0).what == "starting"


@pytest.mark.parametrize(("count", "names"), [(2, "0 and 1"), (4, "0, 1, 2 and 3"), (9, "0, 1, 2, 3 and 5 more")])
def test_of_many_some_are_named(count: int, names: str) -> None:
    assert where_they_were([Where(number, 0, "in init") for number in range(count)]) == f"ranks {names} were in init"


def test_a_rank_writes_its_stack_in_time(tmp_path: Path) -> None:
    program = (
        "import pathlib, sys, time\nfrom bf16prof.whereabouts import Whereabouts\n"
        "where = Whereabouts(pathlib.Path(sys.argv[1]), 0, time.monotonic())\ndef hangs():\n    sys.stdin.read()\nhangs()\n"
    )
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE) as process:
        deadline = time.monotonic() + 60
        while not (found := read_where(tmp_path, 0)).stack and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
        process.communicate()

    assert (found.what, found.place) == ("starting", " (<string>, line 5 in hangs)")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe" * 50, b"what is this", b"7"])
def test_what_is_garbled_says_nothing(content: bytes, tmp_path: Path) -> None:
    where_file(tmp_path, 0).write_bytes(content)

    assert read_where(tmp_path, 0).stack == ()


def test_where_nothing_can_be_written_the_rank_goes_on(tmp_path: Path) -> None:
    whereabouts = Whereabouts(tmp_path / "missing", 0, time.monotonic() + 60)
    whereabouts.enter(Phase.INIT, 0)

    assert read_where(tmp_path / "missing", 0).what == "not there yet"


@pytest.mark.parametrize("deadline", [float("inf"), 1e18, None])
def test_a_rank_that_nobody_will_end_writes_no_stack(tmp_path: Path, deadline: float | None) -> None:
    Whereabouts(tmp_path, 0, deadline)

    assert read_where(tmp_path, 0) == Where(0, 0, "starting")
