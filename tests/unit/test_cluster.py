"""What `doctor` says of clusters: host name, interfaces, locks of shared folders, launchers."""

from __future__ import annotations

import errno
import fcntl
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from bf16prof.measuring import cluster
from bf16prof.measuring.findings import State

NFS = SimpleNamespace(mountpoint="/shared", fstype="nfs4")


def interfaces(monkeypatch: pytest.MonkeyPatch, **addresses: str) -> None:
    """Give this machine these interfaces, all of them up."""
    known = {name: [SimpleNamespace(family=socket.AF_INET, address=address)] for name, address in addresses.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: known)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: SimpleNamespace(isup=name != "down0") for name in known})
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)


def named(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr(cluster, "own_address", lambda: address)


def test_a_name_that_does_not_resolve_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "no-such-host.invalid")

    assert cluster.host_name().status is State.WARNING
    assert "/etc/hosts" in cluster.host_name().hint


def test_a_name_that_resolves_is_shown_with_its_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")

    assert cluster.host_name().detail in ("localhost is 127.0.0.1", "localhost is ::1")


@pytest.mark.parametrize(
    ("address", "gloo"), [("10.0.0.5", "eth0"), ("127.0.1.1", "lo"), ("127.0.0.1", "lo"), ("192.0.2.1", "lo"), (None, "lo")]
)
def test_gloo_takes_the_interface_of_the_hosts_name_if_it_has_one(address: str | None, gloo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, lo="127.0.0.1", eth0="10.0.0.5")
    named(monkeypatch, address)

    assert cluster.gloo_interface() == gloo


@pytest.mark.parametrize(
    ("known", "taken"),
    [
        ({"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"}, "ib0"),
        ({"lo": "127.0.0.1", "docker0": "172.17.0.1", "eth0": "10.0.0.5"}, "eth0"),
        ({"lo": "127.0.0.1", "docker0": "172.17.0.1"}, "docker0"),
        ({"lo": "127.0.0.1", "down0": "10.0.0.5"}, "lo"),
        ({}, None),
    ],
)
def test_nccl_takes_the_first_of_its_order(known: dict[str, str], taken: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, **known)

    assert cluster.nccl_interface() == taken


def test_loopback_is_said_to_reach_this_machine_only(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, lo="127.0.0.1", eth0="10.0.0.5")
    named(monkeypatch, "127.0.1.1")

    found = cluster.network()
    assert found.detail == "gloo takes lo, NCCL eth0: gloo reaches this machine only"
    assert found.hint == "on several nodes: export GLOO_SOCKET_IFNAME=eth0"


def test_an_interface_that_is_asked_for_and_is_not_there_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    interfaces(monkeypatch, lo="127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ens9")

    assert cluster.network().status is State.WARNING
    assert "there is no ens9 here" in cluster.network().detail


@pytest.mark.parametrize(("error", "warned"), [(None, False), (errno.ENOLCK, True), (errno.EWOULDBLOCK, False)])
def test_a_shared_folder_without_locks_is_a_warning(
    error: int | None, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        if error is not None:
            raise OSError(error, "no")

    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [SimpleNamespace(mountpoint=str(tmp_path), fstype="nfs4")])
    monkeypatch.setattr(fcntl, "flock", flock)
    where, warning = cluster.shared_cache(tmp_path)

    assert where == " (nfs4: shared between hosts)"
    assert bool(warning) is warned


def test_a_folder_of_ones_own_is_not_said_to_be_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "disk_partitions", lambda **_: [SimpleNamespace(mountpoint="/", fstype="ext4"), NFS])

    assert cluster.shared_cache(tmp_path) == ("", "")


def test_what_could_start_ranks_elsewhere_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cluster.starters().status is State.MISSING

    (tmp_path / "pdsh").touch(mode=0o755)
    assert cluster.starters().detail == "pdsh"
