"""Scripts that misbehave on real ranks: the rank that did it is named in one line, what was
measured is kept, and nothing outlives it."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
from harness import bf16prof, start, wait_for, without_the_second

from bf16prof.runs import Status, load
from bf16prof.vocabulary import Source

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(600)]

TRAINS = """
import os, signal, sys, time
import deepspeed, torch

FIRST = os.environ["RANK"] == "0"
model = torch.nn.Linear(64, 64)
config = {
    "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)

def train(steps):
    for _ in range(steps):
        engine.backward(engine(torch.randn(2, 64)).pow(2).mean())
        engine.step()

"""
RUDE = """
train(2)
os.chdir("/")
print("x" * 5_000_000)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os._exit(3)
try:
    train(99)
    sys.exit(4)
except BaseException:
    pass
os._exit(0)
"""
SCRIPTS = {
    "raises": ("train(2)\nif not FIRST:\n    raise ValueError('no data')\ntrain(9)", "rank 1: raises.py raised ValueError: no data"),
    "exits": ("train(2)\nif not FIRST:\n    sys.exit(7)\ntrain(9)", "rank 1: exits.py left with exit code 7"),
    "leaves": ("train(2)\nif not FIRST:\n    os._exit(9)\ntrain(9)", "rank 1: leaves.py left by os._exit(9)"),
    "killed": ("train(2)\nif not FIRST:\n    os.kill(os.getpid(), 9)\ntrain(9)", "rank 1: killed by SIGKILL"),
    "hangs": ("train(2)\nif not FIRST:\n    time.sleep(600)\ntrain(9)",
              "not finished after 60 s: rank 1 was between steps, after step 1 (hangs.py"),
    "deaf": (RUDE.replace("train(99)", "time.sleep(600)"), "not finished after 60 s: ranks 0 and 1 were between steps, after step 1"),
    "rude": (RUDE, ""),
}  # fmt: skip
"""By name: the script after its beginning, and the line that is said of it; empty where it is
measured to its end."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_how_a_script_ends_on_real_ranks_is_said_in_a_line(name: str, tmp_path: Path) -> None:
    text, said = SCRIPTS[name]
    script = tmp_path / f"{name}.py"
    script.write_text(TRAINS + text)
    limit = ("--timeout", "60") if "not finished" in said else ()
    done = bf16prof("measure", "--num-gpus", "2", *limit, "-d", str(tmp_path / "run"), "--", str(script), env={"GLOO_SOCKET_IFNAME": "lo"})
    run = load(tmp_path / "run")
    (record,) = (record for record in run.records if record.source is Source.MEASURE)

    assert done.code == (3 if said else 0), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("bf16prof: ")] or [""]
    assert said in line
    assert len(record.steps) == 2 if said else len(record.steps) > 2
    assert record.case.recipe == "fp32"
    assert run.manifest.status is (Status.FINISHED if not said else Status.TIMEOUT if limit else Status.FAILED)
    wait_for("all processes are gone", lambda: not _mentioning(str(tmp_path)), 20)


def _mentioning(words: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if words in " ".join([*process.cmdline(), process.cwd()]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_a_node_that_is_killed_under_a_script_is_named(tmp_path: Path) -> None:
    script, run = tmp_path / "trains.py", tmp_path / "run"
    script.write_text(TRAINS + "train(10**6)")
    where = ("measure", "--nnodes", "2", "--num-gpus", "1", "--rdzv-endpoint", "127.0.0.1", "-d", str(run))
    first, second = (start(*where, "--node-rank", str(node), "--", str(script), env={"GLOO_SOCKET_IFNAME": "lo"}) for node in (0, 1))
    done = without_the_second(first, second, run / "script")

    assert done.code == 3
    assert f"node 1 ({os.uname().nodename}) is gone without a word" in done.stderr
    assert any(record.source is Source.MEASURE for record in load(run).records)


def test_a_script_that_trains_nothing_is_refused(tmp_path: Path) -> None:
    script = tmp_path / "idle.py"
    script.write_text("print('done')\n")
    done = bf16prof("measure", "--num-gpus", "2", "-d", str(tmp_path / "run"), "--", str(script))

    assert done.code == 2
    assert "idle.py ended: deepspeed.initialize was never called" in done.stderr
