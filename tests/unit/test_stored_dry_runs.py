"""The closed form against what the real engine held in dry runs of drawn jobs, which are stored
(`make dry-runs`).

The dry runs take minutes, these tests three seconds; `tests/dry_runs` makes others anew. Bytes
between steps, and after each phase of a step, are the same. A peak may be lower by scalars, which
the closed form leaves out; one may be higher, where in a kernel two small tensors overlap.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from drawn_cases import Drawn

from bf16prof.cases import Job
from bf16prof.closed_form.anatomy import anatomy_of
from bf16prof.closed_form.predict import predict
from bf16prof.profiles.gpus import ALLOCATOR_BLOCK_BYTES
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import TRAINING, Offload, Phase

STORED: list[dict[str, Any]] = json.loads((Path(__file__).parents[1] / "data" / "dry-runs.json").read_text())["jobs"]
SCALARS = 2 * ALLOCATOR_BLOCK_BYTES
"""For each of a model's parameters there may be two at a time, as its gradient's norm and the
optimizer's count of its steps."""
PEAK = 0.002


def job_of(held: dict[str, Any]) -> Job:
    offload = None if held["offload"] is None else Offload(held["offload"])
    return Drawn(held["sets"], held["stage"], held["world_size"], held["recipe"], offload).job()


@pytest.mark.parametrize("few", [STORED[begin : begin + 6] for begin in range(0, len(STORED), 6)], ids=range(-(-len(STORED) // 6)))
def test_the_closed_form_is_what_the_real_engine_held(few: list[dict[str, Any]]) -> None:
    for held in few:
        job = job_of(held)
        agrees(predict(job), held, SCALARS * len(anatomy_of(job).parameters))


def agrees(record: MemoryRecord, held: dict[str, Any], scalars: int) -> None:
    """Assert that bytes between steps and after each phase are the same, and peaks as near as they
    can be."""
    name, peaks = record.case.label, held["peaks"]
    errors = {phase: (memory.peak_bytes or 0) - peaks[phase] for phase, memory in record.phases.items()}

    assert record.parameters == held["parameters"], name
    assert record.components == held["components"], name
    assert record.allocated_bytes == held["allocated"] - held["remainders"], name
    assert {phase: record.phases[phase].end_bytes for phase in TRAINING} == {phase: held["ends"][phase] for phase in TRAINING}, name
    assert abs((record.phases[Phase.INIT].end_bytes or 0) - held["ends"]["init"]) <= scalars, name
    assert errors[Phase.FORWARD] == 0, name
    assert min(errors.values()) >= -scalars, name
    assert max(errors.values()) <= PEAK * max(peaks.values()), name
    if not (held["stage"] == 2 and held["offload"]):  # there the dry run is rank 0, and the closed form of the rank that holds most
        assert record.host_bytes == held["host"], name
