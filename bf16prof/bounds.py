"""Operators whose memory a dry run does not fully count: how a record says so, and which of them a
report is about."""

from __future__ import annotations

from collections.abc import Iterable

from bf16prof.records import MemoryRecord

_IS = " is a lower bound: "


def bound_note(operator: str, reason: str) -> str:
    """The note of a record that met this operator."""
    return f"memory of {operator}{_IS}{reason}"


def bound_notes(records: Iterable[MemoryRecord]) -> list[str]:
    """Such notes of these records, each once: whoever reads a total of theirs must see them."""
    return list(dict.fromkeys(note for record in records for note in record.notes if note.startswith("memory of ") and _IS in note))
