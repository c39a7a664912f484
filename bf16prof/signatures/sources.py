"""What a function of the user's own had read when it was recorded: an answer holds as long as all
of that is as it was.

Files count by size and time, as `make` has it, variables of the environment by a digest of their
value. What a function asks a network or a clock is not seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ReadSources:
    """Files and variables with how they were, and the digest of the answer that they belong to."""

    files: dict[str, str]
    variables: dict[str, str]
    answer: str

    @classmethod
    def of(cls, files: Iterable[str], variables: Iterable[str], answer: bytes) -> ReadSources:
        """As they are now."""
        return cls({path: _state(path) for path in files}, {name: _value(name) for name in variables}, _digest(answer))

    def packed(self) -> bytes:
        """As a file."""
        return json.dumps([self.files, self.variables, self.answer]).encode()

    @classmethod
    def unpacked(cls, content: bytes) -> ReadSources | None:
        """From such a file; `None` from anything else."""
        try:
            files, variables, answer = json.loads(content)
            return cls(dict(files), dict(variables), str(answer))
        except (ValueError, TypeError):
            return None

    def hold(self, answer: bytes) -> bool:
        """Whether this is the answer, and nothing has changed since."""
        as_they_were = all(_state(path) == state for path, state in self.files.items())
        return as_they_were and all(_value(name) == value for name, value in self.variables.items()) and _digest(answer) == self.answer


def _state(path: str) -> str:
    try:
        status = Path(path).stat()
    except OSError:
        return "none"
    return f"{status.st_size} {status.st_mtime_ns}"


def _value(name: str) -> str:
    value = os.environ.get(name)
    return "none" if value is None else _digest(value.encode(errors="surrogateescape"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
