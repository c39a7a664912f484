"""The same small model under every recipe that runs on this machine's CPU, three seeds each: what does a recipe cost in learning?

`python benchmarks/study.py [FOLDER]` trains what `study.toml` says on one CPU rank per run, two runs at a time, into FOLDER (runs/study if
not given). What has finished there with the same command is not trained again, what was interrupted starts anew. Then it writes the
tables and figures of docs/study.md between the marks in it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from timing import say

from bf16prof.cases import STAGES, Selection, expand
from bf16prof.engine.constraints import refusal_reason
from bf16prof.errors import InputError
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.records import Device, Offload
from bf16prof.runs import MANIFEST, Run, Status, load

HERE = Path(__file__).parent
PROFILE = HERE / "study.toml"
SEEDS = (1, 2, 3)
WARMUP, STEPS, WATCHED = 3, 797, 5
AT_ONCE = 2
"""Runs at a time, of one rank with one thread each: on two cores faster than one run with two threads."""


@dataclass(frozen=True)
class Trial:
    """One recipe with one seed, at the lowest stage that takes the recipe, with the optimizer offloaded where there is no other way."""

    recipe: str
    seed: int
    stage: int
    offload: Offload
    torch_adam: bool

    def command(self, folder: Path) -> list[str]:
        """What `bf16prof` is called with, from the folder of the project."""
        return [
            "measure", "--profile", str(PROFILE.relative_to(HERE.parent)), "--recipe", self.recipe, "--zero", str(self.stage),
            "--offload", str(self.offload), "--set", f"optimizer.torch_adam={str(self.torch_adam).lower()}",
            "--set", f"workload.seed={self.seed}", "--nproc-per-node", "1", "--warmup", str(WARMUP), "--steps", str(STEPS),
            "--quality", str(WATCHED), "--output-dir", str(self.folder(folder)),
        ]  # fmt: skip

    def folder(self, folder: Path) -> Path:
        """Its run directory."""
        return folder / f"{self.recipe}-seed{self.seed}"


def trials() -> list[Trial]:
    """Every recipe that DeepSpeed runs with every seed, seed by seed, so that an interrupted study has all recipes first."""
    return [Trial(recipe, seed, *_room(recipe)) for seed in SEEDS for recipe in runnable_recipes()]


def _room(recipe: str) -> tuple[int, Offload, bool]:
    """The first stage, offloading and torch.optim (rather than DeepSpeed's own optimizer) that DeepSpeed takes the recipe with."""
    for stage, offload, torch_adam in itertools.product(STAGES, (Offload.NONE, Offload.OPTIMIZER), (True, False)):
        profile = load_profile(str(PROFILE), [Override("optimizer.torch_adam", torch_adam, "study")]).profile
        job, *_ = expand(Selection(profile, [stage], [1], [recipe], Device.CPU, None, offload))
        if refusal_reason(job) is None:
            return stage, offload, torch_adam
    raise AssertionError(f"no stage takes {recipe}")


def result(trial: Trial, folder: Path) -> Run | None:
    """The run of a trial that has come to its end (finished, or failed for a reason), if it was made with the same command."""
    path = trial.folder(folder)
    if not (path / MANIFEST).exists():
        return None
    try:
        run = load(path)
    except InputError:
        return None
    over = run.manifest.status not in (Status.RUNNING, Status.INTERRUPTED, Status.PLANNED, Status.TIMEOUT)
    return run if over and list(run.manifest.argv[1 : 1 + len(trial.command(folder))]) == trial.command(folder) else None


def train(trial: Trial, folder: Path) -> None:
    """Run a trial, unless it has been run."""
    if result(trial, folder):
        return
    begin = time.monotonic()
    words = [sys.executable, "-m", "bf16prof", *trial.command(folder), "--force", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=False, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    run = result(trial, folder)
    said = str(run.manifest.status) if run else done.stderr.strip()[-300:]
    say(f"{trial.recipe} seed {trial.seed}", f"{time.monotonic() - begin:5.0f} s  {said}")


def train_all(folder: Path, planned: Sequence[Trial]) -> None:
    """Run all trials, some at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda trial: train(trial, folder), planned))


def main() -> None:
    """Train, then write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study").absolute()
    planned = trials()
    train_all(folder, planned)


if __name__ == "__main__":
    main()
