"""`nvidia-smi --query-gpu=timestamp,index,name,memory.used,utilization.gpu,power.draw --format=csv`, in a loop or once.

A column is a query's name with its unit in brackets; values repeat the unit unless `nounits` was asked for. Memory is that of the whole
device, of every process and of the driver, in whole MiB. NVIDIA does not say how these are rounded, so less than one MiB in either
direction is left open.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from bf16prof.imports.finding import NUMBER, Finding, Reading, known

MIB = 2**20
UNITS = {"memory.used": "MiB", "utilization.gpu": "%", "power.draw": "W"}
"""The columns whose values are used, with their units."""

IDENTITY = ("uuid", "pci.bus_id", "gpu_bus_id", "index", "gpu_uuid")
"""Columns that tell one GPU from another, the best first."""

_VALUE = re.compile(rf"({NUMBER})(?: (?:MiB|%|W))?")
_MISSING = re.compile(r"\[?(?:N/A|Not Supported|Not Available|Unknown Error|Insufficient Permissions|GPU is lost)\]?", re.IGNORECASE)


def names(header: Sequence[str]) -> list[str]:
    """The names of columns without their units; empty when the header is not one of nvidia-smi's that is of use here."""
    found = [re.sub(r" \[\S+\]$", "", cell.strip()) for cell in header]
    return found if any(name in UNITS for name in found) else []


@dataclass
class _Device:
    """The samples of one GPU."""

    name: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """The most memory that was used, in MiB."""
        return max(self.samples.get("memory.used", []), default=-1.0)


class NvidiaSmiReader:
    """Reads samples of all GPUs."""

    format = "samples of nvidia-smi"

    def __init__(self) -> None:
        self._devices: dict[tuple[str, str], _Device] = {}
        self._unused: dict[str, None] = {}

    def rows(self, lines: Iterable[str], origin: str) -> tuple[int, int]:
        """Read a file, its header first; how many rows were understood, and how many were not."""
        rows = csv.reader(lines)
        columns = names(next(rows))
        identity = next((name for name in IDENTITY if name in columns), "")
        self._unused |= dict.fromkeys(c for c in columns if c not in (*UNITS, *IDENTITY, "name", "timestamp"))
        good = bad = 0
        for row in rows:
            cells = dict(zip(columns, (cell.strip() for cell in row), strict=False))
            if len(row) != len(columns) or not self._sample(cells, (origin, cells.get(identity, ""))):
                bad += bool(row)
                continue
            good += 1
        return good, bad

    def finding(self) -> Finding | None:
        """What the samples say of the GPU that holds most."""
        if not self._devices:
            return None
        device = max(self._devices.values(), key=lambda d: d.used)
        means = {name: statistics.fmean(values) for name, values in device.samples.items() if values}
        utilisation = means.get("utilization.gpu")
        facts = known(gpu=device.name, gpu_utilisation=None if utilisation is None else utilisation / 100, power_w=means.get("power.draw"))
        notes = [f"of the one of {len(self._devices)} GPUs that holds most"] if len(self._devices) > 1 else []
        readings = {}
        if device.used >= 0:
            readings["device_bytes"] = _whole_mib(int(device.used))
            notes.append("memory is that of the whole device, of all processes and of the driver")
        notes += [f"not used: {', '.join(list(self._unused)[:10])}"] if self._unused else []
        return Finding(self.format, readings, facts, notes=tuple(f"{self.format}: {note}" for note in notes))

    def _sample(self, cells: dict[str, str], key: tuple[str, str]) -> bool:
        values: dict[str, float] = {}
        for name in UNITS:
            text = cells.get(name, "")
            found = _VALUE.fullmatch(text)
            if found:
                values[name] = float(found[1])
            elif name in cells and not _MISSING.fullmatch(text):
                return False
        device = self._devices.setdefault(key, _Device())
        device.name = cells.get("name") or device.name
        for name, value in values.items():
            device.samples.setdefault(name, []).append(value)
        return True


def _whole_mib(mib: int) -> Reading:
    """Less than one MiB above or below."""
    return Reading.between(max(0, (mib - 1) * MIB + 1), (mib + 1) * MIB - 1)
