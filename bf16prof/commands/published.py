"""`bf16prof published`: the runs of the literature that ship with the package, each beside its
prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import typer

from bf16prof.commands import options as o
from bf16prof.commands.catalog import print_table
from bf16prof.commands.help import examples
from bf16prof.commands.literal import LiteralTyper
from bf16prof.documents import json_text, raw_document
from bf16prof.imports.published import PREFIX, Published, all_published
from bf16prof.reconcile import reconcile
from bf16prof.reports.units import UNKNOWN, gib, signed_percent
from bf16prof.reports.views import case_label
from bf16prof.vocabulary import Source

published = LiteralTyper(no_args_is_help=True, help="Runs that others published, beside their prediction.")


@dataclass(frozen=True)
class PublishedRow:
    """One quantity of one case: as published, and as the closed form predicts it; the error is
    signed and relative.

    `at_least`: the publication gives a lower bound. `is_as_printed`: the prediction is one that is
    printed like the publication.
    """

    name: str
    case: str
    quantity: str
    published_bytes: int
    predicted_bytes: int | None
    error: float | None
    at_least: bool
    is_as_printed: bool


@published.command("list", epilog=examples("bf16prof published list", "bf16prof published list --json"))
def list_published(json_: o.JsonOption = False) -> None:
    """Every published run: what was measured, what the closed form predicts, the signed error, and
    what its source leaves open."""
    found = list(all_published())
    rows = [row for each in found for row in rows_of(each)]
    if json_:
        about = [{key: getattr(each, key) for key in ("name", "title", "citation", "url", "open", "assumed", "notes")} for each in found]
        typer.echo(json_text(raw_document([], published=about, rows=rows)))
        return
    cells = [[row.name, row.case, row.quantity.removesuffix("_bytes"), _said(row), gib(row.predicted_bytes), _error(row)] for row in rows]
    print_table(["published run", "case", "quantity", "published", "estimate", "error"], cells)
    for each in found:
        typer.echo(f"\n{PREFIX}{each.name}: {each.title}\n  {each.citation}: {each.url}")
        for word, texts in (("open", each.open), ("assumed", each.assumed), ("note", each.notes)):
            for text in texts:
                typer.echo(f"  {word}: {text}")


def rows_of(found: Published) -> Iterator[PublishedRow]:
    """The quantities that a publication gives."""
    from bf16prof.closed_form.predict import predictions

    for run in found.runs:
        predicted = list(predictions([run.job]))  # none for a model whose parameters only code says
        label = f"{case_label(run.record.case)}, {run.what}" if run.what else case_label(run.record.case)
        for each in reconcile([run.record, *predicted]):
            measured = each.values.get(Source.IMPORT)
            if measured is not None and each.quantity.endswith("_bytes"):
                guess, error = each.values.get(Source.ESTIMATE), each.errors.get(Source.ESTIMATE)
                fits = each.error_beyond_rounding(Source.ESTIMATE) == 0
                yield PublishedRow(
                    found.name, label, each.quantity, int(measured), None if guess is None else int(guess), error, False, fits
                )
        for quantity, low in run.at_least.items():
            guess = next((getattr(each, quantity) for each in predicted), None)
            error = None if guess is None else (guess - low) / low
            yield PublishedRow(found.name, label, quantity, low, guess, error, True, error is not None and error >= 0)


def _said(row: PublishedRow) -> str:
    return f"{'at least ' if row.at_least else ''}{gib(row.published_bytes)}"


def _error(row: PublishedRow) -> str:
    if row.error is None:
        return UNKNOWN
    return f"{signed_percent(row.error)}{', as printed' if row.is_as_printed and not row.at_least else ''}"
