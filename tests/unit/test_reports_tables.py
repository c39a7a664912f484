"""Records as a frame, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io

import pytest
import report_fixtures as fixtures

from bf16prof.reconcile import reconcile
from bf16prof.records import Component, Source
from bf16prof.reports import tables


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_bytes_are_integers_and_add_up() -> None:
    frame = tables.frame(fixtures.run().records)
    assert len(frame) == 12
    assert str(frame["allocated_bytes"].dtype) == "Int64"
    assert (frame[[f"components.{c}" for c in Component]].sum(axis=1) == frame["allocated_bytes"]).all()


def test_what_is_not_known_is_missing_and_not_zero() -> None:
    frame = tables.frame([fixtures.bare_record()])
    assert frame["allocated_bytes"].isna().all()
    assert frame["components.parameters"].isna().all()
    assert rows(tables.to_csv([fixtures.bare_record()]))[0]["peak_allocated_bytes"] == ""


def test_errors_stand_in_the_row_of_their_source() -> None:
    records = [fixtures.estimate(fixtures.case(), 1200), fixtures.measure(fixtures.case())]
    estimate, measure = rows(tables.to_csv(records, reconcile(records)))
    assert estimate["error.components.buffers"] == "1.2e-05"
    assert measure["error.components.buffers"] == ""
    assert not [name for name in rows(tables.to_csv(records))[0] if name.startswith("error")]


def test_large_and_negative_numbers_survive_csv() -> None:
    values = rows(tables.to_csv(fixtures.extreme_run().records))
    assert values[1]["allocated_bytes"] == str(2**62)
    assert values[1]["peak_allocated_bytes"] == str(2**63 - 1)
    assert values[1]["components.other"] == "-5"


def test_integers_beyond_64_bits_do_not_break_the_frame() -> None:
    assert tables.frame([fixtures.bare_record(fixtures.case(world=2**70))])["world_size"][0] == 2**70


def test_a_csv_of_hostile_names_is_whole_and_holds_no_formula() -> None:
    text = tables.to_csv(fixtures.hostile_run().records)
    assert len(text.splitlines()) == 2 * len(fixtures.HOSTILE) + 1
    assert text.isascii()
    for row in rows(text):
        assert None not in row
        assert not any(value.startswith(("=", "+", "@", "\t", "-")) for value in (row["profile"], row["recipe"], row["notes"], row["gpu"]))
        assert all(value.isprintable() for value in row.values())
    assert "x" * 300 in text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\uff1d1"])
def test_formulas_get_a_quote(text: str) -> None:
    assert str(tables.csv_text(text)).startswith("'")


@pytest.mark.parametrize("text", ["bf16-full", "", "a=b", "2-3", 12, -5, 0.5])
def test_other_cells_stay(text: object) -> None:
    assert tables.csv_text(text) == text


def test_markdown_is_for_people() -> None:
    text = tables.to_markdown([fixtures.run([fixtures.estimate(fixtures.case()), fixtures.measure(fixtures.case())])])
    assert "| zero3-w2-bf16-fp32-master | gpt2-1.5b | estimate |   11.70 GiB |             exact |" in text
    assert "| parameters" in text or "parameters |" in text


def test_markdown_of_hostile_names_keeps_its_shape() -> None:
    run = fixtures.hostile_run()
    text = tables.to_markdown([run])
    tables_of_it = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    for table in tables_of_it:
        assert len(table) == len(run.records) + 2
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    assert "<script>" not in text
    assert "<a href" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_markdown_of_pipes_and_newlines() -> None:
    assert tables.markdown_text("a|b\n[c](d) `e` *f*") == "a\\|b\\\\n\\[c\\](d) \\`e\\` \\*f\\*"


def test_nothing_at_all() -> None:
    assert tables.to_csv([]).startswith("source,profile,zero_stage")
    assert tables.to_markdown([]) == "No records.\n"
    assert "estimate" in tables.to_markdown([fixtures.run([fixtures.bare_record(), fixtures.bare_record(source=Source.MEASURE)])])


def test_the_same_input_gives_the_same_output() -> None:
    assert tables.to_markdown([fixtures.failed_run()]) == tables.to_markdown([fixtures.failed_run()])
    assert tables.to_csv(fixtures.failed_run().records) == tables.to_csv(fixtures.failed_run().records)
