"""Memory by the Trainer's own tracker (transformers/trainer_utils.py, `TrainerMemoryTracker`), in
the terms of a record.

It has two stages on rank 0: the Trainer's `__init__`, and `train`, in which DeepSpeed's engine is
built as well. Of each it knows how much more was allocated at its end than at its beginning
(`alloc_delta`), and how much more than at its end the peak was (`peaked_delta`); and what was
allocated before the first (`before_init_mem_gpu`). A stage begins with what the one before it ended
with.
"""

from __future__ import annotations

from collections.abc import Mapping

from bf16prof.imports.finding import Reading, highest, known, total


def memory_readings(metrics: Mapping[str, Reading]) -> tuple[dict[str, Reading], list[str]]:
    """Bytes by the reconciler's names of quantities, and notes; nothing without the stage
    `train`."""
    train = metrics.get("train_mem_gpu_alloc_delta")
    if train is None:
        return {}, []
    before = metrics.get("before_init_mem_gpu")
    init = metrics.get("init_mem_gpu_alloc_delta")
    is_complete = before is not None and init is not None
    after_init = total([before or Reading(0), init or Reading(0)])
    end = total([after_init, train])
    peaks = [_peak(end, metrics.get("train_mem_gpu_peaked_delta"))]
    if is_complete and "init_mem_gpu_peaked_delta" in metrics:
        peaks.append(_peak(after_init, metrics["init_mem_gpu_peaked_delta"]))
    if not is_complete:  # what was allocated before train is not said, and comes on top
        end, peaks = end.as_floor(), [peak.as_floor() for peak in peaks]
    notes = ["memory of rank 0, by its tracker: what is allocated at the end of train, and the peak since __init__"]
    if not is_complete:
        notes.append("what was allocated before train is not said: these are lower bounds")
    readings = known(allocated_bytes=end, run_peak_allocated_bytes=highest(peaks))
    return {name: reading for name, reading in readings.items() if reading.bytes >= 0}, notes  # a stage may free what others allocated


def _peak(end: Reading, peaked: Reading | None) -> Reading:
    return end.as_floor() if peaked is None else total([end, peaked])
