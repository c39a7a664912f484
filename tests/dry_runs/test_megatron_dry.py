"""megatron-core's engine in the dry run, on GPUs and at many ranks: what it holds between steps has
a closed form."""

from __future__ import annotations

from typing import Any

import pytest
from hugging_face import config
from jobs import profile

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.predict import predict
from bf16prof.dry_run.runner import simulate
from bf16prof.profiles.gpus import find_gpu
from bf16prof.records import MemoryRecord
from bf16prof.vocabulary import Component, Device

pytestmark = pytest.mark.timeout(300)

LARGE = 512
"""Ranks: a dry run is one of them, however many there are."""


def job(stage: int, ranks: int, recipe: str, **overrides: Any) -> Job:
    """One on H100s."""
    settings = profile(engine="megatron-core", **overrides)
    (found,) = expand(Selection(settings, [stage], [ranks], [recipe], Device.GPU, find_gpu("h100-80gb")))
    return found


JOBS = [
    job(0, 2, "megatron-bf16", model={"hf_config": config("gpt2")}, workload__sequence_length=40),
    job(1, LARGE, "megatron-bf16", workload__activation_checkpointing=True),
    job(1, 3, "nemo-bf16", workload__gradient_accumulation_steps=5),
]


@pytest.fixture(scope="module")
def dry() -> list[MemoryRecord]:
    """All of them in one process."""
    pytest.importorskip("megatron.core")
    return simulate(JOBS)


def test_the_closed_form_holds_of_every_component(dry: list[MemoryRecord]) -> None:
    for each, record in zip(JOBS, dry, strict=True):
        closed = predict(each)
        named = each.case.label, each.profile.model.family
        assert {**closed.components, Component.ROUNDING: 0} == {**record.components, Component.ROUNDING: 0}, named
        assert closed.parameters == record.parameters, named
        assert record.components.get(Component.OTHER, 0) == 0, named


def test_records_say_who_trained_and_how(dry: list[MemoryRecord]) -> None:
    first, second = (record.workload for record in dry[:2])
    assert first is not None
    assert second is not None
    assert (first.engine, first.deepspeed) == ("megatron-core", {})
    assert first.megatron == {"grad_reduce_in_fp32": True, "use_distributed_optimizer": False}
    assert (second.megatron["use_distributed_optimizer"], second.optimizer) == (True, "AdamW (DistributedOptimizer)")
    assert dry[0].notes[0].startswith("megatron-core 0.16")
    assert any("without Transformer Engine and Apex" in note for note in dry[0].notes)
