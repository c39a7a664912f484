"""Which operators' memory is known, on a CPU and on CUDA, and from where.

On a CPU the census says it (`cpu-operators.toml`, written by `make operators`): it runs PyTorch's
own samples of every operator on real tensors and holds what is allocated against the dry run. On
CUDA nobody here can run them, so `cuda-operators.toml` names for every operator of the model the
source that was read, and the measurement that confirmed it, if there is one.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bf16prof.profiles.shipped import shipped_table


class OperatorState(enum.StrEnum):
    """How well the memory of an operator is known."""

    MEASURED = "measured"
    """On this device, by the census or by somebody's measurement, which the entry names."""
    READ = "read"
    """In the source of PyTorch, which the entry names."""
    ASKED = "asked"
    """The dry run has the real kernel run once. CPU only."""
    LOWER_BOUND = "lower bound"
    """Some of it is not known; the entry says what."""


KNOWN = frozenset({OperatorState.MEASURED, OperatorState.READ})


@dataclass(frozen=True)
class Entry:
    """What is known of one operator, or of a family of them."""

    state: OperatorState
    source: str = ""
    reason: str = ""
    confirmed_by: str = ""


@dataclass(frozen=True)
class Registry:
    """By operator (`add` or, for one overload, `add.Tensor`) what is known; by tag what is known of
    all operators that have it."""

    entries: Mapping[str, Entry]
    unseen: str
    tags: Mapping[str, Entry] = field(default_factory=dict)
    namespaces: frozenset[str] = frozenset()
    """Namespaces whose operators allocate nothing here, or are counted elsewhere."""

    def entry(self, operator: Any) -> Entry | None:
        """What is known of an operator (a `torch._ops.OpOverload`)."""
        base = operator._schema.name.partition("::")[2]
        overload = f"{base}.{operator._schema.overload_name or 'default'}"
        found = self.entries.get(overload) or self.entries.get(base)
        if found is None and base.endswith("_") and not base.startswith("_"):
            found = self.entries.get(base.removesuffix("_"))  # in place: less than the operator that makes a new tensor
        return found or next((entry for tag in operator.tags if (entry := self.tags.get(tag.name))), None)

    def is_exact(self, operator: Any) -> bool:
        """Whether shapes and formulas say all that the operator holds."""
        entry = self.entry(operator)
        return operator.namespace in self.namespaces or (entry is not None and entry.state in KNOWN)

    def reason(self, operator: Any) -> str:
        """Why the memory of an operator is not fully known."""
        entry = self.entry(operator)
        return entry.reason if entry is not None and entry.reason else self.unseen


_COLLECTIVES = frozenset({"c10d", "_c10d_functional", "prim", "profiler"})


NOTHING = Registry({}, "not looked at")
"""For the census: no operator is known."""


@functools.cache
def cpu_registry() -> Registry:
    """What the census found."""
    table = shipped_table("cpu-operators.toml", "bf16prof.dry_run.hardware")
    entries = {name: Entry(OperatorState.MEASURED, f"census of PyTorch {table['torch']}") for name in (*table["exact"], *table["refused"])}
    entries |= {name: Entry(OperatorState.ASKED, "the kernel itself") for name in table["asked"]}
    entries |= {name: Entry(OperatorState.LOWER_BOUND, reason=reason) for name, reason in table["listed"].items()}
    four_bit = Entry(OperatorState.READ, "bitsandbytes/backends/cpu/ops.py (0.50.2)")
    entries |= dict.fromkeys(("dequantize_4bit", "dequantize_blockwise"), four_bit)
    return Registry(entries, "no sample of PyTorch's operator tests reaches it, and its kernel could not be asked", {}, _COLLECTIVES)


@functools.cache
def cuda_registry() -> Registry:
    """What was read and what was confirmed."""
    table = shipped_table("cuda-operators.toml", "bf16prof.dry_run.hardware")
    families = {name: Entry(**{**row, "state": OperatorState(row["state"])}) for name, row in table["families"].items()}
    entries = {name: families[family] for family, names in table["operators"].items() for name in names}
    tags = {tag: families[family] for tag, family in table["tags"].items()}
    return Registry(entries, "nobody has held it against a GPU or read its kernel", tags, _COLLECTIVES)
