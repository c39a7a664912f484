"""The ranks of a script meet at torchrun's store, whatever port the script names, and whoever has
that port."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from bf16prof.measuring.script.meeting import at_torchrun

dist: Any = torch.distributed
c10d: Any = distributed_c10d
"""Typed, it exports nothing of its own."""

ELSEWHERE = "29500"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """What torchrun has open, and tells its ranks of."""
    found = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(found.port), "RANK": "1", "WORLD_SIZE": "2"}
    for name, value in {**said, "TORCHELASTIC_USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(name, value)
    yield found


@pytest.mark.parametrize(
    ("url", "more"), [("env://", {}), (f"tcp://127.0.0.1:{ELSEWHERE}", {"rank": 1, "world_size": 2})], ids=["variables", "address"]
)
def test_the_port_that_a_script_names_is_not_used(store: Any, url: str, more: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    with at_torchrun(notes.append):
        monkeypatch.setenv("MASTER_PORT", ELSEWHERE)
        found, rank, world_size = next(c10d.rendezvous(url, **more))
        assert os.environ["MASTER_PORT"] == ELSEWHERE
    found.set("here", "yes")

    assert (store.get("here"), rank, world_size) == (b"yes", 1, 2)
    assert notes == [f"the ranks met at a port of torchrun's, not at {ELSEWHERE}, which the script names"]


def test_nothing_is_said_where_the_script_names_none(store: Any) -> None:
    notes: list[str] = []
    with at_torchrun(notes.append):
        next(c10d.rendezvous("env://"))

    assert notes == []


def test_a_meeting_of_others_stays_where_it_is(store: Any) -> None:
    """As of processes that a script starts itself."""
    own = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with at_torchrun(lambda _: None):
        found, _, world_size = next(c10d.rendezvous(f"tcp://127.0.0.1:{own.port}", 0, 1))
    found.set("there", "yes")

    assert (own.get("there"), world_size) == (b"yes", 1)
