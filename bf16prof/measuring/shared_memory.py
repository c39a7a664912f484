"""What ranks leave behind in the shared memory of their host."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")
SHARED_MEMORY_NAMES = "deepspeed_allreduce_buffer_*"
"""DeepSpeed's shared-memory collectives leave these behind (csrc/cpu/comm/shm.cpp), 69 MB a
rank."""


@contextlib.contextmanager
def clean_shared_memory() -> Iterator[None]:
    """Remove from /dev/shm what ranks have left there meanwhile, and nothing that was there
    before."""
    before = set(SHARED_MEMORY.glob(SHARED_MEMORY_NAMES))
    try:
        yield
    finally:
        for path in set(SHARED_MEMORY.glob(SHARED_MEMORY_NAMES)) - before:
            with contextlib.suppress(OSError):
                path.unlink()
