"""The table that `nvidia-smi` prints without arguments, once or in a loop: two or three rows for
each GPU,

    |   0  NVIDIA H100 80GB HBM3          On  |   00000000:19:00.0 Off |                    0 |
    | N/A   47C    P0            512W /  700W |   64118MiB /  81559MiB |     98%      Default |

of which the second has the numbers: memory of the whole device, of all processes and of the driver.
Parts of a GPU (MIG) have rows of their own, without power, which are not read.
"""

from __future__ import annotations

import re

from bf16prof.imports.finding import Finding
from bf16prof.imports.nvidia_smi import GpuSamples, device_finding

_NAME = re.compile(
    r"^\s*\|\s{1,6}(\d{1,3})\s{1,4}(\S.{2,60}?)\s{2,}(?:On|Off|N/A)\s*\|\s*(?:[0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d"
)
_NUMBERS = re.compile(
    r"^\s*\|.{1,60}?(\d{1,5}W|N/A|ERR!|Unknown Error)\s*/\s*(?:\d{1,5}W|N/A)\s*\|"
    r"\s*(\d{1,8})MiB\s*/\s*(\d{1,8})MiB\s*\|\s*(\d{1,3}%|N/A)?"
)
_FRAME = re.compile(
    r"^\s*(?:[+|][-=+]{20,}[+|]|\|\s*(?:NVIDIA-SMI \d|GPU {1,4}(?:Name|GI)|Fan {1,2}Temp|Processes:|\s+ID\s+ID\s"
    r"|\s*\|.*\|\s*(?:MIG M\.|Disabled|N/A)\s*\|))"
)
_PROCESS = re.compile(r"^\s*\|\s+\d{1,3}\s+\S+\s+\S+\s+\d{1,10}\s+[CG+]{1,3}\s.*\d+MiB\s*\|$|^\s*\|\s+No running processes found\s+\|$")


class NvidiaSmiTableReader:
    """Reads the rows of all GPUs; samples of one GPU are those under the same number."""

    format = "the table of nvidia-smi"
    marks = ("|", "+-", "+=")

    def __init__(self) -> None:
        self._devices: dict[str, GpuSamples] = {}
        self._named: tuple[str, str] | None = None

    def line(self, text: str) -> int:
        """Read one line."""
        if found := _NAME.search(text):
            self._named = found[1], found[2]
            return 1
        if found := _NUMBERS.search(text):
            self._numbers(found)
            return 1
        return int(_FRAME.match(text) is not None or _PROCESS.match(text) is not None)

    def finding(self) -> Finding | None:
        """What the samples of the GPU that holds most say."""
        return device_finding(self.format, self._devices, ())

    def _numbers(self, found: re.Match[str]) -> None:
        number, name = self._named or (str(len(self._devices)), "")
        self._named = None
        device = self._devices.setdefault(number, GpuSamples())
        device.name = name if name and "..." not in name else device.name
        device.add("memory.used", float(found[2]))
        if found[1].endswith("W"):
            device.add("power.draw", float(found[1][:-1]))
        if (found[4] or "").endswith("%"):
            device.add("utilization.gpu", float(found[4][:-1]))
