"""The stdout of DeepSpeed's bf16 example (DeepSpeedExamples, training/bf16_master_weight/train.py):
every rank prints

* at some steps `[Rank 0] Step 5: loss=10.9141, time=0.601s, alloc_mem=25.74 GB, peak_mem=31.38 GB`;
* at the end a block under `[Rank 0] FINAL RESULTS`, and the same in bytes as
  `SUMMARY: config=... params=... peak_mem_bytes=... alloc_mem_bytes=... avg_step_time=...`.

Its GB are 2**30 bytes with two decimals (`format_memory`); its peak is `max_memory_allocated` since
the process began (init included); its step time is a mean over the steps after the warm-up, whose
number it does not print.
"""

from __future__ import annotations

import math
import re
import statistics
from dataclasses import dataclass

from bf16prof.imports.finding import GIB, NUMBER, Finding, Reading, highest, known, rounded
from bf16prof.step_records import StepRecord
from bf16prof.summaries import not_finite

_SUMMARY = re.compile(r"\bSUMMARY: (\w+=.*)")
_STEP = re.compile(
    rf"\[Rank (\d{{1,7}})\] Step (\d{{1,12}}): loss=(\S{{1,30}}), time=({NUMBER})s, alloc_mem=({NUMBER}) GB, peak_mem=({NUMBER}) GB"
)
_PARAMETERS = re.compile(r"\[Rank \d{1,7}\] Model parameters: (\d[\d,]{0,23}) total")
_CONFIG = re.compile(r"\[Rank \d{1,7}\] DeepSpeed initialized with config: (\S.*)")
_RESULTS = re.compile(r"\[Rank (\d{1,7})\] FINAL RESULTS")
_AFTER_INIT = re.compile(rf"\[Rank \d{{1,7}}\] Memory after init: allocated=({NUMBER}) GB, reserved={NUMBER} GB")
_BLOCK = re.compile(rf"  (Average step time|Peak memory|Final allocated memory): ({NUMBER})(?:s| GB)$")
_BEGINS = re.compile(r"\[Rank \d{1,7}\] (?:Creating model with hidden_dim=|Loading wikitext dataset|Dataset loaded: )")
_OTHERS = re.compile(r"\] Activation checkpointing enabled$|^  (?:Config|Model|Parameters|Batch size): |^={60}$|^Loss history saved to: ")
"""Lines of the script that say nothing of use here; those of the second kind could stand elsewhere
as well."""

_KEYS = {"config", "params", "peak_mem_bytes", "alloc_mem_bytes", "avg_step_time"}


@dataclass(frozen=True)
class _Summary:
    """A SUMMARY line."""

    config: str
    parameters: int
    peak: int
    allocated: int
    step_time: float


class ExampleReader:
    """Reads the lines of all ranks."""

    format = "output of DeepSpeed's bf16 example"
    marks = (
        "summary: ", "[rank ", "average step time: ", "peak memory: ", "final allocated memory: ", "activation checkpointing enabled",
        "  config: ", "  model: ", "  parameters: ", "  batch size: ", "=" * 60, "loss history saved to: ",
    )  # fmt: skip

    def __init__(self) -> None:
        self._summaries: list[_Summary] = []
        self._steps: dict[int, dict[int, tuple[float | None, float]]] = {}
        self._last: dict[int, tuple[Reading, Reading]] = {}
        self._after_init: list[Reading] = []
        self._block: dict[str, list[str]] = {}
        self._parameters: set[int] = set()
        self._configs: dict[str, None] = {}
        self._finished: list[int] = []
        self._ranks: set[int] = set()

    def line(self, text: str) -> int:
        """Read one line."""
        return int(self._summary(text) or self._step(text) or self._other(text))

    def finding(self) -> Finding | None:
        """What the lines say of the rank that holds most. Raises `ValueError` when they are those
        of several runs."""
        if not (self._summaries or self._steps or self._block or self._parameters):
            return None
        self._require_one_run()
        readings, notes = self._memory()
        times = [s.step_time for s in self._summaries] or [float(t) for t in self._block.get("Average step time", [])]
        if any(times):
            notes.append("the step time is the mean that the script prints, of the slowest rank, without its warm-up steps")
        facts = known(parameters=next(iter(self._parameters), None), step_time_s=max(times, default=0.0) or None)
        steps = tuple(self._job_step(step) for step in sorted(self._steps))
        notes += not_finite([step.step for step in steps if step.loss_not_finite], len(steps))
        return Finding(
            self.format,
            readings,
            facts,
            steps,
            notes=tuple(notes),
            ranks=max(self._ranks, default=-1) + 1,
            config=next(iter(self._configs), None),
        )

    def _summary(self, text: str) -> bool:
        found = _SUMMARY.search(text)
        pairs = dict(pair.split("=", 1) for pair in found[1].split() if "=" in pair) if found else {}
        if not pairs.keys() >= _KEYS:
            return False
        sizes = [pairs[key] for key in ("params", "peak_mem_bytes", "alloc_mem_bytes")]
        if not all(re.fullmatch(r"\d{1,18}", size) for size in sizes) or not re.fullmatch(NUMBER, pairs["avg_step_time"]):
            return False
        parameters, peak, allocated = map(int, sizes)
        summary = _Summary(pairs["config"], parameters, peak, allocated, float(pairs["avg_step_time"]))
        self._summaries.append(summary)
        self._parameters.add(summary.parameters)
        self._configs[summary.config] = None
        return True

    def _step(self, text: str) -> bool:
        found = _STEP.search(text)
        loss = _loss(found[3]) if found else None
        if found is None or loss is None:
            return False
        rank, step = int(found[1]), int(found[2])
        of_step = self._steps.setdefault(step, {})
        if rank in of_step:
            raise ValueError(f"step {step} of rank {rank} is there twice: these are several runs")
        of_step[rank] = (loss if math.isfinite(loss) else None, float(found[4]))
        self._ranks.add(rank)
        self._last[rank] = (rounded(found[5], GIB, 2), rounded(found[6], GIB, 2))
        return True

    def _other(self, text: str) -> bool:
        if found := _PARAMETERS.search(text):
            self._parameters.add(int(found[1].replace(",", "")))
        elif found := _CONFIG.search(text):
            self._configs[found[1]] = None
        elif found := _RESULTS.search(text):
            self._finished.append(int(found[1]))
            self._ranks.add(int(found[1]))
        elif found := _AFTER_INIT.search(text):
            self._after_init.append(rounded(found[1], GIB, 2))
        elif self._finished and (found := _BLOCK.search(text)):
            self._block.setdefault(found[1], []).append(found[2])
        else:
            found = _BEGINS.search(text) or (_OTHERS.search(text) if self._parameters else None)
        return found is not None

    def _require_one_run(self) -> None:
        if len(self._configs) > 1 or len(self._parameters) > 1 or len(set(self._finished)) < len(self._finished):
            what = " and ".join(list(self._configs)[:2]) or "FINAL RESULTS of a rank twice"
            raise ValueError(f"more than one run of the example ({what}): import one at a time, and report them together")

    def _memory(self) -> tuple[dict[str, Reading], list[str]]:
        """What is allocated at the end, and the highest since the process began."""
        notes = []
        allocated: Reading | None
        peak: Reading | None
        if self._summaries:
            most = max(self._summaries, key=lambda s: (s.allocated, s.peak))
            allocated, peak = Reading(most.allocated), Reading(most.peak)
            if (highest_peak := max(s.peak for s in self._summaries)) > most.peak:
                notes.append(f"of the rank that holds most; the peak of another is {highest_peak - most.peak:,} bytes higher")
        elif self._block:
            allocated, peak = self._of_block("Final allocated memory"), self._of_block("Peak memory")
        else:
            allocated, peak = (highest([pair[which] for pair in self._last.values()]) for which in (0, 1))
            notes.append("the log ends before its results: memory is that of the last step it prints")
        if peak is not None and peak.low == 0:  # the script reads torch.cuda, and prints zeros where there is none
            return {}, [*notes, "the script saw no CUDA memory"]
        end_of_init = highest(self._after_init)
        return known(allocated_bytes=allocated, run_peak_allocated_bytes=peak) | known(**{"phases.init.end_bytes": end_of_init}), notes

    def _of_block(self, name: str) -> Reading | None:
        return highest([rounded(text, GIB, 2) for text in self._block.get(name, [])])

    def _job_step(self, step: int) -> StepRecord:
        """The mean loss and the slowest time of the ranks; no loss where a rank that speaks of
        other steps does not speak of this one."""
        of_step = self._steps[step]
        losses = [loss for loss, _ in of_step.values() if loss is not None]
        complete = len(losses) == len(self._last)
        loss = statistics.fmean(losses) if complete else None
        lost = len(losses) < len(of_step)
        return StepRecord(step, loss, max(time for _, time in of_step.values()), None, loss_not_finite=lost)


def _loss(text: str) -> float | None:
    """A loss as Python prints it; `None` if it is no number."""
    try:
        return float(text)
    except ValueError:
        return None
