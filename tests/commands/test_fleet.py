"""Several nodes: a case is whole only when all of them report and all ranks finish, and a node that
does not is named."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bf16prof.measuring import fleet, launcher, waiting
from bf16prof.measuring.commands import Command
from bf16prof.measuring.launcher import RanksOutcome, launch
from bf16prof.measuring.places import Host, Layout, Place, Starter
from bf16prof.measuring.results import RankResult, save_rank
from bf16prof.runs import STOP, Status
from bf16prof.vocabulary import Device

pytestmark = pytest.mark.timeout(60)

PLACE = Place(Starter.SSH, (Host("hosta", (0,)), Host("hostb", (0,))), "hosta")
AGENT = """
import os, sys, time
from pathlib import Path
from bf16prof.measuring.nodes import Reporter
folder, node, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if what == "never":
    sys.exit(255)
reporter = Reporter(folder, node, 1, {"cpu": f"cpu {node}"})
if what == "silent":
    time.sleep(60)
reporter.say(is_ready=True)
if what == "dies":
    os._exit(9)
if what == "works":
    while not (folder / "stop").exists():
        time.sleep(0.05)
    reporter.end(143)
elif what == "cannot compile":
    reporter.end(1, "no compiler")
else:
    reporter.end(int(what))
"""
"""An agent that ends as it is told, and runs no ranks."""

Launched = Callable[..., RanksOutcome]


def rank(number: int, status: Status = Status.FINISHED, message: str = "", at: float | None = None) -> RankResult:
    noticed = message.startswith("RuntimeError: Connection closed")
    return RankResult(
        number, 1, status, Device.CPU, "cpu", host="xy"[number], node=number, parameters=1, message=message, stopped_at=at, noticed=noticed
    )


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Launch a case on two nodes, whose agents do what they are told, beside what ranks have
    written."""
    monkeypatch.setattr(fleet, "FAILING_S", 1.0)

    def call(*what: str, ranks: tuple[RankResult, ...] = (), timeout_s: float = 30.0) -> RanksOutcome:
        def agents(_starter: Starter, folder: Path, _layout: Layout) -> list[Command]:
            return [Command([sys.executable, "-c", AGENT, str(folder), str(n), how], (n,)) for n, how in enumerate(what)]

        monkeypatch.setattr(launcher, "commands", agents)
        for each in ranks:
            save_rank(tmp_path, each)
        return launch(tmp_path, PLACE, 2, timeout_s, lambda _: None)

    return call


def test_a_case_is_finished_when_all_nodes_and_ranks_are(launched: Launched, tmp_path: Path) -> None:
    found = launched("0", "0", ranks=(rank(0), rank(1)))

    assert (found.status, found.message) == (Status.FINISHED, "")
    assert [(node.node, node.hardware) for node in found.nodes] == [(0, {"cpu": "cpu 0"}), (1, {"cpu": "cpu 1"})]
    assert not (tmp_path / STOP).exists(), "nobody had to be told to end"


def test_a_rank_that_is_missing_fails_the_case(launched: Launched) -> None:
    found = launched("0", "0", ranks=(rank(0),))

    assert (found.status, found.message) == (Status.FAILED, "no complete result from rank 1")


def test_a_node_that_never_reports_is_named_and_the_others_are_ended(launched: Launched, tmp_path: Path) -> None:
    found = launched("works", "never")

    assert found.status is Status.FAILED
    assert found.message == "node 1 (hostb) never reported: what started it ended with exit code 255"
    assert (tmp_path / STOP).exists()
    assert found.ranks == (None, None)


def test_a_node_that_nobody_starts_is_named_when_the_time_is_over(launched: Launched) -> None:
    found = launched("works", timeout_s=2.0)

    assert found.status is Status.FAILED
    assert found.message.startswith("node 1 (hostb) never reported: is bf16prof running there, and is ")


def test_a_node_that_is_gone_is_the_cause_of_what_the_others_noticed(launched: Launched) -> None:
    noticed = rank(0, Status.FAILED, "RuntimeError: Connection closed by peer", 5.0)
    found = launched("1", "dies", ranks=(noticed, rank(1, Status.RUNNING)))

    assert found.status is Status.FAILED
    assert found.message.startswith("node 1 (")
    assert "gone" in found.message
    assert found.message.endswith("; rank 0: RuntimeError: Connection closed by peer")


def test_an_agent_says_why_it_could_not_start(launched: Launched) -> None:
    found = launched("works", "cannot compile")

    assert found.message.startswith("node 1 (")
    assert found.message.endswith("): no compiler")


def test_a_rank_that_failed_is_the_cause_whatever_its_nodes_clock_says(launched: Launched) -> None:
    """The clocks of hosts start anywhere: rank 1 failed first, by the wall."""
    found = launched("1", "1", ranks=(rank(0, Status.FAILED, "ValueError: later", 9.0), rank(1, Status.FAILED, "ValueError: first", 8.0)))

    assert (found.status, found.message) == (Status.FAILED, "rank 1: ValueError: first")


def test_a_case_that_takes_too_long_is_ended_on_all_nodes(launched: Launched) -> None:
    found = launched("works", "works", ranks=(rank(0, Status.RUNNING), rank(1, Status.RUNNING)), timeout_s=2.0)

    assert (found.status, found.message) == (Status.TIMEOUT, "not finished after 2 s: ranks 0 and 1 were not there yet")
    assert [node.code for node in found.nodes] == [143, 143]


def test_silence_is_measured_by_ones_own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    silence = waiting.Silence()
    told = []
    for seconds, beat in ((1, 1), (5, 1), (5, 2), (7, 2)):
        now[0] += seconds
        told.append(silence.seconds(beat))

    assert told == [0, 5, 0, 7]


def test_the_heart_of_a_run_beats_while_it_lasts_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "HEARTBEAT_S", 0.01)
    with waiting.heartbeat(tmp_path):
        deadline = time.monotonic() + 30
        while waiting.last_beat(tmp_path) < b"2" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert waiting.last_beat(tmp_path) >= b"2"

    assert list(tmp_path.iterdir()) == []
