"""A log proves what it proves: lower bounds are kept, compared and shown as such, and nothing is
said of what was not seen."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from command_line import Main, main
from logs import only, record, written
from pasted import BACKWARD, ENDS_IN_INIT, OUT_OF_MEMORY

from bf16prof import files, runs
from bf16prof.documents import document
from bf16prof.errors import InputError, ToleranceExceeded
from bf16prof.imports.finding import GIB
from bf16prof.reconcile import Comparison, check_tolerance, reconcile
from bf16prof.records import Case, MemoryRecord
from bf16prof.step_records import PhaseMemory
from bf16prof.vocabulary import Device, Phase, Source

__all__ = ["main"]

CASE = Case("p", 3, 8, "bf16-fp32-master")
FLAGS = ("-p", "llama3-8b", "--gpus", "8", "--zero", "3", "--recipe", "bf16-fp32-master", "--gpu", "h100-80gb")


def usage(message: str, now: float, peak: float) -> str:
    return f"{message}\nMA {now} GB         Max_MA {peak} GB         CA 9.0 GB         Max_CA 9 GB \n"


def test_a_log_that_ends_in_init_has_no_whole_run_peak_and_no_end_of_init(tmp_path: Path) -> None:
    found = record(written(tmp_path, ENDS_IN_INIT))

    assert found.run_peak_allocated_bytes is None
    assert found.peak_allocated_bytes is None
    assert found.phases == {Phase.INIT: PhaseMemory(round(6.5 * GIB), None)}
    assert set(found.at_least) == {"phases.init.peak_bytes", "reserved_bytes"}


def test_a_phase_whose_end_was_not_printed_has_none_and_its_peak_is_open(tmp_path: Path) -> None:
    log = usage("Engine before forward", 2.0, 3.0) + usage("Engine after forward", 4.0, 5.0) + usage("my own line", 4.5, 6.0)

    readings = only(tmp_path, log).readings

    assert "phases.init.end_bytes" in readings
    assert not readings["phases.init.peak_bytes"].is_floor, "before forward closes it"
    assert round(readings["phases.forward.end_bytes"].bytes / GIB, 1) == 4.0, "what a line of somebody's own says is no end"
    assert readings["run_peak_allocated_bytes"].is_floor
    assert "allocated_bytes" not in readings


def test_a_log_with_whole_steps_has_no_lower_bounds(tmp_path: Path) -> None:
    whole = [usage(f"Engine {place} {phase}", 2.0, 3.0) for phase in ("forward", "backward", "step") for place in ("before", "after")]

    assert record(written(tmp_path, "".join(whole))).at_least == ()


# Reconciled as such.


def compared(peak: int, *, at_least: bool = True, rounding: int = 0) -> Comparison:
    bound = ("run_peak_allocated_bytes",) if at_least else ()
    logged = MemoryRecord(
        Source.IMPORT, CASE, Device.GPU, None, run_peak_allocated_bytes=100, at_least=bound, rounding={"run_peak_allocated_bytes": rounding}
    )
    predicted = MemoryRecord(Source.ESTIMATE, CASE, Device.GPU, None, run_peak_allocated_bytes=peak)
    (comparison,) = reconcile([logged, predicted])
    return comparison


@pytest.mark.parametrize(("peak", "error"), [(100, None), (1000, None), (95, None), (94, -0.06)])
def test_a_prediction_is_held_against_a_lower_bound_from_below_only(peak: int, error: float | None) -> None:
    comparison = compared(peak, rounding=5)

    assert comparison.at_least
    assert comparison.errors[Source.ESTIMATE] == (None if error is None else pytest.approx(error))
    assert comparison.is_consistent(Source.ESTIMATE) is (error is None)


def test_what_is_no_bound_has_errors_both_ways() -> None:
    assert compared(1000, at_least=False).errors[Source.ESTIMATE] == 9.0


def test_the_tolerance_passes_what_is_consistent_and_stops_what_is_below() -> None:
    check_tolerance([compared(1000)], 0.01)
    with pytest.raises(ToleranceExceeded, match=r"-10.00% below what the log proves"):
        check_tolerance([compared(90)], 0.05)
    with pytest.raises(InputError):
        check_tolerance([], 0.05)


def test_a_record_with_bounds_is_stored_and_read_again(tmp_path: Path) -> None:
    found = record(written(tmp_path, BACKWARD + OUT_OF_MEMORY))
    files.write_json(tmp_path / "records.json", document([found]))

    assert runs.load_records(tmp_path / "records.json") == (found,)


# Shown as such.


def test_a_bound_is_shown_as_one_in_every_output_and_the_run_did_not_finish(main: Main, tmp_path: Path) -> None:
    (log,) = written(tmp_path, BACKWARD + OUT_OF_MEMORY)
    outputs = [tmp_path / f"out{suffix}" for suffix in (".json", ".csv", ".md", ".html")]

    code, out, err = main("import", log, *FLAGS, "-d", tmp_path / "run", *(part for path in outputs for part in ("-o", path)))

    assert code == 0, "the import worked"
    assert "the run did not finish: out of memory in backward" in err.replace(" on GPU 1", "")
    assert ">= 21.00 GiB" in out
    assert "consistent" in out
    text, table, markdown, page = (path.read_text() for path in outputs)
    assert "run_peak_allocated_bytes" in json.loads(text)["records"][0]["at_least"]
    assert json.loads(text)["records"][0]["out_of_memory"]["phase"] == "backward"
    row = next(csv.DictReader(io.StringIO(table)))
    assert row["run_peak_allocated_bytes"] == str(21 * GIB)
    assert "run_peak_allocated_bytes" in row["at_least"]
    assert r"\>= 21.00 GiB" in markdown or ">= 21.00 GiB" in markdown or "&gt;= 21.00 GiB" in markdown
    assert "&gt;= 21.00 GiB" in page
    manifest = runs.load(tmp_path / "run").manifest
    assert manifest.status is manifest.cases[0].status is runs.Status.OOM
    assert "out of memory on GPU 1 in backward" in manifest.cases[0].message
    assert main("report", tmp_path / "run", "-o", tmp_path / "again.html")[0] == 0


def test_an_unfinished_init_breaks_no_tolerance(main: Main, tmp_path: Path) -> None:
    (log,) = written(tmp_path, ENDS_IN_INIT)

    code, out, err = main("import", log, *FLAGS, "-d", tmp_path / "run", "--fail-over", "5%")

    assert code == 0, err
    assert "0 B" not in out
    assert "init peak" in out


# What the log says of its own case.

SAYS = """\
[launch.py:168:main] dist_world_size=8
[2025-05-06 10:00:00,000] [INFO] [config.py:1000:print]   json = {
    "train_micro_batch_size_per_gpu":2,
    "gradient_accumulation_steps":1,
    "bf16":{
        "enabled":true
    },
    "zero_optimization":{
        "stage":3,
        "reduce_bucket_size":5.000000e+07
    },
    "optimizer":{
        "type":"AdamW"
    }
}
"""


def test_a_log_that_prints_its_configuration_needs_no_flags(main: Main, tmp_path: Path) -> None:
    (log,) = written(tmp_path, SAYS + OUT_OF_MEMORY)

    code, out, err = main("import", log, "-p", "llama3-8b", "-d", tmp_path / "run", "--json")

    assert code == 0, err
    assert "taken from the log: --ds-config the JSON that DeepSpeed printed, --gpus 8" in err
    imported, estimate = json.loads(out)["records"]
    assert (imported["case"]["zero_stage"], imported["case"]["world_size"], imported["case"]["recipe"]) == (3, 8, "bf16-fp32-master")
    assert estimate["workload"]["micro_batch_size"] == 2
    assert estimate["workload"]["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 50_000_000
    assert "/tmp" not in json.dumps(runs.load(tmp_path / "run").manifest.origins)


def test_a_flag_that_contradicts_the_log_wins_and_is_said(main: Main, tmp_path: Path) -> None:
    (log,) = written(tmp_path, SAYS + OUT_OF_MEMORY)

    code, _, err = main("import", log, "--gpus", "16", "--zero", "3", "--recipe", "fp32", "-d", tmp_path / "run")

    assert code == 0, err
    assert "--gpus 16: the log says 8" in err


def test_a_configuration_that_cannot_be_read_is_left_out_and_that_is_said(main: Main, tmp_path: Path) -> None:
    (log,) = written(tmp_path, SAYS.replace('"stage":3', '"stage":7') + OUT_OF_MEMORY)

    code, _, err = main("import", log, "-p", "llama3-8b", "--zero", "3", "--recipe", "bf16-fp32-master", "-d", tmp_path / "run")

    assert code == 0, err
    assert "the DeepSpeed JSON in the log is not used: the log's DeepSpeed JSON: zero_optimization.stage" in err


@pytest.mark.parametrize(
    ("lines", "notes"),
    [
        (["Engine before forward", "Engine after forward", "after step"], []),
        (["Engine before forward"], ["no line after a step: memory allocated between steps is not known, and peaks are lower bounds"]),
        (["my own"], ["the last of them is in init: nothing is said of training, and the peak of init is a lower bound"]),
    ],
)
def test_how_far_the_lines_reach_is_said(tmp_path: Path, lines: list[str], notes: list[str]) -> None:
    found = only(tmp_path, "".join(usage(each, 2.0, 3.0) for each in lines))

    said = "DeepSpeed's see_memory_usage: "
    assert list(found.notes) == [said + "of rank 0, up to the last of these lines", *(said + note for note in notes)]
    assert found.format == "DeepSpeed's see_memory_usage"
    assert found.open_phase is (Phase.FORWARD if lines[-1] == "Engine before forward" else None)


def timer(*rates: str, allocated: str = "5.18", peak: str = "21.4") -> str:
    return "".join(
        f"epoch=0/micro_step=40/global_step={step}, RunningAvgSamplesPerSec=38.4, CurrSamplesPerSec={rate}, "
        f"MemAllocated={allocated}GB, MaxMemAllocated={peak}GB\n"
        for step, rate in enumerate(rates, start=20)
    )


def test_rates_that_are_no_numbers_or_none_are_left_out(tmp_path: Path) -> None:
    found = only(tmp_path, timer("0.5", "1.2.3", "1e999", "0.0", "38.7"))

    assert found.rates is not None
    assert found.rates.samples_per_s == {20: 0.5, 24: 38.7}
    assert found.notes == ("DeepSpeed's throughput timer: rank 0, up to step 24: the peak is that of the process until then",)
    assert found.format == "DeepSpeed's throughput timer"


def test_a_timer_without_a_gpu_says_no_memory(tmp_path: Path) -> None:
    found = only(tmp_path, timer("2.5", allocated="0.0", peak="0.0"))

    assert (found.readings, found.notes) == ({}, ("DeepSpeed's throughput timer: no GPU memory is said",))
