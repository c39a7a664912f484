"""What others logged: each format, as its writer prints it."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from logs import BREAKDOWN, EXAMPLE, LOSSES, SAMPLES, only, read, record, written

from bf16prof.errors import InputError
from bf16prof.imports.files import read_files
from bf16prof.imports.finding import GIB, Reading, highest, rounded, total
from bf16prof.imports.memory_usage import MemoryUsageReader
from bf16prof.imports.record import joined_steps
from bf16prof.imports.timers import TimersReader
from bf16prof.step_records import StepRecord
from bf16prof.vocabulary import Phase, Source

BYTES = st.integers(0, 2**42)


# Rounding.


@settings(deadline=None)
@given(BYTES)
def test_a_reading_holds_what_was_rounded_and_no_more_than_rounding_leaves_open(size: int) -> None:
    reading = rounded(f"{size / GIB:.2f}", GIB, 2)  # train.py, format_memory

    assert reading.low <= size <= reading.high
    assert reading.rounding <= Fraction(GIB, 200)


def test_the_published_numbers_are_intervals_of_five_mebibytes_either_way() -> None:
    assert rounded("25.74", GIB, 2) == Reading(27_638_114_550, 5_368_709)
    assert rounded("0.00", GIB, 2).low == 0


@settings(deadline=None)
@given(BYTES, BYTES)
def test_the_highest_of_two_rounded_readings_is_the_rounded_highest(one: int, other: int) -> None:
    both = highest([rounded(f"{size / GIB:.2f}", GIB, 2) for size in (one, other)])

    assert both is not None
    assert both.low <= max(one, other) <= both.high
    assert highest([]) is None


@pytest.mark.parametrize(
    ("low", "left"),
    [(80, (90, 110)), (90, (90, 110)), (95, (94, 110)), (96, (96, 110)), (110, (110, 110)), (111, (90, 110)), (200, (90, 110))],
)
@pytest.mark.parametrize("is_floor", [False, True])
def test_a_reading_is_no_lower_than_what_it_includes(low: int, left: tuple[int, int], *, is_floor: bool) -> None:
    """From 90 to 110. What contradicts it changes nothing; 95 to 110 has no middle, so that there
    is one below."""
    found = Reading(100, 10, is_floor).no_lower_than(Reading(low + 3, 3))

    assert (found.low, found.top) == left
    assert found.is_floor is is_floor


def test_a_reading_that_says_as_much_already_stays_as_it_is() -> None:
    assert Reading(1, 5).no_lower_than(Reading(0)) == Reading(1, 5)


@pytest.mark.parametrize("is_floor", [False, True])
def test_a_sum_is_a_lower_bound_where_a_part_is_one(*, is_floor: bool) -> None:
    assert total([Reading(100, 2), Reading(30, 1, is_floor)]) == Reading(130, 3, is_floor)


# The example.


def test_the_example_says_bytes_parameters_steps_and_times() -> None:
    found = record([EXAMPLE])

    assert found.source is Source.IMPORT
    assert found.parameters == 6_855_902_032
    assert (found.allocated_bytes, found.run_peak_allocated_bytes) == (27_642_820_608, 33_692_487_680), "of the rank that holds most"
    assert found.peak_allocated_bytes is None, "the script's peak includes init"
    assert found.step_time_s == 0.6018, "of the slowest rank"
    assert [(s.step, s.time_s) for s in found.steps] == [(0, 3.115), (5, 0.603)]
    assert [s.loss for s in found.steps] == [pytest.approx(10.9892), pytest.approx(9.2)], "means over the ranks"
    assert found.loss == pytest.approx(9.2)
    assert "allocated_bytes" not in found.rounding
    assert found.rounding == {"phases.init.end_bytes": 5_368_709}


def test_the_example_is_understood_but_for_what_deepspeed_says_in_between() -> None:
    (file,) = read_files([EXAMPLE]).files

    assert file.rest == 1
    assert str(file) == "example-stdout.log: output of DeepSpeed's bf16 example (33); not understood: 1"


def test_without_its_last_line_the_block_is_read_with_its_rounding(tmp_path: Path) -> None:
    text = "\n".join(line for line in EXAMPLE.read_text().splitlines() if not line.startswith("SUMMARY"))

    found = record(written(tmp_path, text))

    assert found.rounding["allocated_bytes"] == found.rounding["run_peak_allocated_bytes"] == 5_368_709
    assert abs((found.allocated_bytes or 0) - 27_642_820_608) <= 5_368_709
    assert found.step_time_s == 0.602
    assert any(note.startswith("printed rounded") and "allocated_bytes" in note for note in found.notes)


def test_a_job_that_died_leaves_the_memory_of_its_last_step(tmp_path: Path) -> None:
    text = EXAMPLE.read_text().partition("=====")[0]

    found = record(written(tmp_path, text))

    assert abs((found.run_peak_allocated_bytes or 0) - 33_692_487_680) <= 5_368_709
    assert "the log ends before its results" in " ".join(found.notes)
    assert found.step_time_s == pytest.approx((3.115 + 0.603) / 2), "a median, as nobody has printed a mean"


@pytest.mark.parametrize("prefix", ["", "3: ", "node-1: \x1b[32m"])
def test_what_a_launcher_puts_before_a_line_does_not_matter(prefix: str, tmp_path: Path) -> None:
    line = "SUMMARY: config=c.json batch_size=4 params=10 peak_mem_bytes=300 alloc_mem_bytes=200 avg_step_time=0.5000"

    finding = only(tmp_path, prefix + line + "\n")

    assert finding.readings == {"allocated_bytes": Reading(200), "run_peak_allocated_bytes": Reading(300)}
    assert finding.config == "c.json"


def test_a_script_that_saw_no_gpu_has_no_memory(tmp_path: Path) -> None:
    finding = only(tmp_path, "SUMMARY: config=c params=10 peak_mem_bytes=0 alloc_mem_bytes=0 avg_step_time=0.5\n")

    assert finding.readings == {}
    assert "no CUDA" in finding.notes[0]


@pytest.mark.parametrize(
    "more",
    [
        "SUMMARY: config=configs/other.json params=6855902032 peak_mem_bytes=2 alloc_mem_bytes=1 avg_step_time=1.0",
        "[Rank 0] Step 5: loss=9.1000, time=0.601s, alloc_mem=25.74 GB, peak_mem=31.38 GB",
        "[Rank 1] FINAL RESULTS",
    ],
)
def test_two_runs_are_not_mixed(more: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"several runs|more than one run"):
        read(tmp_path, EXAMPLE.read_text(), more + "\n")


# CSV files of losses.


def test_losses_are_read_and_those_that_are_no_numbers_are_said(tmp_path: Path) -> None:
    finding = only(tmp_path, LOSSES)

    assert [(s.step, s.loss) for s in finding.steps] == [(0, 10.98828125), (1, 10.5), (2, None), (5, 9.1015625)]
    assert finding.notes == ("the loss was not finite in 1 of 4 steps, first in step 2",)
    assert [step.step for step in finding.steps if step.loss_not_finite] == [2]


def test_a_loss_that_one_format_says_was_not_finite_is_not_filled_in_by_another() -> None:
    """A rank's NaN in the stdout, and rank 0's own loss in its CSV; a timer, which knows no loss,
    says nothing of it."""
    stdout = [StepRecord(0, 5.0, 0.1, None), StepRecord(1, None, 0.1, None, loss_not_finite=True)]
    csv = [StepRecord(step, 4.0, None, None) for step in (1, 2)]
    timers = [StepRecord(step, None, 0.2, None) for step in range(4)]

    joined = joined_steps([stdout, csv, timers])

    assert [(s.loss, s.loss_not_finite) for s in joined] == [(5.0, False), (None, True), (4.0, False), (None, False)]


def test_a_last_row_that_may_have_been_cut_is_said(tmp_path: Path) -> None:
    finding = only(tmp_path, LOSSES + "6,1")

    assert finding.steps[-1].loss == 1
    assert finding.notes[-1] == "the last line of the losses does not end: its number may have been cut"


def test_other_columns_and_bad_rows_do_not_matter(tmp_path: Path) -> None:
    sources = read(
        tmp_path,
        "\ufefftime,loss,step\r\n1.0,2.5,7\r\nx,y,z\r\n\r\n3.0\r\n",
    )

    assert [(s.step, s.loss) for s in sources.findings[0].steps] == [(7, 2.5)]
    assert sources.files[0].rest == 2


def test_a_step_that_comes_twice_means_several_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="step 0 is there twice"):
        read(tmp_path, LOSSES, LOSSES + "6,9.0\n")


def test_a_file_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log1: the same as .*log0"):
        read(tmp_path, SAMPLES, SAMPLES)


# see_memory_usage.


def test_deepspeeds_own_lines_become_phases() -> None:
    found = record([BREAKDOWN])

    for phase, peak, end in (("init", 0.36, 0.36), ("forward", 0.38, 0.38), ("backward", 0.38, 0.38), ("step", 0.38, 0.38)):
        memory = found.phases[Phase(phase)]
        assert memory.peak_bytes == pytest.approx(peak * GIB, abs=10), phase
        assert memory.end_bytes == pytest.approx(end * GIB, abs=10), phase
    assert found.allocated_bytes == pytest.approx(0.38 * GIB, abs=10)
    assert found.run_peak_allocated_bytes == found.peak_allocated_bytes
    assert found.rounding["allocated_bytes"] == 5_368_709
    reserved, rounding = found.reserved_bytes or 0, found.rounding["reserved_bytes"]
    assert (reserved - rounding) / GIB == pytest.approx(0.375, abs=1e-5), "0 GB without decimals, and at least 0.38"
    assert (reserved + rounding) / GIB == pytest.approx(0.5, abs=1e-5)


def usage(message: str, now: float, most: float, reserved: float = 9.0, most_reserved: int = 9) -> str:
    """What DeepSpeed prints."""
    return f"{message}\nMA {now} GB         Max_MA {most} GB         CA {reserved} GB         Max_CA {most_reserved} GB \n"


def test_what_another_rank_prints_between_a_message_and_its_line_changes_nothing() -> None:
    lines = BREAKDOWN.read_text().splitlines()
    disturbed = [part for line in lines for part in (["[rank1] hello", line] if "Max_MA" in line else [line])]
    alone, among_others = MemoryUsageReader(), MemoryUsageReader()
    for reader, texts in ((alone, lines), (among_others, disturbed)):
        for text in texts:
            reader.line(text)

    assert len(disturbed) > len(lines)
    assert among_others.finding() == alone.finding()


def test_what_lies_between_two_lines_belongs_to_the_phase_that_is_open(tmp_path: Path) -> None:
    lines = [
        usage("After initializing ZeRO optimizer", 3.0, 5.5),
        usage("[2023-01-01 00:00:00,000] [INFO] [utils.py:800:see_memory_usage] Engine before forward", 2.0, 3.0),
        usage("Engine after forward", 2.5, 4.0),
        usage("my own line", 2.75, 4.25),
        usage("Engine before backward", 2.5, 2.5),
        usage("after the backward pass", 3.0, 6.0),
        usage("Before step", 3.0, 3.0),
        usage("after step 1", 2.25, 3.5),
        usage("Engine before forward", 2.25, 7.0, 9.5, 10),
    ]

    readings = only(tmp_path, "".join(lines)).readings
    gb = {name: round(reading.bytes / GIB, 2) for name, reading in readings.items()}

    assert gb == {
        "allocated_bytes": 2.25, "run_peak_allocated_bytes": 7.0, "peak_allocated_bytes": 6.0, "reserved_bytes": 10.0,
        "phases.init.peak_bytes": 5.5, "phases.init.end_bytes": 2.0,
        "phases.forward.peak_bytes": 4.25, "phases.forward.end_bytes": 2.5,
        "phases.backward.peak_bytes": 6.0, "phases.backward.end_bytes": 3.0,
        "phases.step.peak_bytes": 3.5, "phases.step.end_bytes": 2.25,
    }  # fmt: skip


def test_a_first_line_after_a_phase_says_nothing_of_it_alone(tmp_path: Path) -> None:
    readings = only(tmp_path, usage("after forward", 2.0, 30.0) + usage("after backward", 2.5, 4.0)).readings

    assert "phases.forward.peak_bytes" not in readings, "init is in that peak"
    assert round(readings["phases.backward.peak_bytes"].bytes / GIB, 2) == 4.0
    assert "allocated_bytes" not in readings
    assert round(readings["run_peak_allocated_bytes"].bytes / GIB, 2) == 30.0


def test_training_is_proved_by_whole_phases_alone_however_the_log_begins(tmp_path: Path) -> None:
    """A log that was cut in front never closes init, and knows training all the same."""
    step = usage("after forward", 2.0, 30.0) + usage("after backward", 2.5, 4.0) + usage("after step", 1.0, 3.0)

    readings = only(tmp_path, step + usage("before forward", 1.0, 1.0) + step).readings

    assert not readings["peak_allocated_bytes"].is_floor
    assert not readings["phases.forward.peak_bytes"].is_floor
    assert only(tmp_path, step).readings["peak_allocated_bytes"].is_floor, "forward was never seen alone"


@pytest.fixture(scope="module")
def see_memory_usage() -> Callable[..., str]:
    """DeepSpeed's function over made-up bytes; what it printed."""
    from deepspeed.runtime import utils

    def call(allocated: int, peak: int, reserved: int, reserved_peak: int) -> str:
        accelerator = SimpleNamespace(
            memory_allocated=lambda: allocated, max_memory_allocated=lambda: peak, reset_peak_memory_stats=lambda: None
        )
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
            patch.setattr(utils, "get_accelerator", lambda: accelerator)
            patch.setattr(utils, "torch_memory_reserved", lambda: reserved)
            patch.setattr(utils, "torch_max_memory_reserved", lambda: reserved_peak)
            patch.setattr(utils.gc, "collect", lambda: None)
            utils.see_memory_usage("Engine after step", force=True)
        return out.getvalue()

    return call


@settings(max_examples=40, deadline=None)
@example([0, 2**29], [0, 2**29])
@example([2**29, 2**29], [2**29, 2**29])
@example([2**29 + 1, 2**29 + 1], [3 * 2**29, 3 * 2**29])
@given(st.tuples(BYTES, BYTES).map(sorted), st.tuples(BYTES, BYTES).map(sorted))
def test_what_deepspeed_itself_prints_of_any_bytes_is_read_with_its_rounding(
    see_memory_usage: Callable[..., str], memory: list[int], cache: list[int]
) -> None:
    reader = MemoryUsageReader()

    lines = [reader.line(line) for line in see_memory_usage(*memory, *cache).splitlines()]
    finding = reader.finding()

    assert lines == [0, 2, 1]
    assert finding is not None
    truth = {"allocated_bytes": memory[0], "run_peak_allocated_bytes": memory[1], "reserved_bytes": cache[1]}
    for name, size in truth.items():
        reading = finding.readings[name]
        assert reading.low <= size <= reading.high, name
        assert reading.rounding <= (GIB // 2 if name == "reserved_bytes" else GIB // 200)


# Timers.


def test_deepspeeds_timers_become_steps() -> None:
    found = record([BREAKDOWN])

    assert [step.time_s for step in found.steps] == [
        pytest.approx((2.28 + 935.92 + 9.77) / 1e3), pytest.approx((0.86 + 896.28 + 2.99) / 1e3), pytest.approx(found.steps[2].time_s),
    ]  # fmt: skip
    assert len(found.steps) == 3, "of six micro-steps"
    assert found.step_time_iqr_s is not None
    assert sum("medians of 3 steps: forward 0.86 ms" in note for note in found.notes) == 1


def test_timers_of_older_versions_are_read(tmp_path: Path) -> None:
    line = "[INFO] [logging.py:68:log_dist] [Rank 0] rank=0 time (ms) | forward: 100.50 | backward: 200.25 | step: 50.00"

    assert [step.time_s for step in only(tmp_path, line).steps] == [pytest.approx(0.35075)]


def test_what_the_real_timers_log_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    from deepspeed.utils import timer

    timers = timer.SynchronizedWallClockTimer()
    names = [timer.FORWARD_GLOBAL_TIMER, timer.BACKWARD_GLOBAL_TIMER, timer.BACKWARD_REDUCE_GLOBAL_TIMER, timer.STEP_GLOBAL_TIMER]
    for name in names:
        timers(name).start()
        timers(name).stop()
        timers(name).event_timers = [0.25]
    capsys.readouterr()

    timers.log(names)
    reader = TimersReader()
    lines = [reader.line(line) for line in capsys.readouterr().out.splitlines()]
    finding = reader.finding()

    assert 1 in lines
    assert finding is not None
    assert [step.time_s for step in finding.steps] == [pytest.approx(0.75)]


# nvidia-smi.


def test_samples_of_the_gpu_that_holds_most_are_used(tmp_path: Path) -> None:
    sources = read(tmp_path, SAMPLES)
    (finding,) = sources.findings

    assert finding.readings["device_bytes"] == Reading(39012 * 2**20, 2**20 - 1)
    assert finding.facts == {"gpu": "NVIDIA H100 80GB HBM3", "gpu_utilisation": pytest.approx(0.98), "power_w": pytest.approx(606.165)}
    assert sources.files[0].rest == 1, "a row that ends too early"
    assert "not used: memory.total" in finding.notes[-1]


def test_values_without_units_are_read_and_missing_ones_are_not_invented(tmp_path: Path) -> None:
    finding = only(
        tmp_path, "utilization.gpu [%], memory.used [MiB], power.draw [W]\n[Not Supported], 100, [N/A]\n[N/A], 120, [Unknown Error]\n"
    )

    assert finding.readings["device_bytes"].bytes == 120 * 2**20
    assert finding.facts == {}


# Together.


def test_the_files_of_one_run_join(tmp_path: Path) -> None:
    found = record([EXAMPLE, *written(tmp_path, LOSSES, SAMPLES)])

    assert [(s.step, s.loss, s.time_s) for s in found.steps] == [
        (0, 10.98828125, 3.115), (1, 10.5, None), (2, None, None), (5, 9.1015625, 0.603),
    ]  # fmt: skip
    assert found.loss == 9.1015625, "with all its digits, as the CSV has it"
    assert found.allocated_bytes == 27_642_820_608
    assert found.gpu == "NVIDIA H100 80GB HBM3"
    assert found.device_bytes == 39012 * 2**20


def test_the_more_exact_of_two_numbers_is_used_and_a_contradiction_is_said(tmp_path: Path) -> None:
    exact = "SUMMARY: config=c params=10 peak_mem_bytes=3221225472 alloc_mem_bytes=2147483649 avg_step_time=0.5\n"

    agree = record(written(tmp_path, exact + usage("after step", 2.0, 3.0)))
    differ = record(written(tmp_path, exact + usage("after step", 2.5, 3.0)))

    assert agree.allocated_bytes == differ.allocated_bytes == 2147483649
    assert not [note for note in agree.notes if "contradict" in note]
    assert len([note for note in differ.notes if re.search("contradict.*allocated_bytes: 2147483649 by .*, 2684354560 by", note)]) == 1


def test_less_reserved_than_allocated_is_a_contradiction(tmp_path: Path) -> None:
    log = "Engine after step\nMA 25.74 GB  Max_MA 31.38 GB  CA 20.00 GB  Max_CA 20 GB\n"
    found = record(written(tmp_path, log))

    assert re.search(r"reserved_bytes is \d+, and allocated_bytes \d+; reserved_bytes is \d+, and run_peak", " ".join(found.notes))


def test_the_last_of_the_example_does_not_hide_a_loss_that_was_no_number(tmp_path: Path) -> None:
    log = re.sub(r"(Step \d+: loss=)[0-9.]+", r"\1nan", EXAMPLE.read_text())
    assert "the loss was not finite" in " ".join(only(tmp_path, log).notes)
    assert {step.loss_not_finite for step in only(tmp_path, log).steps} == {True}


def test_a_text_of_which_nothing_is_understood_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of its 2 lines is understood") as caught:
        read(tmp_path, "hello\n\nworld\n")

    assert "\n" not in caught.value.message


@pytest.mark.parametrize("header", ["step,loss\n", "index, memory.used [MiB]\n"])
def test_a_table_without_rows_is_refused(header: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of its 0 rows"):
        read(tmp_path, header)
