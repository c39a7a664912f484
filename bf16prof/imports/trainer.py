"""What the Trainer of Hugging Face prints (transformers, trainer_callback.py, trainer_utils.py,
trainer_pt_utils.py):

    {'loss': 1.9413, 'grad_norm': 2.81, 'learning_rate': 1.8e-05, 'epoch': 0.02}
    {'loss': '1.941', ...}                                    since 5.0
    {'train_runtime': 1063.2, 'train_steps_per_second': 0.47, 'train_loss': 1.52, 'epoch': 1.0}
      train_mem_gpu_alloc_delta  =    11475MB       `skip_memory_metrics=False`: whole MiB
      Instantaneous batch size per device = 4       under ***** Running training *****

A line of losses does not say its step; the progress bar in front of it does. Where there is none,
lines are counted.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bf16prof.imports.finding import MIB, Finding, Rates, Reading
from bf16prof.imports.trainer_memory import memory_readings
from bf16prof.imports.trainer_steps import LossLines, run_rates

_DICT = re.compile(r"\{(['\"][\w/() .-]{1,80}['\"]: .*)\}")
_PAIR = re.compile(
    r"""['"]([\w/() .-]{1,80})['"]: ?(?:['"])?(-?(?:\d{1,20}(?:\.\d{0,24})?(?:e[+-]?\d{1,4})?|nan|inf|NaN|Infinity))(?=['",}\s]|$)"""
)
_BAR = re.compile(r"(?:^|\s)\d{1,3}%\|[^|]{0,400}\| ?(\d{1,12})/(\d{1,12}) \[")
_METRIC = re.compile(r"^\s*((?:\w{1,20}_)?(?:init|train|eval|test)_mem_\w{3}\w{0,20}|before_init_mem_[cg]pu) += +(-?\d{1,12})MB$")
_TABLE = re.compile(r"^\s*(?:\*{5} \w+ metrics \*{5}|(?:epoch|total_flos|train_\w{1,40}|eval_\w{1,60}|\w{1,40}_mem_cpu\w{0,30}) += +\S.*)$")
_HEADER = re.compile(
    r"(Instantaneous batch size per device|Total train batch size \(w\. parallel, distributed & accumulation\)|Gradient Accumulation steps|"
    r"Total optimization steps|Num examples|Num Epochs|Num update steps per epoch|Number of trainable parameters) = ([\d,]{1,24})$"
)
_SAID = {
    "Instantaneous batch size per device": "micro_batch_size",
    "Total train batch size (w. parallel, distributed & accumulation)": "train_batch_size",
    "Gradient Accumulation steps": "gradient_accumulation_steps",
}
SPEAKS = {"loss", "train_runtime", "train_loss", "eval_loss", "train_mem_gpu_alloc_delta"}
"""Keys one of which is in every line of the Trainer."""


class TrainerReader:
    """Reads losses, metrics and what the Trainer says of the batch before it begins."""

    format = "the Trainer of Hugging Face"
    marks = ("%|", "{'", '{"', "_mem_", " = ", "metrics *****")

    def __init__(self) -> None:
        self._losses = LossLines()
        self._memory: dict[str, Reading] = {}
        self._said: dict[str, int] = {}
        self._run: dict[str, float] = {}

    def line(self, text: str) -> int:
        """Read one line."""
        bars = _BAR.findall(text)
        for done, of in bars:
            self._losses.bar(int(done), int(of))
        if (found := _DICT.search(text)) and self._dict(found[1]):
            return 1
        if found := _METRIC.search(text):
            name, mib = found[1], int(found[2])
            self._memory.setdefault(name, Reading.between(mib * MIB, (mib + 1) * MIB - 1))
            return 1
        if found := _HEADER.search(text):
            if name := _SAID.get(found[1]):
                self._said.setdefault(name, int(found[2].replace(",", "") or 0))
            return 1
        return int(bool(bars) or _TABLE.search(text) is not None)

    def finding(self) -> Finding | None:
        """The steps, the memory of the whole run, and the batch."""
        steps, notes = self._losses.steps()
        readings, more = memory_readings(self._memory)
        said = _with_ranks(self._said)
        rates, rate_notes = run_rates(self._run, self._losses.most_steps)
        if not (steps or readings or said or rates != Rates()):
            return None
        all_notes = [f"{self.format}: {note}" for note in (*notes, *more, *rate_notes)]
        return Finding(self.format, readings, steps=steps, notes=tuple(all_notes), said=said, rates=rates)

    def _dict(self, body: str) -> bool:
        pairs = dict(_PAIR.findall(body))
        if not pairs.keys() & SPEAKS:
            return False
        if "loss" in pairs:
            self._losses.add(pairs)
        for name, value in pairs.items():
            if "_mem_" in name and re.fullmatch(r"-?\d{1,18}", value):
                self._memory[name] = Reading(int(value))  # exact: before it is printed as MB
        if "train_runtime" in pairs:
            self._run = {name: float(value) for name, value in pairs.items() if name.startswith("train_")}
        return True


def _with_ranks(said: Mapping[str, int]) -> dict[str, Any]:
    """The batch, and the number of ranks where it follows: of the whole batch divided by that of a
    rank."""
    micro, accumulation, batch = (said.get(name, 0) for name in ("micro_batch_size", "gradient_accumulation_steps", "train_batch_size"))
    found: dict[str, Any] = {name: value for name, value in said.items() if value}
    if micro and accumulation and batch and batch % (micro * accumulation) == 0:
        found["world_size"] = batch // (micro * accumulation)
    return found
