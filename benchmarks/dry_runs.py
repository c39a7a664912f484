"""Dry-run drawn jobs and write what the real engine held into tests/data/dry-runs.json, which unit tests hold the closed form to."""

from __future__ import annotations

import dataclasses
import json
import random
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from drawn_cases import described
from judged import REMAINDERS

from bf16prof.dry_run.runner import Options, simulate
from bf16prof.records import MemoryRecord

FILE = Path(__file__).parents[1] / "tests" / "data" / "dry-runs.json"
SEED, COUNT = 16, 64


def main() -> None:
    """Draw, run, write."""
    drawn = list(islice(described(random.Random(SEED)), COUNT))
    records = simulate([job for _, job in drawn], options=Options(expandable_segments=True))
    rows = [json.dumps(dataclasses.asdict(made) | held(record)) for (made, _), record in zip(drawn, records, strict=True)]
    FILE.write_text(f'{{"deepspeed": "{version("deepspeed")}", "jobs": [\n' + ",\n".join(rows) + "\n]}\n")


def held(record: MemoryRecord) -> dict[str, object]:
    """What is kept of a dry run: bytes by component between steps, and by phase."""
    return {
        "allocated": record.allocated_bytes,
        "remainders": sum(item.bytes for item in record.items if item.name == REMAINDERS),
        "host": record.host_bytes,
        "parameters": record.parameters,
        "components": record.components,
        "peaks": {phase: memory.peak_bytes for phase, memory in record.phases.items()},
        "ends": {phase: memory.end_bytes for phase, memory in record.phases.items()},
    }


if __name__ == "__main__":
    main()
