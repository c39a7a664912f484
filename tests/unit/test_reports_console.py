"""Records on a console: what is said, that nothing is cut off, and that hostile names do
nothing."""

from __future__ import annotations

import dataclasses
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import report_fixtures as fixtures
from rich.cells import cell_len
from rich.console import Console

from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import Case, MemoryRecord
from bf16prof.reports import console as reports
from bf16prof.reports.console.layout import PIPE_WIDTH
from bf16prof.verdict import gpu_limit
from bf16prof.vocabulary import Offload, Source

GIB = 2**30


@dataclass(frozen=True)
class Refused:
    case: Case
    reason: str
    alternatives: tuple[str, ...]


def screen(width: int = PIPE_WIDTH, terminal: bool = False) -> Console:
    colours: Literal["truecolor"] | None = "truecolor" if terminal else None
    return Console(file=io.StringIO(), width=width, highlight=False, emoji=False, force_terminal=terminal, color_system=colours)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def grid(records: list[MemoryRecord], width: int = PIPE_WIDTH, **more: object) -> str:
    console = screen(width)
    reports.estimate_grid(records, [], console, **more)  # type: ignore[arg-type]
    return said(console)


def on_a_gpu(allocated: int, peak: int | None = None, gpu: str = "l4-24gb") -> MemoryRecord:
    return dataclasses.replace(fixtures.bare_record(), gpu=gpu, allocated_bytes=allocated, run_peak_allocated_bytes=peak)


def without_peak(record: MemoryRecord) -> MemoryRecord:
    return dataclasses.replace(record, peak_allocated_bytes=None)


def line_with(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if all(word in line for word in words))


class TestGrid:
    def test_rows_are_stages_and_gpus_and_columns_are_recipes(self) -> None:
        text = grid([fixtures.estimate(case) for case in fixtures.cases()])
        assert line_with(text, "ZeRO", "GPUs").split() == ["ZeRO", "GPUs", "bf16-fp32-master", "bf16-full"]
        assert line_with(text, "14.60 GiB").split() == ["1", "2", "14.60", "GiB", "10.25", "GiB"]

    def test_each_cell_says_in_words_whether_it_fits(self) -> None:
        room = gpu_limit(find_gpu("l4-24gb"), 2)
        assert "! tight" in grid([on_a_gpu(room - 7 * GIB // 4, room - 7 * GIB // 4 + 1)])
        assert "✗ does not fit, 2.50 GiB too much" in grid([on_a_gpu(room + 5 * GIB // 2)])
        assert "on NVIDIA L4 with 22.03 GiB" in grid([on_a_gpu(room)])

    def test_a_known_peak_decides(self) -> None:
        text = grid([on_a_gpu(GIB, gpu_limit(find_gpu("l4-24gb"), 2) + GIB)])
        assert "✗ does not fit, 1.00 GiB too much" in text
        assert "the caching allocator's share may not" in text

    @pytest.mark.parametrize("gpu", ["", "a card of tomorrow"])
    def test_of_an_unknown_gpu_nothing_is_said(self, gpu: str) -> None:
        text = grid([on_a_gpu(GIB, gpu=gpu)])
        assert "free" not in text
        assert "fragmentation" not in text

    def test_an_unknown_peak_is_said(self) -> None:
        assert "The peak is not known by this source yet" in grid([without_peak(fixtures.estimate(fixtures.case()))])

    def test_refusals_are_footnotes(self) -> None:
        console = screen()
        refused = [Refused(fixtures.case(recipe=name), "no master copy above stage 0", ("bf16-full",)) for name in ("bf16-pure", "apex-o1")]
        reports.estimate_grid([fixtures.estimate(fixtures.case())], refused, console)
        assert said(console).count("- [1]") == 2
        assert "[1] bf16-pure, apex-o1: no master copy above stage 0; instead: bf16-full" in said(console)

    def test_refusals_without_any_record(self) -> None:
        console = screen()
        reports.estimate_grid([], [Refused(fixtures.case(), "no", ())], console)
        assert "[1] bf16-fp32-master: no" in said(console)

    def test_textbook_rules_stand_under_the_estimate(self) -> None:
        record = fixtures.estimate(fixtures.case())
        text = grid([record], textbook={record.case: {"ZeRO paper 16N": 8 * fixtures.PARAMETERS}})
        assert line_with(text, "ZeRO paper 16N").split()[-4:] == ["11.61", "GiB", "-0.80", "%"]

    def test_offload_has_a_column_when_it_is_used(self) -> None:
        case = dataclasses.replace(fixtures.case(), offload=Offload.OPTIMIZER)
        assert "offload" in grid([fixtures.estimate(case)])
        assert "offload" not in grid([fixtures.estimate(fixtures.case())])

    def test_nothing_is_known(self) -> None:
        assert "?" in grid([fixtures.bare_record()])


class TestReconciliation:
    def report(self, records: list[MemoryRecord], width: int = PIPE_WIDTH) -> str:
        console = screen(width)
        reports.reconciliation([fixtures.run(records)], console)
        return said(console)

    def test_equality_is_called_exact(self) -> None:
        text = self.report([fixtures.estimate(fixtures.case()), fixtures.measure(fixtures.case())])
        assert line_with(text, "allocated", "11.70 GiB").endswith("exact (0 B)")
        assert "1 of 1 predictions exact to the byte" in text
        assert "exact" not in line_with(text, "training peak", "15.32 GiB")

    def test_one_byte_is_not_exact(self) -> None:
        text = self.report([fixtures.estimate(fixtures.case(), 1), fixtures.measure(fixtures.case())])
        assert "+1 B (+0.000001 %)" in line_with(text, "buffers")
        assert "0 of 1 predictions exact" in text

    def test_sources_stand_side_by_side_with_the_measurement_first(self) -> None:
        simulated = dataclasses.replace(fixtures.estimate(fixtures.case(), -2048), source=Source.SIMULATE)
        text = self.report([simulated, fixtures.estimate(fixtures.case()), fixtures.measure(fixtures.case())])
        header = line_with(text, "quantity")
        assert header.index("measure") < header.index("estimate - measure") < header.index("simulate - measure")
        assert "-2.00 KiB" in line_with(text, "buffers")

    def test_predictions_alone(self) -> None:
        text = self.report([fixtures.estimate(fixtures.case())])
        assert "nothing was measured" in text
        assert "11.70 GiB" in text

    def test_nothing_known_and_nothing_at_all(self) -> None:
        assert "zero3" in self.report([fixtures.bare_record(), fixtures.bare_record(source=Source.MEASURE)])
        assert "No records." in self.report([])


class TestBreakdown:
    def test_components_add_up_and_items_are_named(self) -> None:
        console = screen()
        reports.breakdown(fixtures.measure(fixtures.case()), console)
        assert "deepspeed/runtime/zero/stage3.py: ipg_buckets" in line_with(said(console), "reduce bucket", "50,000,000")
        assert "10,000,000" in line_with(said(console), "(not itemised)")
        assert "100.0 %" in line_with(said(console), "allocated", "GiB", "%")
        assert "training peak 15.32 GiB (in backward)" in said(console)

    def test_nothing_is_known(self) -> None:
        console = screen()
        reports.breakdown(fixtures.bare_record(), console)
        assert "?" in said(console)


class TestPeak:
    def report(self, record: MemoryRecord, width: int = PIPE_WIDTH) -> str:
        console = screen(width)
        reports.breakdown(record, console)
        return said(console).partition("At the training peak (backward)")[2]

    def test_components_stand_beside_those_between_steps_and_add_up(self) -> None:
        record = fixtures.simulate(fixtures.case())
        text = self.report(record).partition("largest")[0]
        assert line_with(text, "activations").split()[:5] == ["activations", "0", "B", "1.55", "GiB"]
        assert line_with(text, "allocated").split()[1:] == [
            "11.70",
            "GiB",
            "13.50",
            "GiB",
            f"{record.peak_allocated_bytes:,}",
            "100.0",
            "%",
        ]
        sizes = [int(line.split()[-3].replace(",", "")) for line in text.splitlines() if line.endswith("%")]
        assert sum(sizes[:-1]) == sizes[-1] == record.peak_allocated_bytes
        assert sizes[:-1] == sorted(sizes[:-1], reverse=True)

    def test_the_largest_tensors_are_named_and_the_rest_is_counted(self) -> None:
        record = fixtures.simulate(fixtures.case())
        rows = [line for line in self.report(record).partition("largest")[2].splitlines() if line.endswith("%")]
        assert len(rows) == 13
        assert rows[-1].startswith(f"({len(record.peak_items) - 12} smaller ones)")
        assert sum(int(row.split()[-3].replace(",", "")) for row in rows) == sum(item.bytes for item in record.peak_items)
        assert self.report(dataclasses.replace(record, peak_items=record.peak_items[:3])).count("smaller ones") == 0

    def test_what_the_device_adds_and_the_verdict_follow(self) -> None:
        text = self.report(fixtures.simulate(fixtures.case()))
        assert "on the device besides the allocator: CUDA context 500.00 MiB (assumed: 500 MiB)" in text
        assert "fragmentation 512.00 MiB" in text
        assert "✓ fits h100-80gb: the step's peak is 13.50 GiB (backward) of the 78.69 GiB that the allocator may reserve; " in text
        assert "15.00 GiB reserved; 15.49 of 79.18 GiB on the device" in text

    def test_who_knows_no_peak_shows_none(self) -> None:
        console = screen()
        reports.breakdown(fixtures.measure(fixtures.case()), console)
        assert "At the training peak" not in said(console)
        assert "fits" not in said(console)


class TestVerdict:
    def report(self, width: int = PIPE_WIDTH, terminal: bool = False) -> str:
        console = screen(width, terminal)
        reports.reconciliation([fixtures.simulated_run()], console)
        return said(console)

    def test_every_case_has_a_line_of_its_own_and_a_cell_in_the_summary(self) -> None:
        text = self.report()
        assert text.count("✓ fits h100-80gb: ") == 4
        assert text.count("; it runs out of memory in the backward phase of the first step, allocating 384.00 MiB for") == 2
        summary = text.partition("Summary")[2]
        assert line_with(summary, "zero1-w2-bf16-fp32-master").split()[-2:] == ["GiB", "free"]
        assert "! tight" in line_with(summary, "zero1-w2-bf16-full")

    def test_in_a_pipe_a_verdict_is_one_whole_line(self) -> None:
        lines = [line for line in self.report().splitlines() if line.startswith("! tight on")]
        assert lines
        assert all(line.endswith("all other numbers are as if there were room") for line in lines)
        assert "\x1b" not in self.report()

    def test_a_narrow_terminal_folds_it(self) -> None:
        assert " ".join(self.report(60).split()).count("all other numbers are as if there were room") == 2

    def test_where_there_is_colour_it_repeats_the_symbol(self) -> None:
        lines = self.report(terminal=True).splitlines()
        assert all(line.startswith("\x1b[33m") for line in lines if "! tight on" in line)
        assert all(line.startswith("\x1b[32m") for line in lines if line.lstrip("\x1b[0123456789m").startswith("✓ fits h100"))

    def test_no_verdict_no_column(self) -> None:
        console = screen()
        reports.reconciliation([fixtures.run()], console)
        assert "fits" not in said(console)

    def test_the_summary_leaves_out_what_no_case_knows(self) -> None:
        assert "step time" not in self.report().partition("Summary")[2]
        console = screen()
        reports.reconciliation([fixtures.run()], console)
        assert "step time" in said(console).partition("Summary")[2]

    def test_totals_stand_side_by_side(self) -> None:
        console = screen()
        case = fixtures.case()
        reports.reconciliation([fixtures.run([fixtures.simulate(case), fixtures.measure(case)])], console)
        assert line_with(said(console), "reserved", "16.38 GiB").endswith("-1.37 GiB (-8.39 %)")
        assert line_with(said(console), "fragmentation").split()[1:] == ["?", "512.00", "MiB"]
        assert "on the device" in said(console)


class TestAnswer:
    @pytest.mark.parametrize("verbose", [False, True])
    def test_a_failed_case_is_said_in_the_short_answer_and_in_the_long_one(self, verbose: bool) -> None:
        console = screen()
        reports.answer([fixtures.failed_run()], console, verbose=verbose)
        assert "rank 1 asked for 2.91 GiB with 138.2 GiB in use" in said(console)

    def test_of_several_runs_each_failure_names_its_own(self) -> None:
        console = screen()
        failed = fixtures.failed_run()
        reports.answer([failed, dataclasses.replace(failed, path=Path("runs/other"))], console, verbose=False)
        assert "runs/other: zero" in said(console)


class TestRunSummary:
    def test_a_finished_run(self) -> None:
        console = screen()
        reports.run_summary(fixtures.run(), console)
        row = "zero1-w2-bf16-full ✓ finished 10.25 GiB 13.42 GiB 399.5 ms 13.0 ms 20,506 10.8 -> 3.724"
        assert " ".join(line_with(said(console), "zero1-w2-bf16-full").split()) == row

    def test_failures_come_with_the_end_of_the_log_and_what_was_predicted(self) -> None:
        console = screen()
        reports.failures(fixtures.failed_run(), console)
        assert "zero1-w2-bf16-full: oom: rank 1 asked for 2.91 GiB" in said(console)
        assert "  estimate: 10.25 GiB allocated, training peak 13.47 GiB" in said(console)
        assert "  | torch.OutOfMemoryError: tried to allocate 2.91 GiB" in said(console)


def everything(console: Console, which: str) -> str:
    """All reports of one run on one console."""
    makers = {"usual": fixtures.run, "failed": fixtures.failed_run, "hostile": fixtures.hostile_run, "extreme": fixtures.extreme_run}
    run = {**makers, "simulated": fixtures.simulated_run}[which]()
    reports.run_summary(run, console)
    reports.failures(run, console)
    reports.reconciliation([run], console)
    reports.estimate_grid([r for r in run.records if r.source is Source.ESTIMATE], [], console)
    for record in run.records[:6]:
        reports.breakdown(record, console)
    return said(console)


@pytest.mark.parametrize("which", ["usual", "failed", "extreme", "simulated"])
def test_nothing_is_cut_off_in_a_pipe(which: str) -> None:
    text = everything(screen(), which)
    assert "…" not in text
    assert max(map(len, text.splitlines())) < 600


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize("which", ["usual", "failed", "hostile", "extreme", "simulated"])
def test_a_narrow_terminal_folds_and_never_crops(which: str, width: int) -> None:
    text = everything(screen(width), which)
    assert all(cell_len(line) <= width for line in text.splitlines())
    if which in {"usual", "simulated"}:
        wide = everything(screen(), which)
        numbers = [word for word in wide.split() if word[0].isdigit()]
        assert not [number for number in numbers if number not in text]


@pytest.mark.parametrize("terminal", [True, False])
def test_hostile_names_are_inert(terminal: bool) -> None:
    text = everything(screen(terminal=terminal), "hostile")
    assert "[/red][bold]red[/bold]" in text
    assert "<script>alert(1)</script>" in text
    assert "\\x1b[31mred" in text
    assert "\x1b[31mred\x1b[0m" not in text
    assert not set("\x07\r\t\u202e\u2066\u200b") & set(text)
    assert "x" * 301 not in text


def test_the_same_input_gives_the_same_output() -> None:
    assert everything(screen(80), "usual") == everything(screen(80), "usual")


class TestMakeConsole:
    @pytest.fixture(autouse=True)
    def _environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM"):
            monkeypatch.delenv(name, raising=False)

    def test_a_pipe_is_wide_and_has_no_colour(self) -> None:
        console = reports.make_console()
        assert console.width == PIPE_WIDTH
        assert not console.is_terminal

    @pytest.mark.parametrize(("columns", "width"), [("72", 72), ("1", 20), ("0", PIPE_WIDTH), ("wide", PIPE_WIDTH)])
    def test_columns_limit_the_width(self, monkeypatch: pytest.MonkeyPatch, columns: str, width: int) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        assert reports.make_console().width == width

    def test_colour_can_be_forced_and_forbidden(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
        console = reports.make_console()
        assert console.is_terminal
        assert console.width == PIPE_WIDTH
        reports.run_summary(fixtures.run(), console)
        assert "\x1b[32m" in capsys.readouterr().out
        monkeypatch.setenv("NO_COLOR", "1")
        assert reports.make_console().no_color

    def test_a_dumb_terminal_that_is_forced_keeps_the_width(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "dumb")
        assert reports.make_console().width == PIPE_WIDTH

    def test_stderr_is_another_stream(self) -> None:
        assert reports.make_console(stderr=True).file is not reports.make_console().file

    def test_an_ascii_stream_gets_ascii(self, monkeypatch: pytest.MonkeyPatch) -> None:
        raw = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
        everything_ascii = reports.make_console()
        reports.run_summary(fixtures.run(name="имя"), everything_ascii)
        sys.stdout.flush()
        assert b"Run ???: + finished" in raw.getvalue()
