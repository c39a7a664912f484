"""Jobs drawn over everything that moves memory, of a depth that a dry run does in seconds: seeded,
or searched by hypothesis."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hypothesis import reject
from hypothesis import strategies as st

from bf16prof.cases import Job, Selection, expand
from bf16prof.engine.constraints import admit
from bf16prof.errors import Refused
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.vocabulary import Device, Offload

ZERO = "deepspeed.zero_optimization"
RECIPES = (
    "fp32", "bf16-fp32-master", "bf16-full", "bf16-full-autocast", "autocast-fp32", "fp16-fp32-master", "bf16-master", "bf16-pure",
    "bf16-fp32-states", "bf16-stochastic-rounding", "bf16-kahan",
)  # fmt: skip
STAGES = (0, 1, 2, 3)
WORLD_SIZES = (1, 2, 4, 8, 64, 512)
OFFLOADS = (None, Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS)
HEAD_WIDTHS = (64, 128, 32, 256)
KERNELS = {
    "DeepSpeed's": ("optimizer.torch_adam=false", "optimizer.fused=false"),
    "fused": ("optimizer.torch_adam=true", "optimizer.fused=true"),
    "foreach": ("optimizer.torch_adam=true", "optimizer.foreach=true", "optimizer.fused=false"),
    "single": ("optimizer.torch_adam=true", "optimizer.foreach=false", "optimizer.fused=false"),
}
CHOICES: dict[str, tuple[object, ...]] = {
    "model.family": ("transformer-postln", "gpt2", "llama"),
    "model.hidden_size": (256, 512, 768, 1024, 2048, 4096),
    "model.num_layers": (2, 3, 4, 5, 6),
    "model.vocab_size": (1000, 8000, 32000, 50000, 128256),
    "workload.sequence_length": (128, 512, 2048),
    "workload.micro_batch_size": (1, 2, 4),
    "workload.activation_checkpointing": ("true", "false"),
    "workload.gradient_accumulation_steps": (1, 4),
    "workload.zero_init": ("false", "true"),
    "workload.keeps_outputs": ("true", "false"),
    f"{ZERO}.reduce_bucket_size": (10**5, 10**6, 5 * 10**6, 5 * 10**7, 5 * 10**8),
    f"{ZERO}.stage3_prefetch_bucket_size": (0, 10**5, 5 * 10**5, 10**6, 5 * 10**7),
    f"{ZERO}.stage3_max_live_parameters": (10**6, 10**7, 10**9),
    f"{ZERO}.stage3_max_reuse_distance": (0, 10**6, 10**7, 10**9),
    f"{ZERO}.stage3_param_persistence_threshold": (0, 10**3, 10**4, 10**5),
    f"{ZERO}.sub_group_size": (10**6, 10**7, 10**9),
    f"{ZERO}.overlap_comm": ("true", "false"),
    f"{ZERO}.reduce_scatter": ("true", "false"),
    f"{ZERO}.round_robin_gradients": ("false", "true"),
}
ATTEMPTS = 20
"""DeepSpeed runs three in five; a list of ten would be given up nearly always if one refusal gave
it up."""

Choose = Callable[[Sequence[object]], object]
"""Picks one of several."""


@dataclass(frozen=True)
class Drawn:
    """What is drawn: all that a job takes from it, as it may be stored."""

    sets: Sequence[str]
    stage: int
    world_size: int
    recipe: str
    offload: Offload | None

    def job(self) -> Job:
        """The job. Raises `Refused` where DeepSpeed does not run it."""
        profile = load_profile("cpu-demo", [parse_set(each) for each in self.sets]).profile
        gpu = find_gpu("h200-141gb")
        selection = Selection(profile, [self.stage], [self.world_size], [self.recipe], Device.GPU, gpu, self.offload)
        return admit(expand(selection))[0][0]


def draw(seed: int, count: int) -> list[Job]:
    """So many jobs for a GPU that DeepSpeed runs."""
    drawn = drawn_from(random.Random(seed))
    return [next(drawn) for _ in range(count)]


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    """A job for a GPU that DeepSpeed runs."""
    for _ in range(ATTEMPTS):
        with contextlib.suppress(Refused):
            return _drawn(lambda choices: draw(st.sampled_from(choices))).job()
    return reject()


def drawn_from(rng: random.Random) -> Iterator[Job]:
    """Jobs for a GPU that DeepSpeed runs, without end."""
    return (job for _, job in described(rng))


def described(rng: random.Random) -> Iterator[tuple[Drawn, Job]]:
    """The same with what each was made of."""
    while True:
        drawn = _drawn(rng.choice)
        with contextlib.suppress(Refused):
            yield drawn, drawn.job()


def _drawn(choose: Choose) -> Drawn:
    values = {key: choose(choices) for key, choices in CHOICES.items()}
    values["model.max_sequence_length"] = values["workload.sequence_length"]
    heads = int(str(values["model.hidden_size"])) // int(str(choose(HEAD_WIDTHS)))
    values["model.num_heads"] = heads
    if values["model.family"] == "llama":
        values["model.num_kv_heads"] = choose((heads, max(1, heads // 4)))
    if values["model.family"] != "transformer-postln":
        values["model.tie_embeddings"] = choose(("true", "false"))
    stage, world, recipe = choose(STAGES), choose(WORLD_SIZES), choose(RECIPES)
    offload = choose(OFFLOADS) if stage else None
    kernel = KERNELS["DeepSpeed's" if offload else str(choose(tuple(KERNELS)))]
    return Drawn((*kernel, *(f"{key}={value}" for key, value in values.items())), stage, world, recipe, offload)  # type: ignore[arg-type]
