"""Records as a frame, as CSV and as Markdown."""

from __future__ import annotations

import csv
import io

import pytest
import report_fixtures as fixtures

from bf16prof.reports import tables, written
from bf16prof.vocabulary import Component, Source


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_bytes_are_integers_and_add_up() -> None:
    frame = tables.frame([fixtures.simulated_run()])
    assert len(frame) == 12
    assert str(frame["allocated_bytes"].dtype) == str(frame["peak_components.buffers"].dtype) == "Int64"
    assert (frame[[f"components.{c}" for c in Component]].sum(axis=1) == frame["allocated_bytes"]).all()
    simulated = frame[frame["source"] == "simulate"]
    assert (simulated[[f"peak_components.{c}" for c in Component]].sum(axis=1) == simulated["peak_allocated_bytes"]).all()
    assert simulated["fragmentation_bytes"].eq(2**29).all()


def test_what_is_not_known_is_missing_and_not_zero() -> None:
    bare = [fixtures.run([fixtures.bare_record()])]
    frame = tables.frame(bare)
    assert frame["allocated_bytes"].isna().all()
    assert frame["components.parameters"].isna().all()
    assert frame["peak_components.parameters"].isna().all()
    assert rows(tables.to_csv(bare))[0]["peak_allocated_bytes"] == ""


def test_errors_stand_in_the_row_of_their_source() -> None:
    records = [fixtures.estimate(fixtures.case(), 1200), fixtures.measure(fixtures.case())]
    estimate, measure = rows(tables.to_csv([fixtures.run(records)]))
    assert estimate["error.components.buffers"] == "1.2e-05"
    assert measure["error.components.buffers"] == ""
    assert not [name for name in rows(tables.to_csv([fixtures.run(records[:1])]))[0] if name.startswith("error")]


def test_two_runs_of_the_same_case_keep_their_own_errors() -> None:
    measured = fixtures.measure(fixtures.case())
    runs = [fixtures.run([fixtures.estimate(fixtures.case(), size), measured], name=name) for name, size in (("a", 1200), ("b", 2400))]
    table = rows(tables.to_csv(runs))
    assert [(row["run"], row["source"], row["error.components.buffers"]) for row in table] == [
        ("a", "estimate", "1.2e-05"), ("a", "measure", ""), ("b", "estimate", "2.4e-05"), ("b", "measure", ""),
    ]  # fmt: skip
    assert "run" not in rows(tables.to_csv(runs[:1]))[0]
    markdown = tables.to_markdown(runs).splitlines()
    assert sum("| a " in line for line in markdown) == sum("| b " in line for line in markdown) == 4


def test_a_measurement_in_another_run_is_found() -> None:
    runs = [fixtures.run([fixtures.estimate(fixtures.case(), 1200)], name="a"), fixtures.run([fixtures.measure(fixtures.case())], name="b")]
    assert [row["error.components.buffers"] for row in rows(tables.to_csv(runs))] == ["1.2e-05", ""]


def test_running_out_of_memory_is_a_column_and_a_line() -> None:
    run = fixtures.simulated_run()
    told = [row["out_of_memory"] for row in rows(tables.to_csv([run]))]
    assert sum(map(bool, told)) == 2
    assert all("it runs out of memory in the backward phase" in text for text in told if text)
    assert [row["verdict"] for row in rows(tables.to_csv([run]))].count("tight") == 2
    markdown = tables.to_markdown([run])
    assert markdown.count("| ! tight") == 2
    assert markdown.count("\n* zero") == 2


def test_large_numbers_survive_csv() -> None:
    values = rows(tables.to_csv([fixtures.extreme_run()]))
    assert values[1]["allocated_bytes"] == str(2**62)
    assert values[1]["peak_allocated_bytes"] == str(2**63 - 1)
    assert values[1]["components.other"] == "5"


def test_integers_beyond_64_bits_do_not_break_the_frame() -> None:
    assert tables.frame([fixtures.run([fixtures.bare_record(fixtures.case(world=2**70))])])["world_size"][0] == 2**70


def test_a_csv_of_hostile_names_is_whole_and_holds_no_formula() -> None:
    text = tables.to_csv([fixtures.hostile_run(), fixtures.run([], name=fixtures.HOSTILE[5])])
    assert len(text.splitlines()) == 3 * len(fixtures.HOSTILE) + 1
    assert text.replace("…", "").isascii()
    for row in rows(text):
        assert None not in row
        assert not any(
            value.startswith(("=", "+", "@", "\t", "-")) for value in (row["profile"], row["recipe"], row["notes"], row["gpu"], row["run"])
        )
        assert all(value.isprintable() for value in row.values())
    assert "x" * 300 in text


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "  =1", "\uff1d1"])
def test_formulas_get_a_quote(text: str) -> None:
    assert str(written.csv_text(text)).startswith("'")


@pytest.mark.parametrize("text", ["bf16-full", "", "a=b", "2-3", 12, -5, 0.5])
def test_other_cells_stay(text: object) -> None:
    assert written.csv_text(text) == text


def test_markdown_is_for_people() -> None:
    text = tables.to_markdown([fixtures.run([fixtures.estimate(fixtures.case()), fixtures.measure(fixtures.case())])])
    assert "| zero3-w2-bf16-fp32-master | gpt2-1.5b | estimate |   11.70 GiB |             exact |" in text
    assert "| parameters" in text or "parameters |" in text


def test_markdown_of_hostile_names_keeps_its_shape() -> None:
    run = fixtures.hostile_run()
    text = tables.to_markdown([run])
    tables_of_it = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert [len(table) - 2 for table in tables_of_it] == [27, 9, 9, 27, 9]
    for table in tables_of_it:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    told = [line for line in text.splitlines() if line.startswith("* ")]
    assert len(told) == len(fixtures.HOSTILE)
    assert all(line.count("runs out of memory") == 1 and line.isprintable() for line in told)
    assert "<script>" not in text
    assert "<a href" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_markdown_of_pipes_and_newlines() -> None:
    assert written.markdown_text("a|b\n[c](d) `e` *f*") == "a\\|b\\\\n\\[c\\](d) \\`e\\` \\*f\\*"


def test_nothing_at_all() -> None:
    assert tables.to_csv([]).startswith("source,profile,zero_stage")
    assert tables.to_markdown([]) == "No records.\n"
    assert "estimate" in tables.to_markdown([fixtures.run([fixtures.bare_record(), fixtures.bare_record(source=Source.MEASURE)])])


def test_the_same_input_gives_the_same_output() -> None:
    assert tables.to_markdown([fixtures.failed_run()]) == tables.to_markdown([fixtures.failed_run()])
    assert tables.to_csv([fixtures.failed_run()]) == tables.to_csv([fixtures.failed_run()])
