"""How long `bf16prof estimate` takes: the grid inside one process, and the whole process beside others, as ratios in one run."""

from __future__ import annotations

import statistics

from timing import ROUNDS, bf16prof, python, ratio, say, seconds

from bf16prof.cases import Selection, expand
from bf16prof.engine.constraints import admit
from bf16prof.estimate.predict import predict
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile
from bf16prof.records import Device

RECIPES = ("fp32", "autocast-fp32", "bf16-fp32-master", "fp16-fp32-master", "bf16-full", "bf16-full-autocast")


def grid() -> int:
    """Predict every admitted cell of 4 stages x 8 GPU counts x 6 recipes of the published example; how many there are."""
    profile = load_profile("deepspeed-bf16-example").profile
    selection = Selection(profile, (0, 1, 2, 3), (1, 2, 4, 8, 16, 32, 64, 128), RECIPES, Device.GPU, find_gpu("h100-80gb"))
    jobs, _ = admit(expand(selection))
    return len([predict(job) for job in jobs])


def main() -> None:
    """Print all benchmarks."""
    grid()
    cells, times = grid(), [seconds(grid) for _ in range(ROUNDS)]
    say(f"estimate, {cells} admitted cells, inside one process", f"{statistics.median(times):7.3f} s")
    ours = bf16prof("estimate", "--zero", "3", "--gpus", "4", "--recipe", "bf16-full")
    ratio("`bf16prof estimate` beside `import typer, rich.table`", ours, python("import typer, rich.table"))
    ratio("`bf16prof estimate` beside `import torch`", ours, python("import torch"))


if __name__ == "__main__":
    main()
