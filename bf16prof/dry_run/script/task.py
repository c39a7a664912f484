"""What the dry run of a script is asked to do: the file between two processes."""

from __future__ import annotations

from dataclasses import dataclass

from bf16prof.documents import SCHEMA_VERSION
from bf16prof.scripts.command import Script
from bf16prof.vocabulary import STRICT


@dataclass(frozen=True)
class ScriptTask:
    """One dry run: the script, as which rank of how many, the GPU (by id; none for CPU ranks), and
    the optimizer steps to run."""

    __pydantic_config__ = STRICT

    script: Script
    world_size: int
    rank: int
    gpu: str | None
    steps: int
    expandable_segments: bool = False
    snapshot: bool = False
    schema_version: int = SCHEMA_VERSION
