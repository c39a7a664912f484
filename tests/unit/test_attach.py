"""Attaching to ranks that others start: whose arguments are whose, what a script sees of torch's
counters, and how ranks are joined."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Main, main, refused

import bf16prof
from bf16prof import attach
from bf16prof.errors import InputError
from bf16prof.measuring.results import OfScript, RankResult, save_rank
from bf16prof.measuring.script import join, steps
from bf16prof.measuring.script.losses import Losses
from bf16prof.measuring.script.probes import GuestProbe
from bf16prof.records import Case
from bf16prof.runs import SCRIPT_FOLDER, Status, load
from bf16prof.scripts.command import Script
from bf16prof.scripts.workload import Calls
from bf16prof.started_by import PORTS, first_host, rank_variables
from bf16prof.step_records import PhaseMemory, StepRecord
from bf16prof.vocabulary import Device, Phase

__all__ = ["main"]

CASE = Case("train.py", 2, 2, "bf16-full", workload="abc")


@pytest.mark.parametrize(
    ("words", "own", "script"),
    [
        (["-d", "run", "train.py", "-d", "x"], ["-d", "run"], ["train.py", "-d", "x"]),
        (["--output-dir=run", "--stop", "-m", "pkg", "--force"], ["--output-dir=run", "--stop"], ["-m", "pkg", "--force"]),
        (["-d", "run", "--steps", "5", "--", "train.py"], ["-d", "run", "--steps", "5"], ["train.py"]),
        (["train.py"], [], ["train.py"]),
        (["--local_rank=1", "-d", "run", "-m", "pkg", "x"], ["-d", "run"], ["-m", "pkg", "--local_rank=1", "x"]),
        ([], [], []),
    ],
)
def test_arguments_after_the_script_are_the_scripts(words: list[str], own: list[str], script: list[str]) -> None:
    assert attach._split(words) == (own, script)


@pytest.mark.parametrize(("words", "said"), [(["train.py"], "--output-dir is missing"), (["-d", "run"], "nothing stands after --")])
def test_attach_says_in_one_line_what_is_missing(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(attach.FOLDER_VARIABLE, raising=False)

    assert attach.main(words) == 2
    assert said in capsys.readouterr().err.splitlines()[0]


def test_a_rank_is_known_by_the_words_of_its_launcher() -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1"}
    mpi = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}

    assert rank_variables(step) == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "GROUP_RANK": "1"}
    assert rank_variables(mpi) == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert rank_variables({**step, "RANK": "7"}) == {}
    there = {**step, "SLURM_JOB_ID": "4", "SLURM_STEP_NODELIST": "node[03-07,12],login1", "MASTER_PORT": "29500"}
    assert rank_variables(there) == {**rank_variables(step), "MASTER_ADDR": "node03"}
    assert rank_variables({}) == {}


@pytest.mark.parametrize(
    ("names", "first"), [("nodea", "nodea"), ("a[1-2],b", "a1"), ("r[07-09]n[1,3]", "r07n1"), ("x-1,x-2", "x-1"), ("n[005]", "n005")]
)
def test_ranks_of_a_step_meet_at_its_first_host(names: str, first: str) -> None:
    assert first_host(names) == first


def test_ranks_of_a_step_agree_on_a_port() -> None:
    step = {"SLURM_JOB_ID": "99999", "SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "a,b"}
    ports = {int(rank_variables({**step, "SLURM_STEP_ID": str(number)})["MASTER_PORT"]) for number in range(30)}

    assert len(ports) == 30
    assert ports <= set(PORTS)


def test_watch_is_there_when_it_is_asked_for() -> None:
    assert callable(bf16prof.watch)
    with pytest.raises(AttributeError, match="no attribute 'wotch'"):
        _ = bf16prof.wotch


# What a script sees of torch's counters.


class Counters:
    """torch's allocator: what is allocated, and a peak that is reset for all who ask."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def allocate(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def stats(self, _device: Any = None) -> dict[str, int]:
        return {
            "allocated_bytes.all.current": self.now, "allocated_bytes.all.peak": self.peak, "reserved_bytes.all.peak": self.peak * 2,
            "num_alloc_retries": 1,
        }  # fmt: skip

    def reset(self, _device: Any = None) -> None:
        self.peak = self.now


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    found = Counters()
    for owner in (torch.cuda, torch.cuda.memory):
        monkeypatch.setattr(owner, "memory_stats", found.stats)
        monkeypatch.setattr(owner, "reset_peak_memory_stats", found.reset)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    return found


def test_script_and_phases_have_peaks_of_their_own(counters: Counters) -> None:
    probe = GuestProbe()
    with probe.shown():
        counters.allocate(100)
        counters.allocate(-90)
        assert probe.take_phase_peak() == 100
        counters.allocate(20)
        assert torch.cuda.max_memory_allocated() == 100, "as if nobody had reset it"
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 30
        counters.allocate(-25)
        assert probe.take_phase_peak() == 30, "although the script has reset the counter"
        assert torch.cuda.max_memory_allocated() == 30
        assert probe.take_phase_peak() == 5
    assert (probe.run_peak_bytes(), probe.reserved_bytes(), probe.allocated_bytes(), probe.retries()) == (100, 200, 5, 1)
    assert probe.name == "NVIDIA H100"


def test_the_probe_does_not_wake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda.memory, "memory_stats", lambda *_: pytest.fail("CUDA was asked"))
    probe = GuestProbe()

    assert (probe.take_phase_peak(), probe.allocated_bytes(), probe.run_peak_bytes(), probe.name) == (0, 0, 0, "")


def test_losses_are_means_over_the_micro_steps_that_are_known() -> None:
    losses = Losses(type("Cpu", (), {"device_type": "cpu"})())
    for values in ((1.0, 3.0), (float("nan"),), ()):
        for value in values:
            losses.see(torch.tensor(value))
        losses.step_ends(wait=False)
    losses.see("no tensor")
    found = losses.of([StepRecord(n, None, 1.0, 1) for n in range(3)])

    assert [(step.loss, step.loss_not_finite) for step in found] == [(2.0, False), (None, True), (None, False)]


# What is read while a script runs.


class Memory:
    """A probe that writes down how often it was asked to settle, and a clock that it moves on by
    ten seconds then."""

    device_type = "cpu"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = 0.0
        self.peak = self.settled = 0
        monkeypatch.setattr(time, "perf_counter", lambda: self.clock)

    def allocated_bytes(self) -> int:
        return 5

    def take_phase_peak(self) -> int:
        return self.peak

    def settle(self) -> None:
        self.settled += 1
        self.clock += 10.0

    def synchronize(self) -> None:
        self.clock += 0.5


def test_an_evaluation_is_measured_closely_and_is_no_part_of_a_timed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    seen = steps.SeenSteps(memory)  # type: ignore[arg-type]
    seen.marks.is_timed = True
    seen.begins()
    for phase, peak in ((Phase.EVAL, 1), (Phase.FORWARD, 900), (Phase.BACKWARD, 30), (Phase.STEP, 40), (None, 50)):
        memory.peak, memory.clock = peak, memory.clock + 1.0
        seen.marks.mark(phase)

    assert seen.ends(is_warmup=False, is_last=False) == 5
    assert memory.settled == 2, "where the evaluation begins and ends"
    (step,) = seen.timed_records()
    assert step.phases == {Phase.FORWARD: PhaseMemory(30, 5), Phase.BACKWARD: PhaseMemory(40, 5), Phase.STEP: PhaseMemory(50, 5)}
    assert seen.outside == {Phase.EVAL: PhaseMemory(900, 5)}
    assert step.time_s == 1.0 + 0.5 + 3.0, "until the evaluation, what the device had to do still, and the phases of the step"
    assert step.phase_time_s == {Phase.FORWARD: 1.0, Phase.BACKWARD: 1.0, Phase.STEP: 1.0}


def test_an_evaluation_at_the_very_end_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = Memory(monkeypatch)
    seen = steps.SeenSteps(memory)  # type: ignore[arg-type]
    seen.marks.mark(Phase.EVAL)
    memory.peak = 70
    seen.is_script_over()

    assert seen.outside == {Phase.EVAL: PhaseMemory(70, 5)}


def test_what_batches_look_like_is_seen_once_for_each_shape() -> None:
    calls = Calls()
    for tokens, labels in ((8, None), (16, None), (8, None), (8, torch.ones(2, 8))):
        calls.see(({"mask": torch.ones(2, tokens)},), {"input_ids": torch.ones(2, tokens, dtype=torch.int64), "labels": labels})

    assert (calls.sequence_lengths, calls.rows, calls.has_labels) == ({8, 16}, {2}, True)


# How ranks are joined.


def rank(number: int, status: Status = Status.FINISHED, size: int = 2, name: str = "train.py", **changes: Any) -> RankResult:
    of = OfScript(Script(path=name), size, CASE)
    seen = tuple(StepRecord(n, None, 1.0, 95, warmup=n < 2) for n in range(4))
    whole = RankResult(
        number, 1, status, Device.CPU, "cpu", host=f"host{number}", node=number, parameters=9, init=PhaseMemory(40, 30), steps=seen,
        allocated_bytes=95, of_script=of,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)


def written(folder: Path, *ranks: RankResult) -> Path:
    (folder / SCRIPT_FOLDER).mkdir()
    for each in ranks:
        save_rank(folder / SCRIPT_FOLDER, each)
    return folder


def test_ranks_become_a_run(tmp_path: Path) -> None:
    run = join.join(written(tmp_path, rank(0), rank(1)))

    assert (run.manifest.status, run.manifest.name) == (Status.FINISHED, "train.py")
    (record,) = load(tmp_path).records
    assert (record.case, record.allocated_bytes, [each.host for each in record.ranks]) == (CASE, 95, ["host0", "host1"])
    assert record.notes[0] == "4 steps of train.py"
    assert not join.joins(tmp_path), "nothing is new"


def test_whether_ranks_are_new_is_no_matter_of_clocks(tmp_path: Path) -> None:
    """A clock that was set back, or a copy of the folder, changes times and nothing else."""
    join.join(written(tmp_path, rank(0), rank(1)))
    os.utime(tmp_path / "run.json", (0, 0))
    assert not join.joins(tmp_path)

    save_rank(tmp_path / SCRIPT_FOLDER, rank(1, Status.FAILED, message="again"))
    os.utime(tmp_path / SCRIPT_FOLDER / "rank1.json", (0, 0))
    assert join.joins(tmp_path)


@pytest.mark.parametrize(
    ("ranks", "status", "said"),
    [
        ((rank(0),), Status.FAILED, "nothing from rank 1 of 2"),
        ((rank(0), rank(1, Status.RUNNING)), Status.INTERRUPTED, "rank 1 runs, or was killed"),
        ((rank(0), rank(1, Status.FAILED, message="train.py raised E")), Status.FAILED, "rank 1: train.py raised E"),
    ],
)
def test_a_job_that_is_not_whole_is_said_to_be_so(tmp_path: Path, ranks: tuple[RankResult, ...], status: Status, said: str) -> None:
    run = join.join(written(tmp_path, *ranks))

    assert (run.manifest.status, run.manifest.cases[0].message) == (status, said)
    assert run.records[0].notes[-1].startswith(f"partial: {status}: ")


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ((rank(0), rank(1, size=4)), "ranks of different jobs: train.py on 2 ranks and train.py on 4 ranks"),
        ((rank(0), rank(1, name="other.py")), "ranks of different jobs"),
        ((rank(0), rank(3)), "rank 3 of a job of 2 ranks"),
    ],
)
def test_ranks_of_several_jobs_are_not_mixed(tmp_path: Path, ranks: tuple[RankResult, ...], said: str) -> None:
    with pytest.raises(InputError, match=said):
        join.join(written(tmp_path, *ranks))


def test_report_refuses_them_in_one_line(main: Main, tmp_path: Path) -> None:
    written(tmp_path, rank(0), rank(1, size=4))

    assert "each job needs a run directory of its own" in refused(main("report", tmp_path))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--zero", "3", "--", __file__), "--zero: a script after -- says itself"),
        (("--", "no-such.py"), "no-such.py: no such file"),
        (("--", "torchrun", "train.py"), "a launcher"),
    ],
)
def test_measure_refuses_what_does_not_go_with_a_script(main: Main, words: tuple[str, ...], said: str) -> None:
    assert said in refused(main("measure", *words))


def test_the_driver_is_asked_as_for_our_own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    from bf16prof.measuring.probes import nvml
    from bf16prof.measuring.script import probes
    from bf16prof.measuring.script.device import DeviceView

    class Sampler(contextlib.nullcontext[Any]):
        def __init__(self, device: str) -> None:
            super().__init__(self)
            assert device == "GPU-1"

        def summary(self) -> nvml.NvmlSummary:
            return nvml.NvmlSummary("H100", 80, 40, 60, 0.5, 300.0, 2)

    monkeypatch.setattr(nvml, "NvmlSampler", Sampler)
    monkeypatch.setattr(nvml, "cuda_uuid", lambda index: f"GPU-{index}")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    in_use = iter((False, True))
    monkeypatch.setattr(probes, "is_in_use", lambda: next(in_use))
    view = DeviceView("cuda")
    for _ in range(3):  # before the script uses CUDA, and with two engines
        view.begin()

    assert view.end() == {"device_bytes": 40, "gpu_utilisation": 0.5, "power_w": 300.0}
    assert DeviceView("cpu").end() == {}
