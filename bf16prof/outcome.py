"""What a call of the Python API returns, and what a command shows: records with all that was said beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bf16prof.cases import Refusal
from bf16prof.documents import json_text, raw_document
from bf16prof.errors import Bf16profError
from bf16prof.records import MemoryRecord
from bf16prof.runs import Run

if TYPE_CHECKING:
    import pandas as pd

    from bf16prof.planning.answer import Answer

_SHOWN = (
    "source", "zero_stage", "world_size", "recipe", "allocated_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "verdict",
    "step_time_s", "loss",
)  # fmt: skip
"""Columns of the table that a notebook shows; all are in `to_dataframe`."""


@dataclass(frozen=True)
class Outcome:
    """The records of one call.

    `run`: them as a run, which every report takes; its `path` is the run directory where there is one. `more`: what the JSON document says
    beside the records. `notes`: what is to be said of the user's files. `error`: why some cases have no record.
    """

    run: Run
    records: tuple[MemoryRecord, ...]
    refused: tuple[Refusal, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: Bf16profError | None = None

    def to_dataframe(self) -> pd.DataFrame:
        """One row per record, of all sources; columns as in the CSV, bytes as integers."""
        from bf16prof.reports.tables import frame

        return frame([self.run])

    def to_json(self) -> str:
        """The document that the command prints with `--json`."""
        return json_text(raw_document(self.records, **self.more))

    def save(self, path: str | Path, *, figure: str = "", force: bool = False) -> Path:
        """Write a file in the format of its suffix, as `-o`; `figure`: what a picture shows, as `--figure`.

        Raises `InputError` where the file exists and `force` does not allow that, and for a figure that cannot be drawn.
        """
        from bf16prof.commands.output import check_outputs, write_files

        target = Path(path)
        check_outputs({"output": [target], "figure": figure, "force": force})
        write_files([target], [self.run], force=force, figure=figure, **self.more)
        return target

    def _repr_html_(self) -> str:
        """A small table for notebooks."""
        table = self.to_dataframe()
        shown: str = table[[name for name in _SHOWN if name in table and table[name].notna().any()]].to_html(index=False)
        return shown


@dataclass(frozen=True)
class Plans:
    """What `plan` found, an answer for each number of GPUs: `answers[0].first` is the first choice, `.outlook` what there is to say."""

    answers: tuple[Answer, ...]
    document: dict[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """The record of the best plan of each case."""
        return tuple(record for answer in self.answers for record in answer.records)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per plan that fits, best first within each number of GPUs."""
        import pandas as pd

        from bf16prof.documents import as_json

        return pd.json_normalize([as_json(plan) for answer in self.answers for plan in answer.outlook.plans])

    def to_json(self) -> str:
        """The document that `plan --json` prints."""
        return json_text(self.document)

    def _repr_html_(self) -> str:
        shown: str = self.to_dataframe().head(10).to_html(index=False)
        return shown


def of_run(
    run: Run,
    more: dict[str, Any],
    records: Sequence[MemoryRecord] | None = None,
    notes: Sequence[str] = (),
    error: Bf16profError | None = None,
) -> Outcome:
    """A run as an outcome; `records`: those that the JSON document has, all of the run if not given."""
    return Outcome(run, tuple(run.records if records is None else records), tuple(more.get("refused", ())), more, tuple(notes), error)


def without_error(outcome: Outcome) -> Outcome:
    """The outcome; its error is raised if there is one, with the finished records on it (`error.records`)."""
    if outcome.error is not None:
        raise outcome.error
    return outcome
