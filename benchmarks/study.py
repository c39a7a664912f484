"""The same small model under every recipe that runs on this machine's CPU, three seeds each: what
does a recipe cost in learning?

`python benchmarks/study.py [FOLDER]` trains what `study.toml` says on one CPU rank per run, two
runs at a time, into FOLDER (runs/study if not given). What has finished there with the same command
is not trained again, what was interrupted starts anew. Then it writes the tables and figures of
docs/study.md between the marks in it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from make_pictures import page_picture
from timing import say

from bf16prof.cases import STAGES, Job, Selection, expand
from bf16prof.engine.constraints import refusal_reason
from bf16prof.errors import InputError
from bf16prof.files import write_text
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.recipes import BYTES_HEADER, find_recipe, runnable_recipes
from bf16prof.reports import palette
from bf16prof.reports.intervals import CONFIDENCE, Interval
from bf16prof.reports.loss_figure import loss_curves, mean_curve
from bf16prof.reports.losses import SeedGroup, paired, seed_groups, window_of
from bf16prof.reports.plots import Figure, base_layout, bundle, figure, fragment
from bf16prof.reports.price_figure import gap, learned, price
from bf16prof.reports.series import case_styles, line
from bf16prof.reports.views import run_views
from bf16prof.runs import MANIFEST, Run, Status, load
from bf16prof.vocabulary import Device, Offload

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
PROFILE = HERE / "study.toml"
SEEDS = (1, 2, 3)
WARMUP, STEPS, WATCHED = 3, 347, 5
AT_ONCE = 2
"""Runs at a time, of one rank with one thread each: on two cores faster than one run with two
threads."""


@dataclass(frozen=True)
class StudyRun:
    """One recipe with one seed, at the lowest stage that takes the recipe, with the optimizer
    offloaded where there is no other way."""

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

    @property
    def job(self) -> Job:
        """What that command trains."""
        overrides = [Override("optimizer.torch_adam", self.torch_adam, "study"), Override("workload.seed", self.seed, "study")]
        profile = load_profile(str(PROFILE), overrides).profile
        return expand(Selection(profile, [self.stage], [1], [self.recipe], Device.CPU, None, self.offload))[0]

    def folder(self, folder: Path) -> Path:
        """Its run directory."""
        return folder / f"{self.recipe}-seed{self.seed}"


def trials() -> list[StudyRun]:
    """Every recipe that DeepSpeed runs with every seed, seed by seed, so that an interrupted study
    has all recipes first."""
    return [StudyRun(recipe, seed, *_room(recipe)) for seed in SEEDS for recipe in runnable_recipes()]


def _room(recipe: str) -> tuple[int, Offload, bool]:
    """The first stage, offloading and torch.optim (rather than DeepSpeed's own optimizer) that
    DeepSpeed takes the recipe with."""
    rooms = itertools.product(STAGES, (Offload.NONE, Offload.OPTIMIZER), (True, False))
    return next(room for room in rooms if refusal_reason(StudyRun(recipe, SEEDS[0], *room).job) is None)


def result(trial: StudyRun, folder: Path) -> Run | None:
    """What there is of a trial, if it was made with the same command and profile."""
    path = trial.folder(folder)
    if not (path / MANIFEST).exists():
        return None
    try:
        run = load(path)
    except InputError:
        return None
    words = trial.command(folder)
    same = list(run.manifest.argv[1 : 1 + len(words)]) == words and run.manifest.profile == trial.job.profile.model_dump(mode="json")
    return run if same else None


def train(trial: StudyRun, folder: Path) -> str | None:
    """Run a trial, unless it has finished before; why it did not, or `None`."""
    if (before := result(trial, folder)) and before.manifest.status is Status.FINISHED:
        return None
    begin = time.monotonic()
    words = [sys.executable, "-m", "bf16prof", *trial.command(folder), "--force", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, check=False, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    run = result(trial, folder)
    message = run.manifest.cases[0].message if run else done.stderr.strip()[-300:]
    failed = None if run and run.manifest.status is Status.FINISHED else message
    say(f"{trial.recipe} seed {trial.seed}", f"{time.monotonic() - begin:5.0f} s  {failed or 'finished'}")
    return failed


def train_all(folder: Path, planned: Sequence[StudyRun]) -> dict[str, str]:
    """Run all trials, some at a time; by recipe, why one did not run."""
    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        said = pool.map(lambda trial: train(trial, folder), planned)
        return {trial.recipe: why.removeprefix("bf16prof: ") for trial, why in zip(planned, said, strict=True) if why}


@dataclass(frozen=True)
class Study:
    """What the runs have shown: their groups of seeds by recipe, and why recipes did not run."""

    runs: tuple[Run, ...]
    groups: dict[str, SeedGroup]
    not_run: dict[str, str]

    @classmethod
    def of(cls, results: Sequence[Run], failed: Mapping[str, str]) -> Study:
        """The study of these runs; `failed`: recipes of which a run did not finish, with the
        reason."""
        finished = tuple(run for run in results if run.manifest.status is Status.FINISHED)
        groups = {group.recipe: group for group in seed_groups(run_views(finished))}
        return cls(finished, groups, {recipe: said for recipe, said in failed.items() if recipe not in groups})


PAIRS = (
    ("bf16-fp32-master", "fp32"), ("autocast-fp32", "fp32"), ("bf16-pure", "bf16-fp32-master"), ("bf16-fp32-states", "bf16-pure"),
    ("bf16-full", "bf16-pure"), ("bf16-master", "bf16-full"), ("bf16-full-autocast", "bf16-full"),
    ("bf16-stochastic-rounding", "bf16-pure"), ("bf16-kahan", "bf16-pure"), ("bf16-kahan", "bf16-fp32-master"),
)  # fmt: skip
"""Recipes that differ in one thing, or that a question of the literature sets against each
other."""


def facts(study: Study) -> str:
    """What was trained, in one paragraph."""
    run = study.runs[0]
    view = next(iter(study.groups.values())).views[0]
    model, workload, optimizer = (run.manifest.profile[key] for key in ("model", "workload", "optimizer"))
    tokens = workload["micro_batch_size"] * workload["sequence_length"]
    steps = WARMUP + STEPS
    rate = run.manifest.profile["deepspeed"]["more"]["scheduler"]["params"]
    libraries = ("torch", "deepspeed", "torchao", "torch-optimi", "bitsandbytes")
    return (
        f"{model['family']}, {model['num_layers']} layers of {model['hidden_size']}, {view.main.parameters:,} parameters; "
        f"data `{workload['data']}`, bytes as tokens; {steps} steps of {tokens} tokens ({steps * tokens:,} in all, none read twice); "
        f"{optimizer['type']}, learning rate {optimizer['lr']:g} after {rate['warmup_num_steps']} steps of linear warm-up, "
        f"betas {optimizer['betas'][0]:g} and {optimizer['betas'][1]:g}, no clipping; seeds {', '.join(map(str, SEEDS))}; "
        f"one CPU rank with one thread ({run.manifest.hardware['cpu']}); "
        f"{', '.join(f'{name} {run.manifest.versions[name]}' for name in libraries)}. "
        f"± is the {CONFIDENCE:.0%} interval over the seeds by Student's t.\n"
    )


def recipe_table(study: Study) -> str:
    """One row per recipe: where it ran, bytes, loss, its gap to fp32, and what became of the
    updates. Bold gaps exclude 0."""
    rows = []
    for recipe, group in study.groups.items():
        case = group.views[0].case
        tail, edq, lost = group.interval("tail"), learned(group, "edq"), learned(group, "lost_updates")
        assert tail is not None and edq is not None and lost is not None
        gaps = [_gap(group, study.groups["fp32"], quantity) for quantity in ("tail", "mean")]
        where = f"{case.zero_stage}{'' if case.offload is Offload.NONE else ', offloaded'}"
        lost_percent = Interval(100 * lost.mean, None if lost.half_width is None else 100 * lost.half_width, lost.count)
        rows.append([recipe, where, find_recipe(recipe).bytes_in_words, tail.text(3), *gaps, lost_percent.text(2), edq.text(4)])
    window = window_of(WARMUP + STEPS)
    headers = [
        "recipe",
        "ZeRO",
        BYTES_HEADER,
        f"loss, last {window} steps",
        "gap to fp32",
        "gap of the mean of all steps",
    ]
    return _table([*headers, "lost updates (%)", "EDQ"], rows)


def pair_table(study: Study) -> str:
    """The differences of the pairs, seed by seed."""
    known = [(one, other) for one, other in PAIRS if one in study.groups and other in study.groups]
    rows = [[one, other, *(_gap(study.groups[one], study.groups[other], q) for q in ("tail", "mean"))] for one, other in known]
    return _table(["recipe", "less", "loss at the end", "mean of all steps"], rows)


def short_table(study: Study) -> str:
    """The README's: bytes, gap and EDQ."""
    rows = [
        [recipe, find_recipe(recipe).bytes_in_words, _gap(group, study.groups["fp32"]), edq.text(4)]
        for recipe, group in study.groups.items()
        if (edq := learned(group, "edq"))
    ]
    return _table(["recipe", BYTES_HEADER, "loss gap to fp32 at the end", "EDQ"], rows)


def _gap(group: SeedGroup, reference: SeedGroup, quantity: str = "tail") -> str:
    found = None if group is reference else paired(group, reference, quantity)
    if found is None:
        return ""
    text = f"{'+' if found.mean > 0 else ''}{found.text(4)}"
    return f"**{text}**" if found.excludes_zero else text


def _table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in lines)


def left_out(study: Study) -> str:
    """What did not run, and why."""
    return "".join(f"* `{recipe}` did not run: {said}\n" for recipe, said in study.not_run.items())


def gap_curves(study: Study) -> Figure:
    """The running mean of each recipe's loss less that of fp32, means over the seeds."""
    zero = dict(mean_curve(study.groups["fp32"]))
    traces = [
        line(index, (palette.series(index), "solid"), list(curve), [_less(loss, zero[step]) for step, loss in curve.items()])
        | {"mode": "lines"}
        for index, group in enumerate(study.groups.values())
        if (curve := dict(mean_curve(group)))
    ]
    return figure("study-gaps", traces, base_layout(380, "step", "running mean of the loss, less that of fp32"), "Loss gap by step")


def _less(loss: float | None, other: float | None) -> float | None:
    return None if loss is None or other is None else loss - other


def picture(study: Study, target: Path) -> None:
    """The figures of the report over these runs, and the gaps by step, one under the other, as a
    PNG."""
    views = run_views(study.runs)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "study.html"
        drawn = [loss_curves(views), gap_curves(study), gap(views), price(views)]
        looks = {view.case.recipe: colour for view, (colour, _) in zip(views, case_styles(views), strict=True)}
        legend = "".join(f"<span style='color:{colour}'>\u25a0 {recipe}&emsp;</span>" for recipe, colour in looks.items())
        page.write_text(
            f"<meta charset='utf-8'><script>{bundle()}</script><p style='font:12px sans-serif'>{legend}</p>"
            + "".join(f"<div>{fragment(found)}</div>" for found in drawn if found),
            encoding="utf-8",
        )
        page_picture(page, target, "1000,1600")


def put(path: Path, mark: str, text: str) -> None:
    """Replace what stands between the marks of that name in a Markdown file."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, _, after = rest.partition(end)
    assert after, f"{path} has no {begin}...{end}"
    write_text(path, f"{before}{begin}{text}{end}{after}")


def main() -> None:
    """Train, then write."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/study").absolute()
    planned = trials()
    failed = train_all(folder, planned)
    study = Study.of([run for trial in planned if (run := result(trial, folder))], failed)
    text = f"{facts(study)}\n{recipe_table(study)}\n{left_out(study)}\nPairs, one less the other, seed by seed:\n\n{pair_table(study)}"
    say(text, "")
    put(DOCS / "study.md", "study", text)
    put(HERE.parent / "README.md", "study", short_table(study))
    picture(study, DOCS / "study.png")


if __name__ == "__main__":
    main()
