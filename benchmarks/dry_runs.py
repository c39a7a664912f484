"""Dry-run drawn jobs and write what the real engine held into tests/data/dry-runs.json, which unit tests hold the closed form to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from drawn_cases import Drawn, described
from judged import REMAINDERS

from bf16prof.cases import Job
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.runner import Options, simulate
from bf16prof.errors import InputError, Refused
from bf16prof.records import MemoryRecord

FILE = Path(__file__).parents[1] / "tests" / "data" / "dry-runs.json"
SEED, COUNT = 16, 64
RARE_SEED, RARE_COUNT = 17, 23
BF16_OPTIMIZER = {"stage": 1, "offload": None, "recipe": "bf16-fp32-master"}
RARE: tuple[tuple[tuple[str, ...], dict[str, Any]], ...] = (
    (("deepspeed.data_types.grad_accum_dtype=fp32",), BF16_OPTIMIZER),
    (("deepspeed.data_types.grad_accum_dtype=fp32", "deepspeed.bf16.immediate_grad_update=true"), BF16_OPTIMIZER),
    (("deepspeed.zero_optimization.contiguous_gradients=false",), {}),
    (("deepspeed.gradient_clipping=1.0",), {}),
    (("optimizer.library=adamw-8bit",), {}),
    (("optimizer.library=lion-32bit",), {}),
)
"""What few jobs have and whole formulas are about: settings, and the cases that they decide something of."""


def main() -> None:
    """Draw, run, write."""
    drawn = [*islice(described(random.Random(SEED)), COUNT), *islice(_rare(random.Random(RARE_SEED)), RARE_COUNT)]
    records = simulate([job for _, job in drawn], options=Options(expandable_segments=True))
    rows = [json.dumps(dataclasses.asdict(made) | held(record)) for (made, _), record in zip(drawn, records, strict=True)]
    FILE.write_text(f'{{"deepspeed": "{version("deepspeed")}", "jobs": [\n' + ",\n".join(rows) + "\n]}\n")


def _rare(rng: random.Random) -> Iterator[tuple[Drawn, Job]]:
    """Jobs with something rare whose peaks have a closed form."""
    for drawn, _ in described(rng):
        sets, changes = rng.choice(RARE)
        made = dataclasses.replace(drawn, sets=(*drawn.sets, *sets), **changes)
        with contextlib.suppress(Refused, InputError):
            if predict(job := made.job()).peak_allocated_bytes is not None:
                yield made, job


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
