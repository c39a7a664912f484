"""The flags of `measure` that say where ranks run, and the place that they mean together."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bf16prof.cases import check_sizes
from bf16prof.commands import options as o
from bf16prof.errors import InputError

if TYPE_CHECKING:
    from bf16prof.measuring.accelerator import TorchAnswer
    from bf16prof.measuring.places import Place

RanksOption = Annotated[
    str | None,
    typer.Option(
        "--nproc-per-node",
        "--num-gpus",
        show_default=False,
        help="Ranks on each node, as 1,2,4; all GPUs, or 2 on CPU, if not given.",
        rich_help_panel=o.WHERE,
    ),
]
NodesOption = Annotated[int, typer.Option("--nnodes", min=1, help="Nodes; start the same command on each.", rich_help_panel=o.WHERE)]
NodeRankOption = Annotated[
    int | None, typer.Option("--node-rank", min=0, help="The number of this node, from 0.", show_default=False, rich_help_panel=o.WHERE)
]
EndpointOption = Annotated[
    str,
    typer.Option("--rdzv-endpoint", metavar="HOST[:PORT]", help="Where nodes meet: node 0.", show_default=False, rich_help_panel=o.WHERE),
]
HostfileOption = Annotated[
    Path | None, typer.Option("--hostfile", "-H", help="DeepSpeed's hostfile; starts the ranks by ssh.", rich_help_panel=o.WHERE)
]
IncludeOption = Annotated[
    str, typer.Option("--include", "-i", help="Of the hostfile, as host1@host2:0,2.", show_default=False, rich_help_panel=o.WHERE)
]
ExcludeOption = Annotated[
    str, typer.Option("--exclude", "-e", help="Of the hostfile, as host1:0.", show_default=False, rich_help_panel=o.WHERE)
]
LauncherOption = Annotated[
    str,
    typer.Option(
        "--launcher",
        metavar="local|ssh|pdsh|srun|slurm",
        help="What starts the nodes; ssh with a hostfile, srun in a Slurm allocation of several nodes, if not given. slurm submits a job.",
        show_default=False,
        rich_help_panel=o.WHERE,
    ),
]
CPU_RANKS = 2
LAUNCHERS = ("local", "ssh", "pdsh", "srun", "slurm")


@dataclass(frozen=True, kw_only=True)
class PlaceFlags:
    """Where ranks run."""

    ranks: RanksOption = None
    nnodes: NodesOption = 1
    node_rank: NodeRankOption = None
    rdzv_endpoint: EndpointOption = ""
    hostfile: HostfileOption = None
    include: IncludeOption = ""
    exclude: ExcludeOption = ""
    launcher: LauncherOption = ""
    output_dir: o.OutputDirOption = None


def find_place(given: PlaceFlags) -> Place:
    """The place that the flags mean. Raises `InputError` for what does not go together."""
    from bf16prof.measuring.hosts import allocated_hosts
    from bf16prof.measuring.places import LOCAL, Place, Starter

    launcher = given.launcher
    if launcher not in ("", *LAUNCHERS):
        raise InputError(f"--launcher {launcher}: expected one of {', '.join(LAUNCHERS)}")
    endpoint, port = endpoint_and_port(given.rdzv_endpoint)
    if launcher == "slurm":
        return _place_in_allocation(endpoint, port)
    if given.node_rank is not None or given.nnodes > 1:
        return _place_of_nodes(given, endpoint, port)
    if given.hostfile is not None:
        return _place_of_hostfile(given.hostfile, given, endpoint, port)
    if given.include or given.exclude or launcher in ("ssh", "pdsh"):
        raise InputError("--include, --exclude, --launcher ssh and pdsh need a --hostfile")
    if launcher == "srun" or (not launcher and int(os.environ.get("SLURM_NNODES", "1")) > 1):
        hosts = allocated_hosts()
        return Place(Starter.SRUN, hosts, endpoint or hosts[0].name, port)
    return LOCAL


def is_for_a_batch_job(given: PlaceFlags) -> bool:
    """Whether the measurement is to run in a job of Slurm's that has yet to be submitted: in that
    job it is this very command again."""
    return given.launcher == "slurm" and "SLURM_JOB_ID" not in os.environ


def submit(given: PlaceFlags, words: Sequence[str], say: Callable[[str], None]) -> int:
    """Run the command of these words (as they stand after `bf16prof`) in a batch job, and wait; its
    exit code."""
    from bf16prof.claims import new_folder
    from bf16prof.measuring.batch import BatchJob, run

    if given.hostfile is not None or given.node_rank is not None:
        raise InputError("--launcher slurm excludes --hostfile and --node-rank: Slurm chooses the nodes")
    command, *rest = words
    folder = given.output_dir
    if folder is None:
        folder = new_folder("slurm")
        rest = ["--output-dir", str(folder.absolute()), *rest]
    return run(BatchJob((sys.executable, "-m", "bf16prof", command, *rest), given.nnodes, folder.absolute()), say)


def _place_in_allocation(endpoint: str, port: int | None) -> Place:
    """The nodes of the allocation in which this process is; a single one is like any machine."""
    from bf16prof.measuring.hosts import allocated_hosts
    from bf16prof.measuring.places import LOCAL, Place, Starter

    hosts = allocated_hosts()
    return LOCAL if len(hosts) == 1 else Place(Starter.SRUN, hosts, endpoint or hosts[0].name, port)


def _place_of_nodes(given: PlaceFlags, endpoint: str, port: int | None) -> Place:
    from bf16prof.measuring.places import Host, Place, Starter

    nodes, rank = given.nnodes, given.node_rank
    if given.hostfile is not None or given.launcher:
        raise InputError("--nnodes and --node-rank exclude --hostfile and --launcher: the command is started on every node")
    if rank is None or not endpoint or given.output_dir is None:
        raise InputError(
            "--nnodes needs --node-rank, --rdzv-endpoint HOST[:PORT] and --output-dir",
            hint="start the same command on every node, with its --node-rank; the run directory has to be shared between them",
        )
    if rank >= nodes:
        raise InputError(f"--node-rank {rank}: there are {nodes} nodes, from 0")
    return Place(Starter.NODES, (Host(),) * nodes, endpoint, port)


def _place_of_hostfile(path: Path, given: PlaceFlags, endpoint: str, port: int | None) -> Place:
    from bf16prof.measuring.hosts import hostfile_hosts
    from bf16prof.measuring.places import Place, Starter

    if given.launcher in ("local", "srun"):
        raise InputError(f"--launcher {given.launcher} takes no --hostfile")
    hosts = hostfile_hosts(path, given.include, given.exclude)
    return Place(Starter(given.launcher or "ssh"), hosts, endpoint or hosts[0].name, port)


def endpoint_and_port(text: str) -> tuple[str, int | None]:
    """`host:29500` as its parts; the port may be left out. Raises `InputError` for a port that is
    none."""
    if not text:
        return "", None
    host, sign, port = text.rpartition(":")
    if not sign or (":" in host and not host.startswith("[")):  # an IPv6 address without brackets has no port
        return text, None
    if not port.isdecimal() or not 0 < int(port) < 65536 or not host:
        raise InputError(f"--rdzv-endpoint {text}: expected HOST:PORT")
    return host.strip("[]"), int(port)


def sizes(asked: str | None, place: Place, per_node: int) -> list[int]:
    """The numbers of ranks in all: so many on each node for each that was asked for, else all
    devices of a hostfile, else `per_node`."""
    if asked is not None:
        return [count * place.nodes for count in dict.fromkeys(o.numbers("--num-gpus", asked))]
    devices = [len(host.devices) for host in place.hosts if host.devices is not None]
    return [sum(devices) if len(devices) == place.nodes else per_node * place.nodes]


def numbers_of_ranks(asked: str | None, torch: TorchAnswer, place: Place) -> list[int]:
    """The numbers of ranks to run, in all."""
    totals = sizes(asked, place, len(torch.gpus) or CPU_RANKS)
    check_sizes([], totals)
    most = max(ranks for total in totals for ranks in place.layout(total).ranks)
    if torch.gpus and most > len(torch.gpus):
        where = "this machine" if place.is_here else place.hosts[0].name
        raise InputError(f"--num-gpus {most}: torch sees {len(torch.gpus)} on {where}")
    return totals
