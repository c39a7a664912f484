"""How the ranks of a job share its work: the extents of a mesh, whose product is the number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

FLAGS: Mapping[str, str] = MappingProxyType({"sequence": "--sp", "tensor": "--tp"})
"""The dimensions beside data that ranks can share, and the flag of each."""

MOST_RANKS = 2**20


@dataclass(frozen=True)
class Parallelism:
    """So many ranks share each dimension.

    * `data`: groups of ranks with sequences of their own.
    * `sequence`: ranks that share each sequence, cut along its tokens (DeepSpeed's Ulysses).
    * `tensor`: ranks that share each layer's weights (DeepSpeed's AutoTP).
    """

    data: int
    sequence: int = 1
    tensor: int = 1

    @property
    def tail(self) -> str:
        """What a case's label says of it: `-sp2`, or nothing where all ranks are data parallel."""
        return "".join(f"-{FLAGS[name].removeprefix('--')}{size}" for name, size in self._others())

    @property
    def is_data_only(self) -> bool:
        """Whether every rank has sequences of its own and whole layers."""
        return not self._others()

    @property
    def words(self) -> str:
        """For a person: `2 data x 4 sequence`; empty where all ranks are data parallel."""
        others = self._others()
        return " x ".join(f"{size} {name}" for name, size in [("data", self.data), *others]) if others else ""

    def _others(self) -> list[tuple[str, int]]:
        return [(name, size) for name, size in asdict(self).items() if name != "data" and size > 1]
