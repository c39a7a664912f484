"""One measurement on several nodes: two agents on loopback, started by hand on "both", or by
DeepSpeed's hostfile over a local ssh."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import Finished, alive, bf16prof, end, finish, measure_arguments, read_json, start, wait_for, without_the_second

from bf16prof.runs import Status, load
from bf16prof.vocabulary import Source

pytestmark = pytest.mark.timeout(600)

CASE = "zero3-w2-bf16-full"
LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo"}
ONE_EACH = ("--zero", "3", "--recipe", "bf16-full", "--num-gpus", "1", "--rdzv-endpoint", "127.0.0.1")


def node(folder: Path, number: int, steps: int) -> list[str]:
    """The command of one of two nodes."""
    own = ("--nnodes", "2", "--node-rank", str(number), "--json")
    return measure_arguments(folder, *ONE_EACH, *own, warmup=3, steps=steps)


def require_one_run_on_two_nodes(done: Finished, folder: Path) -> None:
    """Exact to the byte, every rank with the place where it ran, threads by the ranks of a host,
    and nothing left over."""
    measurement, estimate = (done.record(source, 3, "bf16-full") for source in ("measure", "estimate"))
    assert measurement["components"] == estimate["components"]
    assert [(rank["rank"], rank["node"], rank["host"], rank["device"]) for rank in measurement["ranks"]] == [
        (0, 0, os.uname().nodename, "cpu"), (1, 1, os.uname().nodename, "cpu"),
    ]  # fmt: skip
    assert all(rank["phase_time_s"]["forward"] > 0 for rank in measurement["ranks"])
    run = load(folder)
    assert [(each.node, each.host) for each in run.manifest.nodes] == [(0, os.uname().nodename), (1, os.uname().nodename)]
    assert all(each.hardware["cores"] for each in run.manifest.nodes)
    assert not (folder / ".bf16prof.alive").exists()
    assert not (folder / CASE / "stop").exists()


def test_the_same_command_on_each_node_is_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    second = start(*node(folder, 1, steps=2), env=LOOPBACK)
    first = start(*node(folder, 0, steps=2), env=LOOPBACK)
    try:
        done, followed = finish(first), finish(second)
    finally:
        for process in (first, second):
            if process.poll() is None:
                end(process)

    require_one_run_on_two_nodes(done, folder)
    assert (followed.code, followed.stdout) == (0, "")
    assert f"node 1: {CASE}" in followed.stderr


def test_a_node_that_is_killed_is_named_and_the_other_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    second = start(*node(folder, 1, steps=10**6), env=LOOPBACK)
    first = start(*node(folder, 0, steps=10**6), env=LOOPBACK)
    done = without_the_second(first, second, folder / CASE)

    assert done.code == 3
    assert f"node 1 ({os.uname().nodename}) is gone without a word; rank 0: " in done.stderr
    run = load(folder)
    assert run.manifest.status is Status.FAILED
    (record,) = (record for record in run.records if record.source is Source.MEASURE)
    assert record.notes[0].startswith("partial: failed: node 1")


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables with which `ssh NAME` reaches this machine through a server of our own, whatever
    the name."""
    server = shutil.which("sshd") or "/usr/sbin/sshd"
    if not Path(server).exists() or not shutil.which("ssh") or not shutil.which("ssh-keygen"):
        pytest.skip("no ssh server here")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where a server that root starts looks for it
    home = tmp_path / "ssh"
    home.mkdir()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / key)], check=True)
    port = _free_port()
    (home / "server").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/user.pub\nPidFile none\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\n",
        encoding="utf-8",
    )
    (home / "client").write_text(
        f"Host *\n HostName 127.0.0.1\n Port {port}\n IdentityFile {home}/user\n IdentitiesOnly yes\n"
        f" StrictHostKeyChecking no\n UserKnownHostsFile /dev/null\n LogLevel ERROR\n",
        encoding="utf-8",
    )
    (home / "bin").mkdir()
    (home / "bin" / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {home}/client "$@"\n', encoding="utf-8")
    (home / "bin" / "ssh").chmod(0o755)
    with subprocess.Popen([server, "-D", "-f", str(home / "server")], stderr=subprocess.DEVNULL) as process:
        try:
            reach = [str(home / "bin" / "ssh"), "hosta", "true"]
            wait_for("the server answers", lambda: subprocess.run(reach, check=False, capture_output=True).returncode == 0, 20)
            yield {**LOOPBACK, "PATH": f"{home / 'bin'}:{os.environ['PATH']}"}
        finally:
            process.kill()


def _free_port() -> int:
    from bf16prof.measuring.waiting import free_port

    return free_port()


def hostfile(folder: Path) -> list[str]:
    """The flags of a hostfile of two hosts, and of one that is left out."""
    path = folder / "hostfile"
    path.write_text("# ours\nhosta slots=1\nhostb slots=1\nhostc slots=4\n", encoding="utf-8")
    return ["--hostfile", str(path), "--exclude", "hostc"]


def test_a_hostfile_starts_its_hosts_by_ssh(tmp_path: Path, hosts: dict[str, str]) -> None:
    folder = tmp_path / "run"
    where = ("--zero", "3", "--recipe", "bf16-full", "--json", "--rdzv-endpoint", "127.0.0.1", *hostfile(tmp_path))
    done = bf16prof(*measure_arguments(folder, *where, warmup=3, steps=2), env=hosts)

    require_one_run_on_two_nodes(done, folder)


@pytest.mark.nightly
def test_a_script_runs_on_the_hosts_of_a_hostfile(tmp_path: Path, hosts: dict[str, str]) -> None:
    script = Path(__file__).parents[1] / "scripts" / "corpus" / "plain_engine.py"
    where = ("--rdzv-endpoint", "127.0.0.1", "--output-dir", str(tmp_path / "run"), *hostfile(tmp_path))
    done = bf16prof("measure", "--json", *where, "--", str(script), "--stage", "3", env=hosts)

    assert done.code == 0, done.stderr
    (record,) = done.document["records"]
    assert (record["case"]["world_size"], record["case"]["zero_stage"]) == (2, 3)
    assert [rank["node"] for rank in record["ranks"]] == [0, 1]


def test_nothing_on_other_hosts_outlives_a_killed_command(tmp_path: Path, hosts: dict[str, str]) -> None:
    folder = tmp_path / "run"
    where = ("--zero", "3", "--recipe", "bf16-full", "--rdzv-endpoint", "127.0.0.1", *hostfile(tmp_path))
    process = start(*measure_arguments(folder, *where, steps=10**6), env=hosts)
    try:
        files = [folder / CASE / f"rank{rank}.json" for rank in (0, 1)]
        wait_for("both ranks have written a step", lambda: all(file.exists() and read_json(file)["steps"] for file in files))
        remote = [p for p in psutil.process_iter() if str(folder) in " ".join(_command_line(p)) and p.pid != process.pid]
        assert len(remote) >= 4, "two agents and two ranks"
        process.kill()
        wait_for("all of them are gone", lambda: not alive(remote), 20)
    finally:
        end(process)


def _command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.parametrize(
    ("text", "more", "said"),
    [
        ("hosta slots=1\n", ("--include", "hostz"), "Hostname 'hostz' not found in hostfile"),
        ("-oProxyCommand=true slots=1\n", (), "is no host's name"),
    ],
)
def test_a_hostfile_is_read_by_deepspeed_and_refused_as_it_does(tmp_path: Path, text: str, more: tuple[str, ...], said: str) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text, encoding="utf-8")
    done = bf16prof("measure", "--hostfile", str(path), *more)

    assert done.code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
