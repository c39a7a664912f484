"""One measurement on two hosts: network namespaces of this machine, each with its own name and
address, and a cable between them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import end, finish, measure_arguments, start

from bf16prof.runs import load

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

NAMES = ("hosta", "hostb")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
ENTERED = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
"""What a shell does in a namespace before a command: the host gets its name, and knows both."""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[list[str]]]:
    """For each host, what is typed before a command that runs on it."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip (iproute2) and unshare")
    spaces = [f"bf16prof-{os.getpid()}-{name}" for name in NAMES]
    known = tmp_path / "hosts"
    known.write_text("".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, NAMES, strict=True)) + "127.0.0.1 localhost\n")
    try:
        try:
            for space in spaces:
                ip("netns", "add", space)
            ip("-n", spaces[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for space, address in zip(spaces, ADDRESSES, strict=True):
            ip("-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                ip("-n", space, "link", "set", link, "up")
        yield [
            ["ip", "netns", "exec", space, "unshare", "--uts", "--mount", "sh", "-c", ENTERED, name, str(known)]
            for space, name in zip(spaces, NAMES, strict=True)
        ]
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True)


def test_two_hosts_on_a_network_are_one_run(tmp_path: Path, hosts: list[list[str]]) -> None:
    where = ("--zero", "3", "--recipe", "bf16-full", "--num-gpus", "1", "--rdzv-endpoint", NAMES[0], "--nnodes", "2", "--json")
    env = {"GLOO_SOCKET_IFNAME": "eth0"}
    processes = [
        start(*measure_arguments(tmp_path / "run", *where, "--node-rank", str(node), warmup=3), env=env, before=before)
        for node, before in enumerate(hosts)
    ]
    try:
        done, followed = [finish(process) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                end(process)

    measured, predicted = (done.record(source, 3, "bf16-full") for source in ("measure", "estimate"))
    assert followed.code == 0, followed.stderr
    assert measured["components"] == predicted["components"]
    assert [(rank["node"], rank["host"]) for rank in measured["ranks"]] == list(enumerate(NAMES))
    assert [node.host for node in load(tmp_path / "run").manifest.nodes] == list(NAMES)
