"""What a process takes of a GPU beside the caching allocator: the CUDA context and NCCL's buffers.
Assumptions, not derivations.

The context's is the highest that public messages show for GPUs of the same generation
(`beside.toml`), so that what fits here fits there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from bf16prof.profiles.shipped import shipped_table
from bf16prof.records import Item
from bf16prof.vocabulary import Component

GENERATIONS = {(7, 0): "Volta", (7, 5): "Turing", (8, 0): "Ampere", (8, 6): "Ampere", (8, 9): "Ada", (9, 0): "Hopper"}
"""NVIDIA's architectures by compute capability; from 10 on it is Blackwell."""

NCCL_CHANNELS = 16
NCCL_BUFFER_BYTES = 4 * 2**20
"""`NCCL_BUFFSIZE`: NCCL's documentation gives 4 MiB as its default."""
NCCL_PEERS = 2
"""A ring sends to one peer and receives from another."""


@dataclass(frozen=True)
class Pair:
    """What one public message says of a process: sizes as printed, in GiB and MiB. `total_gib`: 0
    where it does not say it."""

    gpu: str
    generation: str
    process_gib: float
    allocated_gib: float
    unallocated_mib: float
    source: str
    total_gib: float = 0.0
    ranks: int = 1

    @property
    def beside_bytes(self) -> int:
        """What the process holds outside the allocator."""
        return round((self.process_gib - self.allocated_gib) * 2**30 - self.unallocated_mib * 2**20)


@functools.cache
def pairs() -> tuple[Pair, ...]:
    """Every message of the collection."""
    return tuple(Pair(**row) for row in shipped_table("beside.toml")["pairs"])


def generation_of(capability: tuple[int, int]) -> str:
    """NVIDIA's name of the architecture; the capability itself where there is none."""
    return "Blackwell" if capability[0] >= 10 else GENERATIONS.get(capability, "{}.{}".format(*capability))


def context(capability: tuple[int, int] | None) -> Item:
    """The CUDA context with PyTorch's kernels and workspaces, on a GPU of that compute capability
    (`None`: not known)."""
    generation = generation_of(capability) if capability else "this GPU"
    seen = [pair for pair in pairs() if pair.ranks == 1]
    own = [pair for pair in seen if pair.generation == generation]
    sizes = sorted(pair.beside_bytes for pair in own or seen)
    low, high = (round(size / 2**20) for size in (sizes[0], sizes[-1]))
    where = f"{generation}, highest of {len(sizes)} public messages"
    if not own:
        where = f"no public message of {generation} known; highest of {len(sizes)} of other GPUs"
    return Item(Component.WORKSPACE, "CUDA context", sizes[-1], f"assumed: {high} MiB ({where}, {low} to {high} MiB)")


def beside_the_allocator(world_size: int, capability: tuple[int, int] | None = None) -> tuple[Item, ...]:
    """What the process holds on the device outside the caching allocator."""
    nccl = NCCL_CHANNELS * NCCL_PEERS * NCCL_BUFFER_BYTES
    source = f"assumed: {NCCL_CHANNELS} channels x {NCCL_PEERS} peers x NCCL_BUFFSIZE (4 MiB)"
    return (context(capability), *([Item(Component.BUFFERS, "NCCL buffers", nccl, source)] if world_size > 1 else []))
