"""A cluster of Slurm's on this machine, without root's files and without systemd: two nodes, each a
daemon with a share of the cores."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")
NODES = ("nodea", "nodeb")
START_S = 30.0

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=5
{nodes}
PartitionName=all Nodes={names} Default=YES State=UP
"""


def missing() -> list[str]:
    """What has to be installed first: Debian's slurmctld, slurmd, slurm-client and munge."""
    return [name for name in DAEMONS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def _write_configuration(folder: Path) -> None:
    port, *ports = free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={each} CPUs=1 RealMemory=4000"
        for name, each in zip(NODES, ports, strict=True)
    )
    text = CONFIGURATION.format(host=socket.gethostname(), port=port, folder=folder, nodes=nodes, names=",".join(NODES))
    (folder / "slurm.conf").write_text(text)
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)
    (folder / "state").mkdir()


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[dict[str, str]]:
    """The daemons, while the block lasts, and the variables by which Slurm's commands find them."""
    folder.chmod(0o755)
    _write_configuration(folder)
    env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf"), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={folder}/munge.key",
        f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed",
    ]  # fmt: skip
    commands = [munge, ["slurmctld", "-D"], *(["slurmd", "-D", "-N", name] for name in NODES)]
    with contextlib.ExitStack() as stack:
        for number, command in enumerate(commands):
            log = stack.enter_context((folder / f"daemon{number}.log").open("wb"))
            daemon = subprocess.Popen(command, env=env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            stack.callback(daemon.wait, 20)
            stack.callback(daemon.terminate)
        deadline = time.monotonic() + START_S
        while not _is_ready(env):
            assert time.monotonic() < deadline, "\n".join(log.read_text(errors="replace")[-1000:] for log in folder.glob("*.log"))
            time.sleep(0.2)
        yield {name: env[name] for name in ("SLURM_CONF", "PATH")}


def _is_ready(env: dict[str, str]) -> bool:
    idle = subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], env=env, capture_output=True, text=True, check=False)
    return idle.stdout.strip() == str(len(NODES))
