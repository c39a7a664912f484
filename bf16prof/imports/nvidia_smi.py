"""`nvidia-smi --query-gpu=timestamp,index,name,memory.used,utilization.gpu,power.draw
--format=csv`, in a loop or once.

A column is a query's name with its unit in brackets; values repeat the unit unless `nounits` was
asked for. Memory is that of the whole device, of every process and of the driver, in whole MiB.
NVIDIA does not say how these are rounded, so less than one MiB in either direction is left open.

Without a header (`--format=csv,noheader`) columns are known by their content: units, time stamps,
names; of two columns of memory the one that is never smaller is the total, and the other is taken
to be what is used, which is said.
"""

from __future__ import annotations

import csv
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from bf16prof.imports.finding import MIB, NUMBER, Finding, Reading, known

UNITS = {"memory.used": "MiB", "utilization.gpu": "%", "power.draw": "W"}
"""The columns whose values are used, with their units."""

IDENTITY = ("uuid", "pci.bus_id", "gpu_bus_id", "index", "gpu_uuid")
"""Columns that tell one GPU from another, the best first."""

_VALUE = re.compile(rf"({NUMBER})(?: (?:MiB|%|W))?")
_MISSING = re.compile(r"\[?(?:N/A|Not Supported|Not Available|Unknown Error|Insufficient Permissions|GPU is lost)\]?", re.IGNORECASE)

_NUMBER_OF = r"\d{1,9}(?:\.\d{1,4})?"
_KINDS = (
    ("MiB", re.compile(r"\d{1,8} MiB")),
    ("utilization.gpu", re.compile(r"\d{1,3} %")),
    ("power.draw", re.compile(rf"{_NUMBER_OF} W")),
    ("timestamp", re.compile(r"\d{4}[/-]\d\d[/-]\d\d[ T][\d:.]{5,16}")),
    ("uuid", re.compile(r"GPU-[0-9a-fA-F-]{8,40}")),
    ("pci.bus_id", re.compile(r"(?:[0-9A-Fa-f]{4,8}:)?[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d")),
    ("number", re.compile(r"\d{1,8}")),
    ("name", re.compile(r"[A-Za-z][\w /.-]{3,60}")),
)
"""What a column of a CSV without header holds, by the form of its cells."""

_LOOKED_AT = 200
"""So many rows are looked at to find that out."""

_SMALLEST_MIB, _KINDS_OF_GPU = 2000, 4
"""No GPU that trains has less memory, and no file has more sizes of it."""


def names(header: Sequence[str]) -> list[str]:
    """The names of columns without their units; empty when the header is not one of nvidia-smi's
    that is of use here."""
    found = [re.sub(r" \[\S+\]$", "", cell.strip()) for cell in header]
    return found if any(name in UNITS for name in found) else []


@dataclass
class GpuSamples:
    """The samples of one GPU."""

    name: str | None = None
    samples: dict[str, list[float]] = field(default_factory=dict)

    @property
    def used(self) -> float:
        """The most memory that was used, in MiB."""
        return max(self.samples.get("memory.used", []), default=-1.0)

    def add(self, name: str, value: float) -> None:
        """One more sample of a quantity of `UNITS`."""
        self.samples.setdefault(name, []).append(value)


def device_finding(format_: str, devices: Mapping[str, GpuSamples], more: Sequence[str]) -> Finding | None:
    """What samples say of the GPU that holds most, by its number or whatever tells it from the
    others."""
    if not devices:
        return None
    worst = max(devices, key=lambda name: devices[name].used)
    device = devices[worst]
    means = {name: statistics.fmean(values) for name, values in device.samples.items() if values}
    utilisation = means.get("utilization.gpu")
    facts = known(gpu=device.name, gpu_utilisation=None if utilisation is None else utilisation / 100, power_w=means.get("power.draw"))
    notes = [f"of GPU {worst}, which holds most of {len(devices)}"] if len(devices) > 1 else []
    readings = {}
    if device.used >= 0:
        readings["device_bytes"] = _whole_mib(int(device.used))
        notes.append("memory is that of the whole device, of all processes and of the driver")
    return Finding(format_, readings, facts, notes=tuple(f"{format_}: {note}" for note in (*notes, *more)))


def guessed_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The names of the columns of a CSV without header, by their content; empty when it is not one
    of nvidia-smi's.

    Numbers without units are believed only where two columns are memory: one that is the same in
    all rows of a GPU and never smaller.
    """
    rows = [[cell.strip() for cell in row] for row in rows if row][:_LOOKED_AT]
    if not rows or len({len(row) for row in rows}) != 1:
        return []
    columns = [_kind([row[n] for row in rows]) for n in range(len(rows[0]))]
    memory = [n for n, kind in enumerate(columns) if kind == "MiB"]
    if not memory and (pair := _plain_memory(rows, columns)):
        memory = list(pair)
    if not memory:
        return []
    totals = [n for n in memory if all(_mib(row[n]) >= _mib(row[m]) for row in rows for m in memory)]
    used = next((n for n in memory if n not in totals[-1:]), memory[0]) if len(memory) > 1 else memory[0]
    names = [kind if kind in (*UNITS, *IDENTITY, "name", "timestamp") else f"column {n + 1}" for n, kind in enumerate(columns)]
    names[used] = "memory.used"
    if len(memory) > 1 and totals:
        names[totals[-1]] = "memory.total"
    if "index" not in names and (counted := _index(rows, columns, memory)) is not None:
        names[counted] = "index"
    return names


def _kind(cells: Sequence[str]) -> str:
    """What all cells of a column are: a name of nvidia-smi's, "MiB", "number" or nothing."""
    known_cells = [cell for cell in cells if not _MISSING.fullmatch(cell)]
    for kind, pattern in _KINDS:
        if known_cells and all(pattern.fullmatch(cell) for cell in known_cells):
            return kind
    return ""


def _plain_memory(rows: Sequence[Sequence[str]], columns: Sequence[str]) -> tuple[int, int] | None:
    """Two neighbours of whole numbers without units: the largest of each row, which is a GPU's
    memory in MiB, and one that is no index."""
    numbers = [n for n, kind in enumerate(columns) if kind == "number"]
    largest = [n for n in numbers if all(int(row[n]) >= int(row[m]) for row in rows for m in numbers)]
    sizes = {int(row[n]) for row in rows for n in largest}
    if not largest or min(sizes) < _SMALLEST_MIB or len(sizes) > _KINDS_OF_GPU:
        return None
    total, counted = largest[0], _index(rows, columns, ())
    beside = [n for n in (total - 1, total + 1) if n in numbers and n != counted]
    return (min(beside[0], total), max(beside[0], total)) if beside else None


def _index(rows: Sequence[Sequence[str]], columns: Sequence[str], memory: Sequence[int]) -> int | None:
    """The first column of small whole numbers that count from 0."""
    for n, kind in enumerate(columns):
        if kind == "number" and n not in memory:
            found = {int(row[n]) for row in rows}
            return n if found == set(range(len(found))) else None
    return None


def _mib(cell: str) -> float:
    found = _VALUE.fullmatch(cell)
    return float(found[1]) if found else 0.0


class NvidiaSmiReader:
    """Reads samples of all GPUs."""

    format = "samples of nvidia-smi"

    def __init__(self) -> None:
        self._devices: dict[tuple[str, str], GpuSamples] = {}
        self._unused: dict[str, None] = {}
        self._guessed: dict[str, None] = {}

    def rows(self, lines: Iterable[str], origin: str) -> tuple[int, int]:
        """Read a file, its header first; how many rows were understood, and how many were not."""
        rows = csv.reader(lines)
        return self.table(names(next(rows)), rows, origin)

    def headless(self, rows: Iterable[Sequence[str]], columns: Sequence[str], origin: str) -> tuple[int, int]:
        """Read a file without header, whose columns were guessed."""
        self._guessed[", ".join(columns)] = None
        return self.table(columns, rows, origin)

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[str]], origin: str) -> tuple[int, int]:
        """Read rows with these columns; how many were understood, and how many were not."""
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
        more = [f"without a header: columns are taken for {columns}" for columns in self._guessed]
        more += [f"not used: {', '.join(list(self._unused)[:10])}"] if self._unused else []
        one_file = len({origin for origin, _ in self._devices}) == 1
        named = {identity if one_file else f"{identity} in {origin}": device for (origin, identity), device in self._devices.items()}
        return device_finding(self.format, named, more)

    def _sample(self, cells: dict[str, str], key: tuple[str, str]) -> bool:
        values: dict[str, float] = {}
        for name in UNITS:
            text = cells.get(name, "")
            found = _VALUE.fullmatch(text)
            if found:
                values[name] = float(found[1])
            elif name in cells and not _MISSING.fullmatch(text):
                return False
        device = self._devices.setdefault(key, GpuSamples())
        device.name = cells.get("name") or device.name
        for name, value in values.items():
            device.add(name, value)
        return True


def _whole_mib(mib: int) -> Reading:
    """Less than one MiB above or below."""
    return Reading.between(max(0, (mib - 1) * MIB + 1), (mib + 1) * MIB - 1)
