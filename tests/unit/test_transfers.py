"""What ranks send: against the ZeRO paper's volumes. Against DeepSpeed's own collectives: see
tests/dry_runs/test_step_work.py."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jobs import job, profile, step_work

from bf16prof.cases import Job
from bf16prof.closed_form.predict import predict
from bf16prof.vocabulary import Collective, Phase

PAPERS: dict[str, Any] = {
    "use_multi_rank_bucket_allreduce": False,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
"""Settings under which DeepSpeed communicates as the paper describes."""

RANKS = 1024


def _job(stage: int, recipe: str = "bf16-fp32-master", world: int = RANKS, *, steps: int = 1, **zero: Any) -> Job:
    changes = {f"deepspeed__zero_optimization__{key}": value for key, value in zero.items()}
    return job(profile("llama3-8b", workload__gradient_accumulation_steps=steps, **changes), stage, world, recipe)


def _volume(found: Job) -> float:
    """Elements that a rank sends per step, in parameters of the model."""
    return step_work(found).sent_bytes / 2 / 8_030_261_248


@pytest.mark.parametrize(("stage", "volume"), [(0, 2), (1, 2), (2, 2), (3, 3)])
def test_volume_is_the_zero_papers(stage: int, volume: int) -> None:
    """Rajbhandari et al. 2020 (arXiv 1910.02054), section 7: 2 for data parallelism and stages 1
    and 2, 3 for stage 3, for many ranks.

    Of many ranks one sends (ranks - 1) / ranks of it. At stage 3 the output head is gathered once:
    backward begins with it, so that it is needed again within `max_reuse_distance`.
    """
    head = 128_256 * 4096 if stage == 3 else 0

    assert _volume(_job(stage, **PAPERS)) == pytest.approx((volume - head / 8_030_261_248) * (RANKS - 1) / RANKS, rel=1e-9)


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_sends_half_as_much_again_by_default(stage: int) -> None:
    """All-reduced gradients (2), of which each rank keeps a part, and gathered parameters (1)."""
    assert _volume(_job(stage)) == pytest.approx(3 * (RANKS - 1) / RANKS, rel=1e-9)


def test_gathered_parameters_that_are_needed_again_soon_stay() -> None:
    """`max_reuse_distance` is 1e9 elements by default: a small model is gathered once per step."""
    small = job(profile("gpu-check", deepspeed__zero_optimization__stage3_prefetch_bucket_size=0), 3, RANKS)

    moved = {t.phase for t in step_work(small).transfers if t.collective is Collective.ALL_GATHER}

    assert Phase.BACKWARD not in moved


@pytest.mark.parametrize(("stage", "more"), [(0, 1.0), (1, 1.0), (2, 7 / 3), (3, 3.0)])
def test_gradient_accumulation_multiplies_what_every_micro_step_sends(stage: int, more: float) -> None:
    """Stages 0 and 1 reduce at the boundary; stage 2 reduces in each of three micro-steps and
    gathers once; stage 3 does all in each but for its 65 norms, which stay gathered from one step
    to the next."""
    volume = _volume(_job(stage))
    once = 65 * 4096 / 8_030_261_248 * (RANKS - 1) / RANKS if stage == 3 else 0

    assert _volume(_job(stage, steps=3)) - once == pytest.approx(more * (volume - once), rel=1e-9)


REDUCED = ("gradients", Collective.ALL_REDUCE, Phase.BACKWARD)
UPDATED = ("updated parameters", Collective.ALL_GATHER, Phase.STEP)
SENT: dict[str, tuple[int, str, tuple[tuple[str, Collective, Phase], ...]]] = {
    "plain": (0, "fp32", (REDUCED,)),
    "stage 0": (0, "bf16-fp32-master", (REDUCED,)),
    "BF16_Optimizer": (1, "bf16-fp32-master", (REDUCED, UPDATED)),
    "stage 1": (1, "bf16-full", (REDUCED, UPDATED)),
    "stage 2": (2, "bf16-fp32-master", (REDUCED, UPDATED)),
    "stage 3": (
        3,
        "bf16-fp32-master",
        (
            ("parameters in forward", Collective.ALL_GATHER, Phase.FORWARD),
            ("parameters in backward", Collective.ALL_GATHER, Phase.BACKWARD),
            ("gradients", Collective.REDUCE_SCATTER, Phase.BACKWARD),
            ("persistent parameters", Collective.ALL_GATHER, Phase.STEP),
        ),
    ),
}


@pytest.mark.parametrize("name", SENT)
def test_what_every_wrapper_sends_is_named_with_its_place_in_deepspeed(name: str) -> None:
    stage, recipe, sent = SENT[name]
    changes = {"deepspeed__data_types__grad_accum_dtype": "fp32"} if name == "BF16_Optimizer" else {}

    transfers = step_work(job(profile("llama3-8b", **changes), stage, 16, recipe)).transfers

    runtime = Path(find_spec("deepspeed").origin or "").parent / "runtime"  # type: ignore[union-attr]
    assert tuple((each.name, each.collective, each.phase) for each in transfers) == sent
    for each in transfers:
        assert 0 < each.calls < each.sent_bytes < 2 * each.size_bytes
        file, _, function = each.source.partition(" ")
        assert f"def {function.partition(':')[0]}(" in (runtime / file).read_text(encoding="utf-8"), each.source


def test_bf16_optimizer_sends_all_gradients_at_once() -> None:
    """In the dtype of the model, however they are accumulated."""
    found = job(profile("llama3-8b", deepspeed__data_types__grad_accum_dtype="fp32"), 1, RANKS, "bf16-fp32-master")

    gradients, _ = step_work(found).transfers

    assert (gradients.calls, gradients.size_bytes) == (1, 2 * 8_030_261_248)


def test_one_rank_sends_nothing() -> None:
    assert step_work(_job(3, world=1)).transfers == ()


@pytest.mark.parametrize(("world", "per_node", "share"), [(8, 8, 0.0), (16, 8, 1 / 8), (16, 4, 1 / 4), (16, 1, 1.0)])
def test_one_in_so_many_bytes_as_ranks_of_a_node_leaves_it(world: int, per_node: int, share: float) -> None:
    work = step_work(_job(2, world=world), per_node)

    assert sum(t.between_nodes_bytes for t in work.transfers) == pytest.approx(share * work.sent_bytes, abs=2)


def test_fp32_sends_twice_as_much_as_bf16() -> None:
    full, half = step_work(_job(2, "fp32")), step_work(_job(2))

    assert full.sent_bytes == pytest.approx(2 * half.sent_bytes, rel=1e-9)


def test_hooks_that_are_not_modelled_are_no_work() -> None:
    found = predict(_job(3, stage3_module_granularity_threshold=1000))

    assert found.work is None
    assert "module_granularity_threshold" in found.notes[-1]
