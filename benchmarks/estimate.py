"""How long `bf16prof estimate` takes: the grid inside one process, and the whole process beside others, as ratios in one run."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from timing import ROUNDS, bf16prof, process, python, ratio, say, seconds

from bf16prof.cases import Selection, expand
from bf16prof.closed_form.predict import predict
from bf16prof.engine.constraints import admit
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
    """DeepSpeed's own estimator, and accelerate's where it is installed, beside ours on GPT-2 XL."""
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
    ours = bf16prof("estimate", "--zero", "3", "--gpus", "4", "--recipe", "bf16-full")
    ratio("`bf16prof estimate` beside `import typer, rich.table`", ours, python("import typer, rich.table"))
    ratio("`bf16prof estimate` beside `import torch`", ours, python("import torch"))
    others()


if __name__ == "__main__":
    main()
