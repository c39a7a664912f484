"""Scripts of every style, dry-run and on two real gloo ranks: what is held between steps and in
every phase is the same to the byte."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from many import H100, STEPS, dry, record, run_all

from bf16prof.vocabulary import TRAINING, Component, Phase

CORPUS = Path(__file__).with_name("corpus")
QUICK = ("loss_backward", "evaluation")
OTHERS = (
    "plain_engine", "two_engines", "client_optimizer", "parameter_groups", "training_data", "manual_accumulation", "zero_init", "moe",
    "everything", "accelerate_loop", "trainer", "trl_sft",
)  # fmt: skip
LIBRARIES = {"accelerate_loop": "accelerate", "trainer": "transformers", "trl_sft": "trl"}
STYLES = (*QUICK, *(pytest.param(style, marks=pytest.mark.nightly) for style in OTHERS))

pytestmark = [pytest.mark.timeout(1800), pytest.mark.xdist_group("scripts")]

Folder = Callable[[str], Path]


@dataclass(frozen=True)
class Real:
    """What one real rank saw: bytes after each step, and peak and end of every phase, step by step;
    the first step's begin with init's.

    Gloo's threads let go of some bytes late, now and then, so of steps that repeat each other the
    least is taken.
    """

    message: str
    allocated: list[int]
    steps: list[dict[str, tuple[int, int]]]

    def end(self, phase: str) -> int:
        """Bytes at the end of a phase."""
        return min(step[phase][1] for step in self.steps[1:] or self.steps if phase in step)

    def peak(self, phase: str) -> int:
        """The highest in a phase over all steps; the first step, in which states are made, may have
        the highest."""
        repeated = min(step[phase][0] for step in self.steps[1:] if phase in step)
        return max(repeated, *(step[phase][0] for step in self.steps[:1] if phase in step), 0)


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A function that gives the folder of a style, in it one for each way it was run; all quick
    ones are run at once, and all others."""
    roots: dict[bool, Path] = {}

    def get(style: str) -> Path:
        is_quick = style in QUICK
        if is_quick not in roots:
            roots[is_quick] = tmp_path_factory.mktemp("corpus")
            run_all(roots[is_quick], [job for each in (QUICK if is_quick else OTHERS) for job in _jobs(roots[is_quick] / each)])
        return roots[is_quick] / style

    return get


def _jobs(folder: Path) -> list[dict[str, object]]:
    """A style as two CPU ranks, dry and real, and on a GPU; none where its library is not
    installed."""
    style = folder.name
    if style in LIBRARIES and importlib.util.find_spec(LIBRARIES[style]) is None:
        return []
    words = [str(CORPUS / f"{style}.py")]
    (folder / "real").mkdir(parents=True)
    real = {"kind": "real", "folder": str(folder / "real"), "words": words, "steps": STEPS}
    imported: list[dict[str, object]] = [{"kind": "import", "module": LIBRARIES[style]}] if style in LIBRARIES else []
    return [*imported, dry(folder / "cpu", words, None), dry(folder / H100, words, H100), real]


def _real(folder: Path) -> Real:
    path = folder / "real" / "rank0.json"
    assert path.exists(), (folder / "real" / "log0").read_text()[-3000:]
    return Real(**json.loads(path.read_text()))


def _phases(style: str) -> tuple[Phase, ...]:
    """The phases that a style has besides init."""
    return (*TRAINING, Phase.EVAL) if style == "evaluation" else TRAINING


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    """Skip a style whose library is not installed."""
    style = request.node.callspec.params["style"]
    if style in LIBRARIES:
        pytest.importorskip(LIBRARIES[style])


@pytest.mark.parametrize("style", STYLES)
def test_a_dry_run_holds_what_real_ranks_hold(style: str, ran: Folder) -> None:
    dry_run, real = record(ran(style) / "cpu"), _real(ran(style))

    assert real.message == ""
    assert dry_run.allocated_bytes == real.allocated[-1]
    assert dry_run.phases[Phase.INIT].end_bytes == real.steps[0]["init"][1]


@pytest.mark.parametrize("style", STYLES)
def test_a_dry_run_peaks_where_real_ranks_peak(style: str, ran: Folder) -> None:
    """As exactly as our own loop does (`test_exact.py`)."""
    dry_run, real = record(ran(style) / "cpu"), _real(ran(style))

    assert set(dry_run.phases) == {Phase.INIT, *_phases(style)}
    for phase in _phases(style):
        if (style, phase) == ("trl_sft", Phase.STEP):  # gloo gathers TRL's metrics in a thread of its own, by other copies in each step
            peaks = [step["step"][0] for step in real.steps]
            assert len(set(peaks)) > 1
            assert (dry_run.phases[phase].peak_bytes or 0) <= min(peaks)
            continue
        assert dry_run.phases[phase].peak_bytes == pytest.approx(real.peak(phase), rel=0.001), phase
        assert dry_run.phases[phase].end_bytes == pytest.approx(real.end(phase), rel=0.001), phase


@pytest.mark.parametrize("style", STYLES)
def test_the_same_script_is_recorded_on_a_gpu(style: str, ran: Folder) -> None:
    found = record(ran(style) / H100)

    assert set(found.phases) == {Phase.INIT, *_phases(style)}
    assert found.workload is not None
    assert found.reserved_bytes
    assert any("kept by the training loop" in item.name for item in found.items)
    if style != "moe":  # of which DeepSpeed keeps two scalars in a global variable (deepspeed/moe/sharded_moe.py)
        assert Component.OTHER not in {item.component for item in found.items}
