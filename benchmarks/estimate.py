"""How long `bf16prof estimate` takes: the grid inside one process, and the whole process beside others, as ratios in one run.

Ratios are measured in turn (A B A B ...) so that they hold when the machine's speed drifts; medians are quoted.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from bf16prof.cases import Selection, expand
from bf16prof.engine.constraints import admit
from bf16prof.estimate.predict import predict
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile
from bf16prof.records import Device

ROUNDS = 7
RECIPES = ("fp32", "autocast-fp32", "bf16-fp32-master", "fp16-fp32-master", "bf16-full", "bf16-full-autocast")


def grid() -> int:
    """Predict every admitted cell of 4 stages x 8 GPU counts x 6 recipes of the published example; how many there are."""
    profile = load_profile("deepspeed-bf16-example").profile
    selection = Selection(profile, (0, 1, 2, 3), (1, 2, 4, 8, 16, 32, 64, 128), RECIPES, Device.GPU, find_gpu("h100-80gb"))
    jobs, _ = admit(expand(selection))
    return len([predict(job) for job in jobs])


def seconds(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def process(*command: str) -> Callable[[], object]:
    """A call that runs a command to its end and throws its output away."""
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ratio(name: str, ours: Callable[[], object], other: Callable[[], object]) -> None:
    """Time both in turn and print the median of each and of the ratio."""
    ours(), other()
    pairs = [(seconds(ours), seconds(other)) for _ in range(ROUNDS)]
    own, reference = (statistics.median(times) for times in zip(*pairs, strict=True))
    quotient = statistics.median(a / b for a, b in pairs)
    sys.stdout.write(f"{name:<62} {own:7.3f} s  {reference:7.3f} s  ratio {quotient:5.2f}\n")


def main() -> None:
    """Print all benchmarks."""
    grid()
    cells, times = grid(), [seconds(grid) for _ in range(ROUNDS)]
    sys.stdout.write(f"{f'estimate, {cells} admitted cells, inside one process':<62} {statistics.median(times):7.3f} s\n")
    ours = process(sys.executable, "-m", "bf16prof", "estimate", "--zero", "3", "--gpus", "4", "--recipe", "bf16-full")
    ratio("`bf16prof estimate` beside `import typer, rich.table`", ours, process(sys.executable, "-c", "import typer, rich.table"))
    ratio("`bf16prof estimate` beside `import torch`", ours, process(sys.executable, "-c", "import torch"))


if __name__ == "__main__":
    main()
