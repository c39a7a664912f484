"""Jobs drawn at random (seeded) over everything that moves memory, of a size that a dry run does in seconds."""

from __future__ import annotations

import random
from collections.abc import Iterator

from bf16prof.cases import Job, Selection, expand
from bf16prof.engine.constraints import admit
from bf16prof.errors import Refused
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.records import Device, Offload

ZERO = "deepspeed.zero_optimization"
RECIPES = ("fp32", "bf16-fp32-master", "bf16-full", "bf16-full-autocast", "autocast-fp32", "fp16-fp32-master")
CHOICES: dict[str, tuple[object, ...]] = {
    "model.family": ("transformer-postln", "gpt2", "llama"),
    "model.hidden_size": (256, 384, 512, 768),
    "model.num_heads": (4, 8),
    "model.num_layers": (2, 3, 4, 5, 6, 7, 8),
    "model.vocab_size": (1000, 8000, 32000, 50000),
    "workload.sequence_length": (128, 256, 512),
    "workload.micro_batch_size": (1, 2, 4),
    "workload.activation_checkpointing": ("true", "false"),
    "workload.gradient_accumulation_steps": (1, 1, 4),
    f"{ZERO}.reduce_bucket_size": (10**5, 10**6, 5 * 10**6, 5 * 10**7),
    f"{ZERO}.stage3_prefetch_bucket_size": (0, 10**5, 10**6, 5 * 10**7),
    f"{ZERO}.stage3_max_live_parameters": (10**6, 10**7, 10**9),
    f"{ZERO}.stage3_max_reuse_distance": (0, 10**6, 10**7, 10**9),
    f"{ZERO}.stage3_param_persistence_threshold": (0, 10**4, 10**5),
    f"{ZERO}.sub_group_size": (10**6, 10**7, 10**9),
    f"{ZERO}.overlap_comm": ("true", "false"),
}
OFFLOADS = (None, None, None, Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS)


def draw(seed: int, count: int) -> list[Job]:
    """So many jobs for a GPU that DeepSpeed runs."""
    drawn = _jobs(random.Random(seed))
    return [next(drawn) for _ in range(count)]


def _jobs(rng: random.Random) -> Iterator[Job]:
    while True:
        values = {key: rng.choice(choices) for key, choices in CHOICES.items()}
        values["model.max_sequence_length"] = values["workload.sequence_length"]
        if values["model.family"] == "llama":
            values["model.num_kv_heads"] = rng.choice((2, values["model.num_heads"]))
        sets = ["optimizer.torch_adam=false", "optimizer.fused=false", *(f"{key}={value}" for key, value in values.items())]
        stage, world, recipe = rng.choice((0, 1, 2, 3, 3)), rng.choice((1, 2, 4, 8, 64, 512)), rng.choice(RECIPES)
        offload = rng.choice(OFFLOADS) if stage else None
        profile = load_profile("cpu-demo", [parse_set(each) for each in sets]).profile
        try:
            yield admit(expand(Selection(profile, [stage], [world], [recipe], Device.GPU, find_gpu("h100-80gb"), offload)))[0][0]
        except Refused:
            continue
