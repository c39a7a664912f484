"""Calibrate step times on a few measured cases and predict the others of a matrix: how far off are
the predictions?

`python benchmarks/calibration.py [FOLDER]` measures a small gpt2 on two CPU ranks, stages 0 to 3 x
recipes x micro-batches, into FOLDER (a temporary one if not given; what is measured there already
is read), and prints the table of docs/step-time.md.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from timing import say

from bf16prof.closed_form.calibration import calibrate
from bf16prof.records import MemoryRecord
from bf16prof.runs import load
from bf16prof.vocabulary import Source

MODEL = ("family='gpt2'", "hidden_size=256", "num_layers=4", "num_heads=4", "vocab_size=257", "max_sequence_length=128")
RECIPES = ("fp32", "bf16-fp32-master", "bf16-full")
MICRO_BATCHES = (1, 4)

Key = tuple[int, str, int]
"""A case: stage, recipe, micro-batch."""


def measured(folder: Path, micro_batch: int) -> list[MemoryRecord]:
    """The measured cases of one micro-batch."""
    path = folder / f"micro-batch-{micro_batch}"
    if not path.exists():
        sets = [word for setting in MODEL for word in ("--set", f"model.{setting}")]
        words = ["--zero", "0,1,2,3", "--recipe", ",".join(RECIPES), "--micro-batch-size", str(micro_batch), "--nproc-per-node", "2"]
        steps = ["--set", "workload.data=synthetic", "--warmup", "4", "--steps", "24", "--output-dir", str(path), "--quiet"]
        subprocess.run([sys.executable, "-m", "bf16prof", "measure", *sets, *words, *steps], check=True, stdout=subprocess.DEVNULL)
    return [record for record in load(path).records if record.source is Source.MEASURE]


def choices(cases: Mapping[Key, MemoryRecord]) -> dict[str, Callable[[Key], bool]]:
    """What to calibrate on, by name."""
    return {
        "one case: ZeRO-2, bf16-fp32-master, micro-batch 1": lambda key: key == (2, "bf16-fp32-master", 1),
        "two cases: that, and ZeRO-2, fp32, micro-batch 1": lambda key: key in ((2, "bf16-fp32-master", 1), (2, "fp32", 1)),
        "ZeRO-0 and ZeRO-3, fp32 and bf16-fp32-master, micro-batch 1": lambda key: (
            key[0] in (0, 3) and key[1] != "bf16-full" and key[2] == 1
        ),
        "ZeRO-0 and ZeRO-3, fp32 and bf16-fp32-master, both micro-batches": lambda key: key[0] in (0, 3) and key[1] != "bf16-full",
        f"all {len(cases)} cases (a fit, no prediction)": lambda _: True,
    }


def report(name: str, cases: Mapping[Key, MemoryRecord], chosen: Callable[[Key], bool]) -> None:
    """Calibrate on the chosen cases and print how far off the others are."""
    known = [record for key, record in cases.items() if chosen(key)]
    fit = calibrate(name, known)
    others = {key: record for key, record in cases.items() if not chosen(key)} or dict(cases)
    rows = [(key, record, fit.predict(record.work)) for key, record in others.items() if record.work]
    say(f"\n{name}", "")
    say("  constants", ", ".join(f"{term} {value:.3g}" for term, value in fit.seconds_per.items()))
    say("  error bar (90 % of held-back steps), their bias", f"{fit.error_share:.1%}, {fit.bias:+.1%}")
    errors = []
    for (stage, recipe, micro), record, seconds in rows:
        actual = record.step_time_s or 0.0
        label = f"  zero{stage} {recipe} micro-batch {micro}"
        if seconds is None:
            say(label, f"measured {actual * 1e3:7.1f} ms  no prediction")
            continue
        errors.append(seconds / actual - 1)
        say(label, f"measured {actual * 1e3:7.1f} ms  predicted {seconds * 1e3:7.1f} ms  {errors[-1]:+7.1%}")
    summary(errors, len(rows))


def summary(errors: Sequence[float], asked: int) -> None:
    """The median and the worst absolute error."""
    sizes = [abs(error) for error in errors]
    say(f"  {len(errors)} of {asked} predicted: median and worst error", f"{statistics.median(sizes):.1%}, {max(sizes):.1%}")


def main() -> None:
    """Measure, calibrate, predict."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        cases = {
            (record.case.zero_stage, record.case.recipe, micro): record for micro in MICRO_BATCHES for record in measured(folder, micro)
        }
        for name, chosen in choices(cases).items():
            report(name, cases, chosen)


if __name__ == "__main__":
    main()
