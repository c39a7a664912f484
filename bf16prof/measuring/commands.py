"""What is typed to start the agents of a case: by ssh, pdsh or srun, or here."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bf16prof.measuring.places import Layout, Place, Starter
from bf16prof.measuring.surroundings import UNWANTED_VARIABLES
from bf16prof.processes import PARENT_VARIABLE
from bf16prof.profiles.secrets import is_secret

CARRIED = (
    "BF16PROF_", "CUDA_", "CUBLAS", "CXX", "DS_", "GLOO_", "HF_", "LD_LIBRARY_PATH", "MLFLOW", "MV2", "NCCL_", "NVIDIA_", "OMP_", "PATH",
    "PYTHON", "PYTORCH_", "TOKENIZERS_", "TORCH", "TRANSFORMERS_", "UCX", "XDG_CACHE_HOME",
)  # fmt: skip
"""What the variables begin with that ssh and pdsh have to carry along: DeepSpeed's own
(launcher/runner.py, EXPORT_ENVS) and ours."""

AGENT = ("-m", "bf16prof.measuring.agent")


PER_TASK = ("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK",
            "SLURM_TRES_PER_TASK")  # fmt: skip
"""What an allocation says of its tasks, and srun would take for the one agent of each node."""

SSH_OPTIONS = ("-o", "BatchMode=yes", "-o", "ServerAliveInterval=30")
"""Never ask for a password, and notice when a host is gone."""

_NODE = "NUMBER-OF-NODE"


@dataclass(frozen=True)
class Command:
    """A command that starts the agents of these nodes. `holds_stdin`: they end when our end of
    their stdin is closed."""

    words: list[str]
    nodes: tuple[int, ...]
    holds_stdin: bool = False


def local_command(folder: Path, ranks: int) -> list[str]:
    """All ranks of a case, on this machine."""
    return [sys.executable, *AGENT, str(folder), str(ranks)]


def agent_command(folder: Path, node: int | str) -> list[str]:
    """The ranks of one node, on that node."""
    return [sys.executable, *AGENT, str(folder.resolve()), "--node", str(node)]


def commands(starter: Starter, folder: Path, layout: Layout) -> list[Command]:
    """What starts the agents of a case, as far as nobody else does. Each command dies with this
    process."""
    if starter is Starter.NODES:
        return [Command(agent_command(folder, 0), (0,))]
    hosts = [host.name for host in layout.hosts]
    everyone = tuple(range(len(hosts)))
    if starter is Starter.SRUN:
        return [Command([*_dying(), *srun(hosts), *agent_command(folder, "slurm")], everyone)]
    if starter is Starter.PDSH:
        remote = _remote(agent_command(folder, _NODE)).replace("%", "%%").replace(_NODE, "%n")
        return [Command([*_dying(), "pdsh", "-S", "-R", "ssh", "-f", "1024", "-w", ",".join(hosts), remote], everyone)]
    return [
        Command([*_dying(), *ssh(host), _remote([*agent_command(folder, node), "--while-stdin"])], (node,), holds_stdin=True)
        for node, host in enumerate(hosts)
    ]


def on_first_node(place: Place) -> Callable[[list[str]], list[str]]:
    """What makes of a command one that runs it on the first node of a place."""
    host = place.hosts[0].name
    if place.starter is Starter.SRUN:
        return lambda words: [*srun([host]), *words]
    return (lambda words: words) if place.is_here else lambda words: [*ssh(host), _remote(words)]


def ssh(host: str) -> list[str]:
    """Run something on a host."""
    return ["ssh", *SSH_OPTIONS, host]


def srun(hosts: Sequence[str]) -> list[str]:
    """Run something once on each of these nodes of the allocation, with all of its cores and
    devices, whatever a single task would get."""
    return [
        "env", *(word for name in PER_TASK for word in ("-u", name)),
        "srun", f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}",
        "--cpu-bind=none", "--kill-on-bad-exit=0", "--overlap",
    ]  # fmt: skip


def _dying() -> list[str]:
    """Before a command: it is ended when this process is gone."""
    return [sys.executable, "-m", "bf16prof.measuring.dying"]


def _remote(words: list[str]) -> str:
    """A command for a shell on another host: in this folder, with this environment as far as it
    matters there, and no secrets."""
    variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _is_carried(name, value)]
    return f"cd {shlex.quote(str(Path.cwd()))} && exec env {shlex.join([*variables, *words])}"


def _is_carried(name: str, value: str) -> bool:
    return name.startswith(CARRIED) and name not in (*UNWANTED_VARIABLES, PARENT_VARIABLE) and not is_secret(name, value)
