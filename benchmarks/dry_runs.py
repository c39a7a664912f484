"""Dry-run drawn jobs and write what the real engine held into tests/data/dry-runs.json, which unit
tests hold the closed form to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
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
Rare = tuple[tuple[str, ...], dict[str, Any]]
"""Settings that few jobs have, and the cases that they decide something of."""
BF16_OPTIMIZER = {"stage": 1, "offload": None, "recipe": "bf16-fp32-master"}
RARE: tuple[Rare, ...] = (
    (("deepspeed.data_types.grad_accum_dtype=fp32",), BF16_OPTIMIZER),
    (("deepspeed.data_types.grad_accum_dtype=fp32", "deepspeed.bf16.immediate_grad_update=true"), BF16_OPTIMIZER),
    (("deepspeed.zero_optimization.contiguous_gradients=false",), {}),
    (("deepspeed.gradient_clipping=1.0",), {}),
    (("optimizer.library=adamw-8bit",), {}),
    (("optimizer.library=lion-32bit",), {}),
)
FUSED: tuple[Rare, ...] = (
    (
        ("optimizer.torch_adam=false", "optimizer.fused=false"),
        {"stage": 0, "offload": None, "recipe": "bf16-fp32-master"},
    ),
)
GROUPS = ((17, 23, RARE), (18, 6, FUSED))
"""Seeds, numbers of jobs, and what they have that whole formulas are about."""


def main() -> None:
    """Draw, run, write."""
    drawn = list(islice(described(random.Random(SEED)), COUNT))
    drawn += [each for seed, count, rare in GROUPS for each in islice(_rare(random.Random(seed), rare), count)]
    records = simulate([job for _, job in drawn], options=Options(expandable_segments=True))
    rows = [json.dumps(dataclasses.asdict(made) | held(record)) for (made, _), record in zip(drawn, records, strict=True)]
    FILE.write_text(f'{{"deepspeed": "{version("deepspeed")}", "jobs": [\n' + ",\n".join(rows) + "\n]}\n")


def _rare(rng: random.Random, rare: Sequence[Rare]) -> Iterator[tuple[Drawn, Job]]:
    """Jobs with something rare whose peaks have a closed form."""
    for drawn, _ in described(rng):
        sets, changes = rng.choice(rare)
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
