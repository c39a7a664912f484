"""Where ranks run: what the flags mean together, how ranks lie on nodes, and what is typed to start
them."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

import pytest

from bf16prof.commands.where import PlaceFlags, endpoint_and_port, find_place, sizes
from bf16prof.errors import InputError
from bf16prof.measuring.commands import PER_TASK, commands, on_first_node
from bf16prof.measuring.places import LOCAL, Host, Layout, Place, Starter
from bf16prof.processes import PARENT_VARIABLE

TWO = (Host("hosta", (0, 1, 2, 3)), Host("hostb", (2, 3)))


def test_without_flags_it_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_NNODES", raising=False)

    assert find_place(PlaceFlags()) == LOCAL
    assert LOCAL.layout(3).ranks == (3,)


def test_nodes_that_others_start_meet_at_the_endpoint(tmp_path: Path) -> None:
    place = find_place(PlaceFlags(nnodes=2, node_rank=1, rdzv_endpoint="hosta:29500", output_dir=tmp_path))

    assert place == Place(Starter.NODES, (Host(), Host()), "hosta", 29500)
    assert place.layout(6).ranks == (3, 3)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"nnodes": 2}, "--nnodes needs --node-rank"),
        ({"nnodes": 2, "node_rank": 0, "rdzv_endpoint": "a"}, "and --output-dir"),
        ({"nnodes": 2, "node_rank": 2, "rdzv_endpoint": "a", "output_dir": Path()}, "--node-rank 2: there are 2 nodes"),
        ({"nnodes": 2, "node_rank": 0, "launcher": "srun"}, "exclude --hostfile and --launcher"),
        ({"rdzv_endpoint": "a:x"}, "--rdzv-endpoint a:x: expected HOST:PORT"),
        ({"rdzv_endpoint": ":1"}, "expected HOST:PORT"),
        ({"launcher": "mpi"}, "--launcher mpi: expected one of local"),
        ({"launcher": "pdsh"}, "need a --hostfile"),
        ({"include": "a"}, "need a --hostfile"),
        ({"launcher": "srun"}, "this is no Slurm allocation"),
        ({"hostfile": Path("/nonexistent")}, "--hostfile /nonexistent: no such file"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_NNODES", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match=said.replace("(", r"\(")) as error:
        find_place(PlaceFlags(**flags))

    assert "\n" not in error.value.message


def test_in_an_allocation_of_several_nodes_srun_starts_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`scontrol` writes out the list of nodes, which has a syntax of its own."""
    program = tmp_path / "scontrol"
    program.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n', encoding="ascii")
    program.chmod(0o755)
    for name, value in {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}.items():
        monkeypatch.setenv(name, value)

    assert find_place(PlaceFlags()) == Place(Starter.SRUN, (Host("n1"), Host("n2")), "n1")
    assert find_place(PlaceFlags(launcher="local")) == LOCAL


def test_an_endpoint_may_have_a_port() -> None:
    assert [endpoint_and_port(text) for text in ("", "a", "a:1", "[::1]:80", "fe80::1")] == [
        ("", None), ("a", None), ("a", 1), ("::1", 80), ("fe80::1", None),
    ]  # fmt: skip


def test_numbers_of_ranks_are_those_of_each_node() -> None:
    of_slots = Place(Starter.SSH, TWO, "hosta")

    assert sizes("1,2,2", of_slots, 8) == [2, 4]
    assert sizes(None, of_slots, 8) == [6], "all slots of the hostfile"
    assert sizes(None, Place(Starter.SRUN, (Host("a"), Host("b"))), 8) == [16]
    assert sizes("2,4", LOCAL, 8) == [2, 4]


def test_ranks_lie_on_the_devices_that_were_named() -> None:
    place = Place(Starter.SSH, TWO, "hosta")
    whole, part = place.layout(6), place.layout(2)

    assert (whole.ranks, whole.visible(0), whole.visible(1)) == ((4, 2), (0, 1, 2, 3), (2, 3))
    assert (part.ranks, part.visible(1)) == ((1, 1), (2,))
    with pytest.raises(InputError, match="5 ranks cannot be spread evenly over 2 nodes"):
        place.layout(5)
    with pytest.raises(InputError, match="4 ranks on each node: hostb has 2"):
        place.layout(8)


def test_a_layout_is_read_as_it_was_written(tmp_path: Path) -> None:
    layout = Place(Starter.SSH, TWO, "hosta", 7).layout(6)
    layout.save(tmp_path)

    assert Layout.load(tmp_path) == layout


def test_ssh_carries_what_matters_there_and_no_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hf_" + "a" * 34
    for name, value in {"NCCL_DEBUG": "a b;'c", "HF_TOKEN": secret, "MY_TOKEN": secret, "RANK": "3", PARENT_VARIABLE: "1"}.items():
        monkeypatch.setenv(name, value)
    first, second = commands(Starter.SSH, tmp_path, Place(Starter.SSH, TWO, "hosta").layout(6))

    *_, host, remote = second.words
    words = shlex.split(remote)
    assert (first.nodes, second.nodes, host, second.holds_stdin) == ((0,), (1,), "hostb", True)
    assert words[:4] == ["cd", str(Path.cwd()), "&&", "exec"]
    assert "NCCL_DEBUG=a b;'c" in words
    assert not [word for word in words if secret in word or word.startswith(("RANK=", PARENT_VARIABLE))]
    assert words[-4:] == [str(tmp_path), "--node", "1", "--while-stdin"]


def test_pdsh_numbers_the_nodes_and_reads_no_percent_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_DEBUG_FILE", "log.%h")
    (command,) = commands(Starter.PDSH, tmp_path, Place(Starter.PDSH, TWO, "hosta").layout(6))

    assert command.words[-3:-1] == ["-w", "hosta,hostb"]
    assert command.words[-1].endswith("--node %n")
    assert "NCCL_DEBUG_FILE=log.%%h" in command.words[-1]
    assert command.nodes == (0, 1)


def test_srun_starts_one_agent_on_each_node_whatever_a_task_would_get(tmp_path: Path) -> None:
    place = Place(Starter.SRUN, (Host("n1"), Host("n2")), "n1")
    (command,) = commands(Starter.SRUN, tmp_path, place.layout(4))

    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2"} <= set(command.words)
    assert all(name in command.words for name in PER_TASK)
    assert command.words[-2:] == ["--node", "slurm"]
    assert on_first_node(place)(["x"])[-1] == "x"
    assert "--nodes=1" in on_first_node(place)(["x"])
    assert on_first_node(LOCAL)(["x"]) == ["x"]
