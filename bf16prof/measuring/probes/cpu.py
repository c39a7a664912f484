"""Exact memory of a rank on CPU: a counting allocator around PyTorch's own (`allocator.cpp`),
compiled on first use and cached.

Every tensor's bytes are counted when its storage is allocated and freed, on any thread; RSS is no
substitute (it hides frees and counts Python), and the profiler's memory events miss what other
threads free.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

from bf16prof.vocabulary import Device

LIMIT_VARIABLE = "BF16PROF_CPU_MEMORY_LIMIT"
"""Bytes after which the allocator reports out of memory, as a GPU of that size would."""

NAME = "bf16prof_allocator"
SOURCE = Path(__file__).with_name("allocator.cpp")
READ_EVERY_S = 0.002
CALM_READINGS = 10
"""Memory counts as settled when so many readings in a row agree (on a busy machine gloo was seen to
take 4 ms)."""


def compile_allocator() -> Path:
    """Compile the allocator, or find it compiled, in PyTorch's extension cache; the path of the
    shared library.

    Raises `RuntimeError` or `OSError` when there is no C++ compiler (see `bf16prof doctor`).
    """
    from torch.utils import cpp_extension

    return Path(cpp_extension.load(NAME, [str(SOURCE)], is_python_module=False, extra_cflags=["-O2"]))


class CpuProbe:
    """Counts the bytes of the tensors that this process allocates on the CPU from now on."""

    name = "cpu"
    device = Device.CPU
    device_type = "cpu"

    def __init__(self) -> None:
        library = ctypes.PyDLL(str(compile_allocator()))  # a call lets no other thread of Python run, which costs more than a reading
        self._current, self._run_peak, self._take = (
            getattr(library, f"bf16prof_{function}") for function in ("current", "run_peak", "take_phase_peak")
        )
        for function in (self._current, self._run_peak, self._take):
            function.restype = ctypes.c_int64
        library.bf16prof_set_limit(ctypes.c_int64(int(os.environ.get(LIMIT_VARIABLE, "0"))))
        library.bf16prof_install()

    def allocated_bytes(self) -> int:
        """Bytes in live tensors now."""
        return int(self._current())

    def take_phase_peak(self) -> int:
        """The highest since the last call; starts again from now."""
        return int(self._take())

    def run_peak_bytes(self) -> int:
        """The highest since the probe was made."""
        return int(self._run_peak())

    def reserved_bytes(self) -> None:
        """The CPU allocator caches nothing."""
        return

    def retries(self) -> None:
        """The CPU allocator never retries."""
        return

    def free_workspaces(self) -> int:
        """Libraries keep no workspaces in the CPU allocator."""
        return 0

    def settle(self) -> None:
        """Wait until gloo's threads have let go of the tensors of finished collectives, which they
        do some milliseconds late."""
        last, calm = self.allocated_bytes(), 0
        while calm < CALM_READINGS:
            time.sleep(READ_EVERY_S)
            now = self.allocated_bytes()
            calm = calm + 1 if now == last else 0
            last = now

    def synchronize(self) -> None:
        """CPU kernels are done when they return."""
