"""What a dry run is asked to do, how it says how far it has come, and how it says what was wrong:
the files between two processes."""

from __future__ import annotations

from dataclasses import dataclass

from bf16prof.cases import JobFile
from bf16prof.documents import SCHEMA_VERSION
from bf16prof.vocabulary import STRICT, Phase


@dataclass(frozen=True)
class Task:
    """One dry run: the job, the steps to run, the allocator's option, whether to write a snapshot
    of its blocks, and the rank that runs."""

    __pydantic_config__ = STRICT

    job: JobFile
    steps: int
    expandable_segments: bool = False
    snapshot: bool = False
    rank: int = 0
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Progress:
    """How far a dry run has come: the phase, the step (from 0, -1 before the first), the layer, and
    the bytes allocated so far."""

    __pydantic_config__ = STRICT

    phase: Phase | None
    step: int
    layer: str
    allocated_bytes: int
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Fault:
    """Why there is no record: bad input (the user's model or configuration), or something that
    broke."""

    __pydantic_config__ = STRICT

    message: str
    hint: str
    is_input: bool
    schema_version: int = SCHEMA_VERSION
