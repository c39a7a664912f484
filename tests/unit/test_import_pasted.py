"""What people paste, format by format: each against the software that prints it where that runs
here, and as other versions print it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import only, read, record, written
from pasted import MICRO_STEPS, SMI_OLD_TABLE, SMI_TABLE, THROUGHPUT, TRAINER

from bf16prof.errors import InputError
from bf16prof.imports.config_print import ConfigReader
from bf16prof.imports.finding import GIB, MIB, Reading
from bf16prof.imports.memory_status import MemoryStatusReader
from bf16prof.imports.record import Batch, imported_record
from bf16prof.imports.text import LogLine
from bf16prof.imports.throughput import ThroughputReader
from bf16prof.imports.timers import TimersReader
from bf16prof.imports.trainer import TrainerReader
from bf16prof.records import Case

BYTES = st.integers(2**25, 2**42)
CASE = Case("p", 3, 4, "bf16-fp32-master")


# DeepSpeed's throughput timer.


def test_the_throughput_timer_says_memory_without_any_switch(tmp_path: Path) -> None:
    finding = only(tmp_path, THROUGHPUT)

    assert round(finding.readings["allocated_bytes"].bytes / GIB, 2) == 7.51
    assert round(finding.readings["run_peak_allocated_bytes"].bytes / GIB, 2) == 18.3, "18.3 is 18.30: round(x, 2) drops the zero"
    assert finding.readings["run_peak_allocated_bytes"].rounding < GIB // 199


@pytest.mark.parametrize(
    "line",
    [
        "[timer.py:189:stop] 0/40, SamplesPerSec=83.48, MemAllocated=0.26GB, MaxMemAllocated=9.02GB",
        "[timer.py:197:stop] 0/40, RunningAvgSamplesPerSec=83.4, CurrSamplesPerSec=8.1e+01, MemAllocated=0.26GB, MaxMemAllocated=9.02GB",
        "epoch=3/micro_step=8/global_step=40, RunningAvgSamplesPerSec=-inf, CurrSamplesPerSec=81.0, MemAllocated=0.26GB, "
        "MaxMemAllocated=9.02GB",
    ],
)
def test_the_throughput_timer_of_all_versions_is_read(line: str, tmp_path: Path) -> None:
    finding = only(tmp_path, line)

    assert round(finding.readings["run_peak_allocated_bytes"].bytes / GIB, 2) == 9.02
    assert finding.rates.samples_per_s.keys() <= {40}


def test_samples_per_second_become_seconds_where_the_batch_is_known(tmp_path: Path) -> None:
    findings = read(tmp_path, THROUGHPUT).findings

    unknown, known = imported_record(CASE, findings), imported_record(CASE, findings, batch=Batch(64))

    assert unknown.step_time_s is None
    assert [(step.step, step.time_s) for step in known.steps] == [(10, 2.0), (20, 4.0)]
    assert known.step_time_s == 3.0


def test_a_cpu_run_has_no_gpu_memory(tmp_path: Path) -> None:
    text = THROUGHPUT.replace("7.51", "0.0").replace("7.5G", "0.0G").replace("18.25", "0.0").replace("18.3G", "0.0G")

    assert only(tmp_path, text).readings == {}


@settings(max_examples=20, deadline=None)
@given(st.tuples(BYTES, BYTES).map(sorted))
def test_what_the_real_throughput_timer_prints_of_any_bytes_is_read(memory: list[int]) -> None:
    from deepspeed.utils import timer

    lines: list[str] = []
    accelerator = SimpleNamespace(memory_allocated=lambda: memory[0], max_memory_allocated=lambda: memory[1], synchronize=lambda: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timer, "get_accelerator", lambda: accelerator)
        real = timer.ThroughputTimer(
            SimpleNamespace(enabled=True, synchronized=False), batch_size=8, start_step=0, steps_per_output=1, logging_fn=lines.append
        )
        for _ in range(2):
            real.start()
            real.stop(global_step=True)
    reader = ThroughputReader()

    assert [reader.line(line) for line in lines] == [1] * len(lines)
    finding = reader.finding()

    assert finding is not None
    for name, size in (("allocated_bytes", memory[0]), ("run_peak_allocated_bytes", memory[1])):
        reading = finding.readings[name]
        assert reading.low <= size <= reading.high


def test_the_peak_counter_that_see_memory_usage_resets_is_of_the_rest_of_the_run(tmp_path: Path) -> None:
    """Versions of DeepSpeed that print lines of init unasked: the highest of both is the whole
    run's."""
    init = "After initializing ZeRO optimizer\nMA 7.0 GB         Max_MA 30.0 GB         CA 31.0 GB         Max_CA 31 GB \n"

    found = record(written(tmp_path, init + THROUGHPUT))

    assert round((found.run_peak_allocated_bytes or 0) / GIB, 2) == 30.0
    assert not [note for note in found.notes if "contradict" in note]


# memory_status.


@settings(max_examples=20, deadline=None)
@given(st.lists(BYTES, min_size=4, max_size=4).map(sorted))
def test_what_the_real_memory_status_prints_is_read(memory: list[int]) -> None:
    from deepspeed.runtime import utils

    printed: list[str] = []
    accelerator = SimpleNamespace(
        memory_allocated=lambda: memory[0], max_memory_allocated=lambda: memory[1], memory_cached=lambda: memory[2],
        max_memory_cached=lambda: memory[3], synchronize=lambda: None, current_device_name=lambda: "cuda:2",
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "get_accelerator", lambda: accelerator)
        patch.setattr(utils.dist, "get_rank", lambda: 2)
        patch.setattr(utils, "print", lambda *words: printed.append(" ".join(words)), raising=False)
        utils.memory_status("Memory stats after training step")
    reader = MemoryStatusReader()

    assert [reader.line(line) for line in printed] == [1]
    finding = reader.finding()

    assert finding is not None
    truth = {"allocated_bytes": memory[0], "run_peak_allocated_bytes": memory[1], "reserved_bytes": memory[3]}
    for name, size in truth.items():
        assert finding.readings[name].low <= size <= finding.readings[name].high, name
    assert finding.ranks == 3


def status(rank: int, message: str, peak: float) -> str:
    return (
        f"RANK={rank} MEMSTATS {message} device=cuda:{rank} current alloc=4.0000GB (delta=-0.5000GB max={peak:.4f}GB) "
        f"current cache=9.0000GB (delta=0.0000GB max=9.5000GB)\n"
    )


def test_the_rank_that_holds_most_is_named(tmp_path: Path) -> None:
    finding = only(tmp_path, status(0, "after step", 6.0) + status(3, "after step", 8.5) + status(1, "after step", 7.0))

    assert finding.readings["run_peak_allocated_bytes"].bytes == round(8.5 * GIB)
    assert "of rank 3, which holds most of 3" in finding.notes[0]


def test_a_status_before_the_first_step_is_a_lower_bound(tmp_path: Path) -> None:
    found = record(written(tmp_path, status(0, "after init", 6.0)))

    assert found.at_least == ("run_peak_allocated_bytes", "reserved_bytes")
    assert found.allocated_bytes is None


# The pipeline engine, and Megatron-DeepSpeed.


def test_the_pipeline_engines_line_has_step_loss_and_time(tmp_path: Path) -> None:
    finding = only(
        tmp_path,
        "steps: 20 loss: 5.1234 iter time (s): 0.312 samples/sec: 102.5\nsteps: 40 loss: nan aux: 1.0 iter time (s): 0.25 samples/sec: 8\n",
    )

    assert [(s.step, s.loss, s.time_s) for s in finding.steps] == [(20, 5.1234, 0.312), (40, None, 0.25)]


def test_megatron_deepspeeds_lines_are_read_and_the_worst_rank_is_named(tmp_path: Path) -> None:
    log = (
        " iteration       10/  500 | consumed samples:   320 | elapsed time per iteration (ms): 1250.0 | learning rate: 1.0E-05 | "
        "global batch size:    32 | lm loss: 1.0625E+01 | loss scale: 1.0 |\n"
        "[Rank 0] (after 10 iterations) memory (MB) | allocated: 100.5 | max allocated: 200.25 | reserved: 300.0 | max reserved: 300.0\n"
        "[Rank 8] (after 10 iterations) memory (MB) | allocated: 90.0 | max allocated: 220.5 | reserved: 310.0 | max reserved: 320.0\n"
    )

    finding = only(tmp_path, log)

    assert [(s.step, s.loss, s.time_s) for s in finding.steps] == [(10, 10.625, 1.25)]
    assert finding.readings["run_peak_allocated_bytes"].bytes == 220.5 * MIB
    assert "memory of rank 8, which holds most of 2" in finding.notes[0]


# Timers of micro-steps.


def test_micro_steps_are_steps_once_it_is_known_how_many_make_one(tmp_path: Path) -> None:
    findings = read(tmp_path, MICRO_STEPS).findings

    unknown, known = imported_record(CASE, findings), imported_record(CASE, findings, batch=Batch(None, 2))

    assert unknown.steps == ()
    assert any("medians of 2 micro-steps: forward 105.00 ms, backward 205.00 ms" in note for note in unknown.notes)
    assert [step.time_s for step in known.steps] == [pytest.approx(0.65)]


def test_what_the_real_engine_timers_log_of_a_micro_step_is_read(capsys: pytest.CaptureFixture[str]) -> None:
    from deepspeed.runtime.engine import EngineTimers
    from deepspeed.utils import timer

    timers, names = timer.SynchronizedWallClockTimer(), EngineTimers(enable_micro_timers=True, enable_global_timers=False).micro_timers
    for name in names:
        timers(name).start()
        timers(name).stop()
        timers(name).event_timers = [0.25]
    capsys.readouterr()

    timers.log(names)
    reader = TimersReader()
    read_lines = [reader.line(line) for line in capsys.readouterr().out.splitlines()]
    finding = reader.finding()

    assert 1 in read_lines
    assert finding is not None
    assert list(finding.rates.micro_step_s) == [pytest.approx(0.75)]


# The Trainer of Hugging Face.


def test_losses_take_their_steps_from_the_progress_bar(tmp_path: Path) -> None:
    finding = only(tmp_path, TRAINER)

    assert [(step.step, step.loss) for step in finding.steps] == [(10, 2.25), (20, 1.75)]
    assert finding.rates.mean_step_s == 2.0
    assert finding.said == {"micro_batch_size": 4, "gradient_accumulation_steps": 2, "train_batch_size": 64, "world_size": 8}


def test_a_bar_of_something_else_is_not_the_steps(tmp_path: Path) -> None:
    shards = "Loading checkpoint shards: 100%|##########| 4/4 [00:10<00:00,  2.5s/it]\r"
    evaluation = "100%|##########| 7/7 [00:03<00:00]\n"

    finding = only(tmp_path, shards + TRAINER.replace(" 20%|", evaluation + " 20%|"))

    assert [step.step for step in finding.steps] == [10, 20]


def test_losses_without_a_bar_are_counted_and_that_is_said(tmp_path: Path) -> None:
    finding = only(tmp_path, "{'loss': 2.0, 'epoch': 0.1}\n{'loss': nan, 'epoch': 0.2}\n")

    assert [(step.step, step.loss, step.loss_not_finite) for step in finding.steps] == [(0, 2.0, False), (1, None, True)]
    assert "lines are counted" in " ".join(finding.notes)


def test_losses_that_say_their_step_need_no_bar(tmp_path: Path) -> None:
    lines = [json.dumps({"current_steps": step, "loss": 3.0 - step / 10, "epoch": 0.1}) for step in (5, 10)]

    assert [(s.step, s.loss) for s in only(tmp_path, "\n".join(lines)).steps] == [(5, 2.5), (10, 2.0)]


@pytest.fixture(scope="module")
def log_metrics() -> Callable[[dict[str, Any]], str]:
    """The Trainer's own `log_metrics` of some metrics."""
    import contextlib
    import io

    from transformers.trainer_pt_utils import log_metrics as real
    from transformers.trainer_pt_utils import metrics_format

    def call(metrics: dict[str, Any]) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            trainer = SimpleNamespace(is_world_process_zero=lambda: True, metrics_format=metrics_format)
            real(trainer, "train", metrics)  # type: ignore[no-untyped-call]
        return out.getvalue()

    return call


METRICS = {"before_init_mem_gpu": 0, "init_mem_gpu_alloc_delta": 3 * GIB, "init_mem_gpu_peaked_delta": 0, "init_mem_cpu_alloc_delta": 5}


@settings(max_examples=20, deadline=None)
@given(st.integers(-GIB, 60 * GIB), st.integers(0, 40 * GIB))
def test_what_the_real_trainer_logs_of_its_memory_is_read(log_metrics: Callable[[dict[str, Any]], str], delta: int, peaked: int) -> None:
    metrics = {**METRICS, "train_mem_gpu_alloc_delta": delta, "train_mem_gpu_peaked_delta": peaked, "train_runtime": 12.5, "epoch": 1.0}
    reader = TrainerReader()

    for line in log_metrics(metrics).splitlines():
        assert reader.line(line) == 1, line
    finding = reader.finding()

    assert finding is not None
    allocated, peak = finding.readings["allocated_bytes"], finding.readings["run_peak_allocated_bytes"]
    assert allocated.low <= 3 * GIB + delta <= allocated.high
    assert peak.low <= max(3 * GIB + delta + peaked, 3 * GIB) <= peak.high
    assert allocated.rounding <= 2 * MIB


def test_memory_without_what_was_before_is_a_lower_bound(tmp_path: Path) -> None:
    text = "  train_mem_gpu_alloc_delta  =    11475MB\n  train_mem_gpu_peaked_delta =     6122MB\n"

    found = record(written(tmp_path, text))

    assert set(found.at_least) == {"allocated_bytes", "run_peak_allocated_bytes"}
    assert (found.run_peak_allocated_bytes or 0) // MIB == 11475 + 6122 + 1 or (found.run_peak_allocated_bytes or 0) // MIB == 11475 + 6122


def test_memory_that_was_there_before_and_freed_is_no_negative_memory(tmp_path: Path) -> None:
    lines = "  train_mem_gpu_alloc_delta  =     -153MB\n  train_mem_gpu_peaked_delta =     2012MB\n"
    before = "  before_init_mem_gpu        =      312MB\n  init_mem_gpu_alloc_delta   =        0MB\n"

    alone, complete = only(tmp_path, lines).readings, only(tmp_path, before + lines).readings

    assert set(alone) == {"run_peak_allocated_bytes"}
    assert alone["run_peak_allocated_bytes"].is_floor
    assert complete["allocated_bytes"].low // MIB in (158, 159)
    assert not complete["run_peak_allocated_bytes"].is_floor


def test_the_trainers_json_files_are_exact(tmp_path: Path) -> None:
    from transformers.trainer_callback import TrainerState

    history = [
        {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 1e-5, "epoch": 0.1, "step": 10},
        {"loss": float("nan"), "grad_norm": 1.0, "learning_rate": 1e-5, "epoch": 0.2, "step": 20},
        {"eval_loss": 2.25, "epoch": 0.2, "step": 20},
        {
            "train_runtime": 100.0,
            "train_loss": 2.2,
            "epoch": 1.0,
            "step": 50,
            **METRICS,
            "train_mem_gpu_alloc_delta": 7,
            "train_mem_gpu_peaked_delta": 9,
        },
    ]
    state = tmp_path / "trainer_state.json"
    TrainerState(global_step=50, max_steps=50, log_history=history).save_to_json(str(state))

    finding = only(tmp_path, state.read_bytes())

    assert [(step.step, step.loss) for step in finding.steps] == [(10, 2.5), (20, None)]
    assert finding.readings["allocated_bytes"] == Reading(3 * GIB + 7)
    assert finding.readings["run_peak_allocated_bytes"] == Reading(3 * GIB + 16)
    assert finding.rates.mean_step_s == 2.0


def test_all_results_are_read_and_join_with_the_log(tmp_path: Path) -> None:
    results = json.dumps({**METRICS, "train_mem_gpu_alloc_delta": 1, "train_mem_gpu_peaked_delta": 2, "train_runtime": 200.0})

    found = record(written(tmp_path, TRAINER, results))

    assert found.allocated_bytes == 3 * GIB + 1
    assert [step.loss for step in found.steps] == [2.25, 1.75]


def test_two_histories_are_two_runs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="several runs"):
        read(tmp_path, '{"log_history": [{"loss": 1.0, "step": 1}]}', '{"log_history": [{"loss": 2.0, "step": 1}]}')


# nvidia-smi.


def test_the_table_of_nvidia_smi_is_read(tmp_path: Path) -> None:
    sources = read(tmp_path, SMI_TABLE)
    (finding,) = sources.findings

    assert finding.readings["device_bytes"] == Reading(41000 * MIB, MIB - 1)
    assert finding.facts == {"gpu": "NVIDIA A100-SXM4-80GB", "gpu_utilisation": 1.0, "power_w": 320.0}
    assert "of GPU 1, which holds most of 2" in finding.notes[0]
    assert sources.files[0].rest == 1, "the date"


def test_an_older_table_whose_name_is_cut_is_read_without_the_name(tmp_path: Path) -> None:
    finding = only(tmp_path, SMI_OLD_TABLE)

    assert finding.readings["device_bytes"].bytes == 15109 * MIB
    assert finding.facts == {"gpu_utilisation": 0.97, "power_w": 210.0}


@pytest.mark.parametrize(
    ("rows", "used"),
    [
        ("0, 30000, 40960\n1, 31000, 40960\n", 31000),
        ("30000, 40960\n31000, 40960\n", 31000),
        ("40960, 30000\n40960, 31000\n", 31000),
        ("0, 30000 MiB, 40960 MiB, 97 %\n1, 31000 MiB, 40960 MiB, 12 %\n", 31000),
        ("2025/05/05 10:00:00.123, NVIDIA A100-SXM4-40GB, 30000 MiB\n2025/05/05 10:00:01.123, NVIDIA A100-SXM4-40GB, 32000 MiB\n", 32000),
        ("GPU-8d3f2a10-1111-2222-3333-444455556666, 5000 MiB, 12.5 W, 3 %\n", 5000),
    ],
)
def test_csv_without_header_is_known_by_its_content_and_what_was_taken_for_what_is_said(rows: str, used: int, tmp_path: Path) -> None:
    finding = only(tmp_path, rows)

    assert finding.readings["device_bytes"].bytes == used * MIB
    assert "without a header: columns are taken for" in " ".join(finding.notes)


@pytest.mark.parametrize("rows", ["1, 2, 3\n4, 5, 6\n", "64118\n63990\n", "a, b\nc, d\n"])
def test_numbers_that_could_be_anything_are_not_taken_for_memory(rows: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is understood"):
        read(tmp_path, rows)


# DeepSpeed's configuration.

CONFIG = {
    "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "bf16": {"enabled": True},
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 500_000_000, "offload_param": {"device": "none"}},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}}, "steps_per_print": 10,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["", "node-3: ", "[default0]:"])
def test_what_the_real_configuration_prints_is_read(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    from bf16prof.imports.text import lines

    monkeypatch.setenv("WORLD_SIZE", "1")
    messages: list[str] = []
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "info", lambda message, *_: messages.append(message))
    config = DeepSpeedConfig({**CONFIG, "train_batch_size": 8})
    monkeypatch.setattr("deepspeed.runtime.config.logger.info", messages.append)
    messages.clear()
    config.world_size = 8
    config.print("DeepSpeedEngine configuration")
    printed = "\n".join(f"[2025-05-06 10:00:00,000] [INFO] [config.py:1000:print] {message}" for message in messages)
    reader = ConfigReader()

    for line in lines("\n".join(prefix + text for text in printed.splitlines()).encode(), Path("log")):
        reader.line(line)
    finding = reader.finding()

    assert finding is not None
    said = dict(finding.said)
    assert said.pop("deepspeed") == {**CONFIG, "train_batch_size": 8}
    assert said == {
        "world_size": 8, "zero_stage": 3, "micro_batch_size": 4, "gradient_accumulation_steps": 2, "train_batch_size": 8,
    }  # fmt: skip


def test_launcher_and_engine_say_ranks_and_stage() -> None:
    reader = ConfigReader()
    for line in ("[launch.py:168:main] dist_world_size=16", "[Rank 0] Creating torch.bfloat16 ZeRO stage 2 optimizer"):
        assert reader.line(LogLine(line)) == 1

    finding = reader.finding()

    assert finding is not None
    assert finding.said == {"world_size": 16, "zero_stage": 2}
