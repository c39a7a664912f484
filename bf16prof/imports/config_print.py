"""What DeepSpeed says of its configuration when it begins (deepspeed/runtime/config.py,
`DeepSpeedConfig.print`):

      train_micro_batch_size_per_gpu  4
      world_size ................... 8
      zero_optimization_stage ...... 3
      json = {
        "train_batch_size":64,
        ...
    }

and what its launcher (`dist_world_size=8`) and engine (`Creating torch.bfloat16 ZeRO stage 3
optimizer`) say. The JSON is the one that the job ran with, `auto` filled in. It is printed as one
message of several lines, numbers with exponents (5.000000e+08).
"""

from __future__ import annotations

import json
import re
from typing import Any

from bf16prof.imports.finding import Finding
from bf16prof.imports.text import LogLine
from bf16prof.profiles.plain import problem

_KEYS = {
    "world_size": "world_size",
    "zero_optimization_stage": "zero_stage",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_batch_size": "train_batch_size",
}
_KEY = re.compile(rf"(?:^|\s)  ({'|'.join(_KEYS)}) (?:\.{{2,40}})? ?(\d{{1,12}})$")
_OTHER_KEY = re.compile(r"\[config\.py:\d+:print\] ")
_RANKS = re.compile(r"\bdist_world_size=(\d{1,7})\b|\bConfig mesh_device .{1,60} world_size = (\d{1,7})$")
_STAGE = re.compile(r"\bCreating \S{2,40} ZeRO stage (\d) optimizer\b")
_JSON = re.compile(r"(?:^|\s)  json = (\{.*)")
_INSIDE_JSON = re.compile(r'\s*(?:["{}\[\]]|-?\d|(?:true|false|null),?\s*$)')
_LONGEST_JSON = 4000
"""Lines; DeepSpeed's own configurations have some hundred."""


class ConfigReader:
    """Reads what is said once; of several values the first counts."""

    format = "DeepSpeed's configuration"
    marks = ("json = {", *_KEYS, "zero stage", "[config.py:")

    def __init__(self) -> None:
        self._said: dict[str, Any] = {}
        self._json: list[str] = []
        self._is_open = self._block = False
        self._depth = self._patience = 0

    @property
    def is_open(self) -> bool:
        """Whether what the last line has begun goes on."""
        return self._is_open or self._block

    def line(self, line: LogLine) -> int:
        """Read one line."""
        text = line.text
        if self._is_open:
            return self._more_json(text)
        if found := _JSON.search(text):
            self._json, self._is_open, self._depth, self._patience = [found[1]], True, 0, _LONGEST_JSON
            self._close()
            return 1
        if found := _KEY.search(text):
            self._said.setdefault(_KEYS[found[1]], int(found[2]))
            return 1
        if found := _RANKS.search(text):
            self._said.setdefault("world_size", int(found[1] or found[2]))
            return 1
        if found := _STAGE.search(text):
            self._said.setdefault("zero_stage", int(found[1]))
            return 1
        return self._other(text)

    def finding(self) -> Finding | None:
        """What was said; nothing if there was none."""
        if not self._said:
            return None
        said = ", ".join(f"{name} {value}" for name, value in self._said.items() if name != "deepspeed")
        whole = "its JSON" if "deepspeed" in self._said else ""
        return Finding(self.format, notes=(f"{self.format} says {', '.join(filter(None, [said, whole]))}",), said=dict(self._said))

    def _other(self, text: str) -> int:
        """Lines of the same print that say nothing of use here: those with its mark, and the inside
        of an object that one of them opens."""
        if _OTHER_KEY.search(text):
            self._block = text.endswith("{")
            return 1
        if self._block and re.match(r'\s*(?:"[\w ]{1,60}": |\}|\])', text):
            self._block = not text.startswith("}")
            return 1
        self._block = False
        return 0

    def _more_json(self, text: str) -> int:
        """One more line of the JSON; what other ranks print between its lines is left out."""
        self._patience -= 1
        if self._patience <= 0:
            self._is_open = False
        if not _INSIDE_JSON.match(text):
            return 0
        self._json.append(text)
        self._close()
        return 1

    def _close(self) -> None:
        """Take the JSON if it is complete."""
        self._depth += self._json[-1].count("{") - self._json[-1].count("}")
        if self._depth > 0:
            return
        self._is_open = False
        try:
            found = json.loads("\n".join(self._json), parse_float=_number)
        except (ValueError, RecursionError):
            return
        if isinstance(found, dict) and problem(found) is None:
            self._said.setdefault("deepspeed", found)


def _number(text: str) -> float | int:
    """A number of a JSON; one in DeepSpeed's own notation with an exponent is whole where it can
    be."""
    value = float(text)
    return int(value) if "e" in text.lower() and value.is_integer() and abs(value) < 2**63 else value
