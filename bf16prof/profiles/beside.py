"""What a process takes of a GPU beside the caching allocator: the CUDA context and NCCL's buffers. Stated assumptions, not derivations."""

from __future__ import annotations

from bf16prof.records import Component, Item

CONTEXT_BYTES = 500 * 2**20
"""The CUDA context with PyTorch's kernels (lazily loaded since CUDA 12): between 300 and 700 MiB, by driver and card."""

NCCL_CHANNELS = 16
NCCL_BUFFER_BYTES = 4 * 2**20
"""`NCCL_BUFFSIZE`: NCCL's documentation gives 4 MiB as its default."""
NCCL_PEERS = 2
"""A ring sends to one peer and receives from another."""


def beside_the_allocator(world_size: int) -> tuple[Item, ...]:
    """What the process holds on the device outside the caching allocator."""
    context = Item(Component.WORKSPACE, "CUDA context", CONTEXT_BYTES, "assumed: 500 MiB")
    nccl = NCCL_CHANNELS * NCCL_PEERS * NCCL_BUFFER_BYTES
    source = f"assumed: {NCCL_CHANNELS} channels x {NCCL_PEERS} peers x NCCL_BUFFSIZE (4 MiB)"
    return (context, Item(Component.BUFFERS, "NCCL buffers", nccl, source)) if world_size > 1 else (context,)
