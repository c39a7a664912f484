"""The driver's view of the GPU that a script uses, from its first engine to the last step that is
watched: as for our own ranks."""

from __future__ import annotations

import contextlib
from typing import Any


class DeviceView:
    """Samples by NVML beside a script. On a CPU, and without NVML, it sees nothing."""

    def __init__(self, device_type: str) -> None:
        self._is_gpu = device_type == "cuda"
        self._running = contextlib.ExitStack()
        self._sampler: Any = None

    def begin(self) -> None:
        """Begin with the device that the script has chosen, once; not before it uses CUDA."""
        from bf16prof.measuring.probes.nvml import NvmlSampler, cuda_uuid
        from bf16prof.measuring.script.probes import is_in_use

        if self._is_gpu and self._sampler is None and is_in_use():
            import torch

            self._sampler = self._running.enter_context(NvmlSampler(cuda_uuid(torch.cuda.current_device())))

    def end(self) -> dict[str, Any]:
        """Stop; what a rank's result says of the device."""
        self._running.close()
        summary = None if self._sampler is None else self._sampler.summary()
        return {} if summary is None else dict(summary.of_a_result())
