"""Where the ranks of a measurement run: on this machine, or on several nodes, and what starts
something on them.

On each node one process of ours (`agent.py`) prepares the node, runs torchrun, and writes down what
happens. Nothing here schedules: agents are started by ssh, pdsh or srun, or by whoever starts
`bf16prof measure` on every node.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.errors import InputError
from bf16prof.files import write_json
from bf16prof.runs import LAYOUT, read
from bf16prof.vocabulary import STRICT, Size


class Starter(StrEnum):
    """What starts the agents: `local` this process, for one machine; `nodes` a bf16prof of each
    node; else the command of that name."""

    LOCAL = "local"
    NODES = "nodes"
    SSH = "ssh"
    PDSH = "pdsh"
    SRUN = "srun"


@dataclass(frozen=True)
class Host:
    """A node: the name under which others reach it (empty: it will say), and the devices that ranks
    may have there.

    `None`: as many as are asked for.
    """

    __pydantic_config__ = STRICT

    name: str = ""
    devices: tuple[Size, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """How one case lies on its nodes, as agents read it: ranks and devices of each node, and where
    the nodes meet.

    `port`: `None` where the first node chooses one that is free, and says it in its report.
    """

    __pydantic_config__ = STRICT

    hosts: tuple[Host, ...]
    ranks: tuple[Size, ...]
    endpoint: str
    port: Size | None = None
    schema_version: int = SCHEMA_VERSION

    def save(self, folder: Path) -> None:
        """Write it into the folder of the case."""
        write_json(folder / LAYOUT, self)

    @classmethod
    def load(cls, folder: Path) -> Layout:
        """Read it. Raises `InputError` for a file that cannot be read."""
        found: Layout = read(folder / LAYOUT, cls)
        return found

    def visible(self, node: int) -> tuple[int, ...] | None:
        """The devices that the ranks of a node may see; `None` where nobody chose."""
        devices = self.hosts[node].devices
        return None if devices is None else devices[: self.ranks[node]]


@dataclass(frozen=True)
class Place:
    """The nodes of a measurement; one without a name is this machine. `endpoint` and `port`: where
    the nodes meet."""

    starter: Starter = Starter.LOCAL
    hosts: tuple[Host, ...] = (Host(),)
    endpoint: str = ""
    port: int | None = None

    @property
    def nodes(self) -> int:
        """How many there are."""
        return len(self.hosts)

    @property
    def is_here(self) -> bool:
        """Whether the first node is this machine."""
        return self.starter in (Starter.LOCAL, Starter.NODES)

    def layout(self, world_size: int) -> Layout:
        """So many ranks on these nodes: on all devices that were named, or as many on each node.

        Raises `InputError` for a number that does not go.
        """
        devices = [len(host.devices) for host in self.hosts if host.devices is not None]
        if len(devices) == self.nodes and sum(devices) == world_size:
            return Layout(self.hosts, tuple(devices), self.endpoint, self.port)
        each, rest = divmod(world_size, self.nodes)
        if rest:
            raise InputError(f"{world_size} ranks cannot be spread evenly over {self.nodes} nodes")
        if devices and each > min(devices):
            raise InputError(f"{each} ranks on each node: {self.hosts[devices.index(min(devices))].name} has {min(devices)}")
        return Layout(self.hosts, (each,) * self.nodes, self.endpoint, self.port)


LOCAL = Place()
