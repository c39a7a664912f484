"""Scripts that do more than train, or that end otherwise than by training to the last step: what is
recorded, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import bf16prof
from many import dry, record, run_all

from bf16prof.dry_run.runner import Files
from bf16prof.dry_run.task import Fault
from bf16prof.runs import read
from bf16prof.vocabulary import Phase

CORPUS = Path(__file__).with_name("corpus")
STEPS = 2

pytestmark = [pytest.mark.timeout(900), pytest.mark.xdist_group("scripts")]

TRAINS = f"""
import os, sys
sys.path.insert(0, {str(CORPUS)!r})
import deepspeed, torch
from tiny import SEQUENCE, VOCABULARY, TinyModel, config

def train(steps):
    model = TinyModel()
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config(1))
    for _ in range(steps):
        batch = torch.randint(0, VOCABULARY, (2, SEQUENCE), device="cuda")
        loss = engine(batch, labels=batch)
        engine.backward(loss)
        engine.step()
    return engine, loss
"""

RUDE = """
os.chdir("/")
print("x" * 5_000_000)
if os.fork() == 0:
    os._exit(3)
try:
    train(99)
except BaseException:
    pass
raise SystemExit(1)
"""

SCRIPTS = {
    "raises": ("raise ValueError('no data')", "raises.py raised ValueError: no data (raises.py:16)", False, 0),
    "raises_late": ("train(1)\nraise ValueError('no more')", "raised ValueError: no more (raises_late.py:17), after 1 step", False, 1),
    "exits": ("sys.exit(7)", "exits.py left with exit code 7", False, 0),
    "leaves": ("os._exit(9)", "leaves.py left by os._exit(9)", False, 0),
    "leaves_well": ("train(1)\nos._exit(0)", "", False, 1),
    "never_steps": ("", "never_steps.py ended: deepspeed.initialize was never called", True, 0),
    "counts": ("torch.bincount(torch.ones(999, device='cuda').long())", "counts.py depends on values", True, 0),
    "rude": (RUDE, "", False, STEPS),
}  # fmt: skip
"""By name: the script after its beginning, the line that is said of it, whether that is bad input,
and the steps that are recorded."""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of them, run; a folder for each."""
    root = tmp_path_factory.mktemp("ends")
    jobs = [dry(root / "mechanisms", [str(CORPUS / "mechanisms.py")], "h100-80gb", STEPS)]
    for name, (text, *_) in SCRIPTS.items():
        (root / f"{name}.py").write_text(TRAINS + text)
        jobs.append(dry(root / name, [str(root / f"{name}.py")], "h100-80gb", STEPS))
    run_all(root, jobs)
    return root


@pytest.mark.parametrize("name", SCRIPTS)
def test_how_a_script_ends_is_said_in_a_line(name: str, ran: Path) -> None:
    _, message, is_input, steps = SCRIPTS[name]
    files = Files(ran / name, 0)

    assert files.fault.exists() is bool(message), (ran / name / "log").read_text()[-3000:]
    if message:
        fault = read(files.fault, Fault)
        assert message in fault.message
        assert "\n" not in fault.message
        assert fault.is_input is is_input
    assert files.record.exists() is bool(steps)
    if steps:
        assert f"{steps} steps of the script" in " ".join(record(ran / name).notes)


def test_values_devices_and_evaluations_are_followed(ran: Path) -> None:
    found = record(ran / "mechanisms")

    assert not Files(ran / "mechanisms", 0).fault.exists()
    assert found.peak_phase is Phase.FORWARD  # of the evaluation, whose batch is 64 times as large
    assert (found.peak_allocated_bytes or 0) > 64 * (2 * 16) * 101 * 4


@pytest.mark.nightly
def test_a_script_that_hangs_is_said_where(tmp_path: Path) -> None:
    script = tmp_path / "hangs.py"
    script.write_text("import time\nprint('waiting', flush=True)\ntime.sleep(600)\n")
    done = bf16prof("simulate", "--timeout", "60", "--", str(script))

    assert done.code == 3
    assert "hangs.py has not come to 3 steps after 60 seconds (--timeout): rank 0 was in init (hangs.py, line 3 in <module>)" in done.stderr
    assert "waiting" in done.stderr
