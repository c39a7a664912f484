"""Plans drawn at random (seeded), each at the largest micro-batch that it says fits. Few layers, so
that a dry run takes seconds."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass

from bf16prof.cases import Job
from bf16prof.planning.judge import Judge
from bf16prof.planning.limits import largest_micro_batch
from bf16prof.planning.question import Question, powers_of_two
from bf16prof.planning.search import best_first
from bf16prof.plans import Plan, Room
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.vocabulary import Offload

FAMILIES = ("transformer-postln", "gpt2", "llama")
CHOICES: dict[str, tuple[object, ...]] = {
    "model.hidden_size": (1024, 1536, 2048, 4096),
    "model.num_heads": (8, 16),
    "model.num_layers": (2, 4, 6),
    "model.vocab_size": (8000, 32000, 50257),
    "workload.sequence_length": (256, 512, 1024, 2048),
}
FIXED = ("optimizer.torch_adam=false", "optimizer.fused=false", "model.max_sequence_length=2048")
BOARDS = ("l4-24gb", "rtx-4090-24gb", "a100-40gb")
GPUS = (1, 2, 4, 8)


@dataclass(frozen=True)
class DrawnPlan:
    """A plan that says it fits, with its job and what there is to fit in."""

    family: str
    job: Job
    plan: Plan
    room: Room


def question(family: str, gpu: str, *sets: str, expandable: bool = False, margin: float | None = None) -> Question:
    """What fits a GPU, of a model of a family."""
    profile = load_profile("cpu-demo", [parse_set(text) for text in (*FIXED, f"model.family={family}", *sets)]).profile
    return Question(
        profile,
        find_gpu(gpu),
        (0, 1, 2, 3),
        tuple(runnable_recipes()),
        powers_of_two(64),
        margin=margin,
        expandable=expandable,
    )


def draw(seed: int, count: int, *, expandable: bool = False, margin: float | None = None) -> list[DrawnPlan]:
    """So many plans, each of a question of its own; `margin`: the share of the allocator's memory
    that is left, `plan`'s if not given."""
    rng = random.Random(seed)
    drawn: list[DrawnPlan] = []
    while len(drawn) < count:
        family = FAMILIES[len(drawn) % len(FAMILIES)]
        sets = [f"{key}={rng.choice(choices)}" for key, choices in CHOICES.items()]
        asked = dataclasses.replace(
            question(family, rng.choice(BOARDS), *sets, expandable=expandable, margin=margin),
            stages=(rng.choice((0, 1, 2, 3, 3)),),
            recipes=(rng.choice(tuple(runnable_recipes())),),
            offloads=(rng.choice((Offload.NONE, Offload.NONE, Offload.OPTIMIZER, Offload.OPTIMIZER_AND_PARAMETERS)),),
            checkpointing=(rng.choice((False, True)),),
        )
        judge, gpus = Judge(asked), rng.choice(GPUS)
        for best in best_first(judge, gpus):
            tight = judge(best.setting.but(micro_batch_size=largest_micro_batch(judge, best.setting)))
            assert tight is not None, "what fits was judged"
            drawn.append(DrawnPlan(family, tight.job, tight.plan, asked.room(gpus)))
    return drawn
