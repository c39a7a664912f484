"""What is not fully counted is said wherever a total of it is shown: in the terminal, on the page,
in Markdown; each operator once."""

from __future__ import annotations

from dataclasses import replace

import report_fixtures as fixtures
from rich.console import Console

from bf16prof.bounds import bound_note, bound_notes
from bf16prof.reports.console.reconciliation import reconciliation
from bf16prof.reports.html import render
from bf16prof.reports.tables import to_markdown
from bf16prof.runs import Run

LSTM, OTHER = bound_note("_cudnn_rnn", "its sizes are not public"), "DeepSpeed 0.19.8, PyTorch 2.13.0"


def run() -> Run:
    whole = fixtures.simulated_run()
    return replace(whole, records=tuple(replace(record, notes=(OTHER, LSTM)) for record in whole.records))


def test_only_notes_about_operators_count_and_each_once() -> None:
    assert bound_notes(run().records) == [LSTM] == ["memory of _cudnn_rnn is a lower bound: its sizes are not public"]


def test_every_report_of_several_cases_says_it_beside_its_totals() -> None:
    console = Console(width=200, record=True)
    reconciliation([run()], console)
    summary = render([run()]).partition('<section id="summary">')[2].partition("</section>")[0]

    assert console.export_text().count(LSTM) == 1
    assert to_markdown([run()]).replace("\\", "").count(LSTM) == 1
    assert summary.count(LSTM) == 1
