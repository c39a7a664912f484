"""What a call of the Python API returns, and what a command shows: records with all that was said
beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bf16prof.cases import Refusal
from bf16prof.documents import json_text, raw_document
from bf16prof.errors import Bf16profError, Refused
from bf16prof.files import write_text
from bf16prof.records import MemoryRecord
from bf16prof.runs import Run

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

    from bf16prof.planning.answer import Answer

_SHOWN = (
    "source", "zero_stage", "world_size", "recipe", "allocated_bytes", "peak_allocated_bytes", "peak_reserved_bytes", "verdict",
    "step_time_s", "loss",
)  # fmt: skip
"""Columns of the table that a notebook shows; all are in `to_dataframe`."""


@dataclass(frozen=True, repr=False)
class Outcome:
    """The records of one call. `print(outcome)` is the screen that the command prints.

    `run`: them as a run, which every report takes; its `path` is the run directory where there is
    one. `more`: what the JSON document says beside the records. `notes`: what is to be said of the
    user's files. `error`: why some cases have no record.
    """

    run: Run
    records: tuple[MemoryRecord, ...]
    refused: tuple[Refusal, ...] = ()
    more: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: Bf16profError | None = None

    def __repr__(self) -> str:
        count = len(self.records)
        return f"<{type(self).__name__} of {self.run.manifest.name}: {count} record{'' if count == 1 else 's'}>"

    def __str__(self) -> str:
        from bf16prof.reports.console import answer, in_text

        return in_text(lambda console: answer([self.run], console, verbose=False))

    def to_dataframe(self) -> pd.DataFrame:
        """One row per record, of all sources; columns as in the CSV, bytes as integers."""
        from bf16prof.reports.tables import frame

        return frame([self.run])

    def to_json(self) -> str:
        """The document that the command prints with `--json`."""
        return json_text(raw_document(self.records, **self.more))

    def figure(self, name: str = "memory") -> go.Figure:
        """A figure of the page by its name, as `--figure`, to show in a notebook or to change.
        Raises `InputError` for an unknown name, and where these records have no data for it, naming
        the figures that they have.
        """
        import plotly.graph_objects as go

        from bf16prof.reports import pictures
        from bf16prof.reports.figure_names import require_name

        require_name(name)
        return go.Figure(pictures.on_paper(pictures.figure([self.run], name)))

    def save(self, path: str | Path, *, figure: str = "", force: bool = False) -> Path:
        """Write a file in the format of its suffix, as `-o`; `figure`: what a picture shows, as
        `--figure`.

        Raises `InputError` where the file exists and `force` does not allow that, and for a figure
        that cannot be drawn.
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


@dataclass(frozen=True, repr=False)
class Plans:
    """What `plan` found, an answer for each number of GPUs: `answers[0].first` is the first choice,
    `.outlook` what there is to say.

    `print(plans)` is the screen that the command prints.
    """

    answers: tuple[Answer, ...]
    document: dict[str, Any]
    profile: str
    parameters: int
    notes: tuple[str, ...] = ()
    theirs: Mapping[str, Any] | None = None
    """The user's own DeepSpeed JSON, which `deepspeed_json` keeps but for what a plan decides."""

    def __repr__(self) -> str:
        sizes = ", ".join(f"{len(answer.outlook.plans)} for {answer.outlook.world_size} GPUs" for answer in self.answers)
        return f"<{type(self).__name__} of {self.profile}: {sizes}>"

    def __str__(self) -> str:
        from bf16prof.commands.plan import show
        from bf16prof.reports.console import in_text

        return in_text(lambda console: show(self, console, verbose=False))

    @property
    def records(self) -> tuple[MemoryRecord, ...]:
        """The record of the best plan of each case."""
        return tuple(record for answer in self.answers for record in answer.records)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per plan that fits, best first within each number of GPUs (`rank`); columns as in
        the CSV."""
        import pandas as pd

        from bf16prof.documents import as_json

        ranked = [(rank, plan) for answer in self.answers for rank, plan in enumerate(answer.outlook.plans, 1)]
        rows = [{"rank": rank, **as_json(plan.case), **as_json(plan)} for rank, plan in ranked]
        return pd.DataFrame([{name: value for name, value in row.items() if name != "case"} for row in rows])

    def to_json(self) -> str:
        """The document that `plan --json` prints."""
        return json_text(self.document)

    def text(self, suffix: str) -> str:
        """The content of a file of that suffix: `.html`, `.md`, `.csv` or `.json`."""
        outlooks, asked = [answer.outlook for answer in self.answers], self.document["asked"]
        if suffix == ".json":
            return self.to_json() + "\n"
        if suffix == ".html":
            from bf16prof.planning.around import around
            from bf16prof.reports.plan_html import PlanPart, render

            parts = [PlanPart(each.outlook, each.first.record if each.first else None, around(each)) for each in self.answers]
            return render(parts, self.document, profile=self.profile, parameters=self.parameters, asked=asked)
        from bf16prof.reports import plan_tables

        return plan_tables.to_csv(outlooks) if suffix == ".csv" else plan_tables.to_markdown(outlooks, self.profile, self.parameters, asked)

    def deepspeed_json(self) -> str:
        """The first choice as a DeepSpeed JSON, of the first number of GPUs. Raises `Refused` where
        nothing fits."""
        from bf16prof.planning.written import ds_config_text

        first = self.answers[0].first
        if first is None:
            raise Refused(f"nothing fits {self.answers[0].outlook.world_size} GPUs: there is no DeepSpeed JSON of it")
        return ds_config_text(first, self.theirs)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write a file in the format of its suffix, as `-o`. Raises `InputError` where it exists
        and `force` does not allow that."""
        from bf16prof.commands.output import check_outputs

        target = Path(path)
        check_outputs({"output": [target], "force": force})
        write_text(target, self.text(target.suffix), replace=force)
        return target

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
    """A run as an outcome; `records`: those that the JSON document has, all of the run if not
    given."""
    return Outcome(run, tuple(run.records if records is None else records), tuple(more.get("refused", ())), more, tuple(notes), error)


def without_error(outcome: Outcome) -> Outcome:
    """The outcome; its error is raised if there is one, with the finished records on it
    (`error.records`)."""
    if outcome.error is not None:
        raise outcome.error
    return outcome
