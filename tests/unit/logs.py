"""Logs to import: one that DeepSpeed printed here, one as the published example prints it, and what
is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bf16prof.imports.files import Sources, read_files
from bf16prof.imports.finding import Finding
from bf16prof.imports.record import imported_record
from bf16prof.records import Case, MemoryRecord

DATA = Path(__file__).parents[1] / "data"
EXAMPLE = DATA / "example-stdout.log"
"""Two of four ranks, laid out as train.py prints; the bytes are those of the dry run of the
published case under DeepSpeed 0.18.4."""

BREAKDOWN = DATA / "deepspeed-breakdown.log"
"""stdout of two gloo ranks under DeepSpeed 0.19.8, ZeRO-2, two micro-steps a step, memory_breakdown
and wall_clock_breakdown on."""

SAMPLES = """\
timestamp, index, name, memory.used [MiB], memory.total [MiB], utilization.gpu [%], power.draw [W]
2025/12/19 10:00:01.123, 0, NVIDIA H100 80GB HBM3, 38912 MiB, 81559 MiB, 97 %, 612.33 W
2025/12/19 10:00:01.123, 1, NVIDIA H100 80GB HBM3, 38500 MiB, 81559 MiB, 95 %, [N/A]
2025/12/19 10:00:02.123, 0, NVIDIA H100 80GB HBM3, 39012 MiB, 81559 MiB, 99 %, 600.00 W
2025/12/19 10:00:02.123, 1, NVIDIA H100 80GB HBM3, 38500 MiB
"""
LOSSES = "step,loss\n0,10.98828125\n1,10.5\n2,nan\n5,9.1015625\n"


def written(folder: Path, *texts: str | bytes) -> list[Path]:
    """Each text in a file of its own."""
    paths = [folder / f"log{number}" for number in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    return paths


def read(folder: Path, *texts: str | bytes) -> Sources:
    """What these texts say together."""
    return read_files(written(folder, *texts))


def only(folder: Path, *texts: str | bytes) -> Finding:
    """The one finding of these texts."""
    (finding,) = read(folder, *texts).findings
    return finding


def record(paths: Sequence[Path]) -> MemoryRecord:
    """The record of these files, as ZeRO-3 on four GPUs."""
    return imported_record(Case("p", 3, 4, "bf16-fp32-master"), read_files(paths).findings)


def by_quantity(document: dict[str, Any], recipe: str) -> dict[str, dict[str, Any]]:
    """The comparisons of one recipe."""
    return {c["quantity"]: c for c in document["comparisons"] if c["case"]["recipe"] == recipe}
