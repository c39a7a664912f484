"""How long `bf16prof estimate` takes: the grid inside one process, and the whole process beside
others, as ratios in one run."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from timing import ROUNDS, bf16prof, process, python, ratio, say, seconds

from bf16prof.cases import Selection, expand
from bf16prof.closed_form.predict import predict
from bf16prof.engine.constraints import admit
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.signatures import store
from bf16prof.verdict import Replays
from bf16prof.vocabulary import Device

FEW = 3
"""Rounds of what takes seconds."""
RECIPES = ("fp32", "autocast-fp32", "bf16-fp32-master", "fp16-fp32-master", "bf16-full", "bf16-full-autocast")


def grid() -> int:
    """Predict every admitted cell of 4 stages x 8 GPU counts x 6 recipes of the published example;
    how many there are."""
    profile = load_profile("deepspeed-bf16-example").profile
    selection = Selection(profile, (0, 1, 2, 3), (1, 2, 4, 8, 16, 32, 64, 128), RECIPES, Device.GPU, find_gpu("h100-80gb"))
    jobs, _ = admit(expand(selection))
    return len([predict(job) for job in jobs])


def sweep() -> int:
    """What an autotuner asks in one process: micro-batch x length x stage x recipe of one model;
    how many cells there are."""
    count = 0
    for micro, length in itertools.product((1, 2, 4, 8), (1024, 2048, 4096)):
        sets = {"workload.micro_batch_size": micro, "workload.sequence_length": length}
        profile = load_profile("llama3-8b", [Override(key, value, "benchmark") for key, value in sets.items()]).profile
        jobs, _ = admit(expand(Selection(profile, (0, 1, 2, 3), (8,), RECIPES, Device.GPU, find_gpu("h100-80gb"))))
        count += len([predict(job, replays=Replays.NONE) for job in jobs])
    return count


def first_signature() -> None:
    """The first estimate of a model that nothing is known of, its trace included, beside the
    imports that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"model_type": "olmo2", "num_hidden_layers": 16, "hidden_size": 2048}), encoding="utf-8")
        one = ("estimate", str(config), "--zero", "2", "--gpus", "8", "--gpu", "h100", "--recipe", "bf16-full", "--seq", "2048")

        def ours() -> None:
            surroundings = {**os.environ, store.FOLDER_VARIABLE: tempfile.mkdtemp(dir=folder)}
            command = [sys.executable, "-m", "bf16prof", *one]
            subprocess.run(command, check=True, env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

        ratio("first signature of a model beside `import deepspeed, transformers`", ours, python("import deepspeed, transformers"), FEW)


GPT2 = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 1600,
    "n_layer": 48,
    "n_head": 25,
}
"""The model that every estimator is asked about."""

DEEPSPEED = """
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs_all_cold
estimate_zero3_model_states_mem_needs_all_cold(1_557_611_200, 80_411_200, num_gpus_per_node=8, num_nodes=1)
"""


def others() -> None:
    """DeepSpeed's own estimator, and accelerate's where it is installed, beside ours on GPT-2
    XL."""
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(GPT2), encoding="utf-8")
        ours = bf16prof("estimate", "--hf-config", str(config), "--zero", "3", "--gpus", "8", "--recipe", "bf16-fp32-master")
        ratio("GPT-2 XL beside DeepSpeed's estimate_zero3_model_states_mem_needs", ours, python(DEEPSPEED))
        if importlib.util.find_spec("accelerate") is None:
            sys.stdout.write("accelerate is not installed: its estimate-memory is not timed\n")
            return
        command = shutil.which("accelerate", path=str(Path(sys.executable).parent)) or "accelerate"
        ratio(
            "GPT-2 XL beside accelerate estimate-memory",
            ours,
            process(command, "estimate-memory", folder, "--library_name", "transformers"),
        )


def main() -> None:
    """Print all benchmarks."""
    cold = seconds(grid)
    cells, times = grid(), [seconds(grid) for _ in range(ROUNDS)]
    say(f"estimate, {cells} admitted cells, inside one process: cold, warm", f"{cold:7.3f} s  {statistics.median(times):7.3f} s")
    swept, in_seconds = sweep(), seconds(sweep)
    say(f"a sweep of {swept} cells inside one process, without replays: a cell", f"{1000 * in_seconds / swept:7.3f} ms")
    floor = python("import typer, rich.table")
    ours = bf16prof("estimate", "--zero", "3", "--gpus", "4", "--recipe", "bf16-full")
    ratio("one cell beside `import typer, rich.table`", ours, floor)
    ratio("`bf16prof --help` beside it", bf16prof("--help"), floor)
    counts, recipes = "1,2,4,8,16,32,64,128", ",".join(RECIPES)
    whole = bf16prof("estimate", "llama3-8b", "--gpus", counts, "--gpu", "h100", "--recipe", recipes, "--json")
    ratio("192 cells with --json beside it", whole, floor, FEW)
    ratio("`plan` of a 70B model beside it", bf16prof("plan", "llama3-70b", "--gpus", "64", "--gpu", "h100", "--no-verify"), floor, FEW)
    ratio("`bf16prof estimate` beside `import torch`", ours, python("import torch"))
    first_signature()
    others()


if __name__ == "__main__":
    main()
