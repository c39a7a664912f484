"""How the ranks of a job share its work: the extents of a mesh, whose product is the number of
ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType

FLAGS: Mapping[str, str] = MappingProxyType({"sequence": "--sp", "tensor": "--tp", "pipeline": "--pp", "expert": "--ep"})
"""The dimensions beside data that ranks can share, and the flag of each."""

MOST_RANKS = 2**20


@dataclass(frozen=True)
class Parallelism:
    """So many ranks share each dimension.

    * `data`: groups of ranks with sequences of their own.
    * `sequence`: ranks that share each sequence, cut along its tokens (DeepSpeed's Ulysses).
    * `tensor`: ranks that share each layer's weights (DeepSpeed's AutoTP).
    * `pipeline`: ranks that have some of the layers each (DeepSpeed's PipelineModule).
    * `expert`: data parallel ranks over which the experts of a layer are spread (DeepSpeed's MoE).
      It is no extent of its own.
    """

    data: int
    sequence: int = 1
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def tail(self) -> str:
        """What a case's label says of it: `-sp2`, or nothing where all ranks are data parallel."""
        return "".join(f"-{FLAGS[name].removeprefix('--')}{size}" for name, size in self._others())

    @property
    def is_data_only(self) -> bool:
        """Whether every rank has sequences of its own, whole layers and all experts."""
        return not self._others()

    @property
    def flags(self) -> list[str]:
        """The flags of the dimensions that ranks share."""
        return [FLAGS[name] for name, _ in self._others()]

    @property
    def words(self) -> str:
        """For a person: `2 data x 4 sequence`; empty where all ranks are data parallel."""
        extents = [("data", self.data), *((name, size) for name, size in self._others() if name != "expert")]
        spread = f", experts over {self.expert}" if self.expert > 1 else ""
        return "" if self.is_data_only else " x ".join(f"{size} {name}" for name, size in extents) + spread

    @property
    def of_a_stage(self) -> int:
        """Ranks that have the same layers: a stage's, which follow one another
        (runtime/pipe/topology.py, PipeDataParallelTopology)."""
        return self.data * self.sequence * self.tensor

    def stage(self, rank: int) -> int:
        """Which stage of the pipeline a rank has, from 0."""
        return rank // self.of_a_stage

    def reader(self, rank: int) -> int:
        """Which of the `data` batches a rank works on; those that share one follow one another
        within a stage."""
        return rank % self.of_a_stage // (self.sequence * self.tensor)

    def _others(self) -> list[tuple[str, int]]:
        return [(name, size) for name, size in asdict(self).items() if name != "data" and size > 1]
