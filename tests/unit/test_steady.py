"""The steady state in closed form against the tensors that DeepSpeed holds: every wrapper, in this
process, as rank 0 of played ranks."""

from __future__ import annotations

import re
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fake_ranks import DEEPSPEED_WARNINGS, build_engine, fake_ranks, step
from jobs import job, profile

from bf16prof.cases import Job
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.wrappers import model_states
from bf16prof.engine.attribution import attribute
from bf16prof.vocabulary import Device, Offload

pytestmark = DEEPSPEED_WARNINGS

SMALL = {
    "model__hidden_size": 6, "model__num_layers": 2, "model__num_heads": 2, "model__vocab_size": 11, "model__max_sequence_length": 5,
    "workload__sequence_length": 5, "workload__micro_batch_size": 1, "workload__activation_checkpointing": False,
    "deepspeed__zero_optimization__reduce_bucket_size": 300,
}  # fmt: skip
STAGE3 = {
    "deepspeed__zero_optimization__sub_group_size": 100,
    "deepspeed__zero_optimization__stage3_param_persistence_threshold": 20,
    "deepspeed__zero_optimization__stage3_prefetch_bucket_size": 0,
}
COMPILED = {"optimizer__torch_adam": False}
"""DeepSpeed's own Adam on the host."""

CASES: dict[str, tuple[int, str, Offload | None, dict[str, Any]]] = {
    "plain": (0, "fp32", None, {}),
    "unfused": (0, "bf16-fp32-master", None, {"optimizer__torch_adam": True}),
    "plain, factored": (0, "fp32", None, {"optimizer__library": "adafactor"}),
    "unfused, factored": (0, "bf16-fp32-master", None, {"optimizer__library": "adafactor"}),
    "BF16_Optimizer": (1, "bf16-fp32-master", None, {"deepspeed__data_types__grad_accum_dtype": "fp32"}),
    "stage 1": (1, "bf16-fp32-master", None, {}),
    "stage 2": (2, "bf16-full", None, {}),
    "stage 3": (3, "bf16-fp32-master", None, STAGE3),
    "stage 3, autocast": (3, "bf16-full-autocast", None, STAGE3),
    "stage 3, no bucket": (3, "bf16-fp32-master", None, {**STAGE3, "deepspeed__zero_optimization__contiguous_gradients": False}),
    "stage 1, offloaded": (1, "bf16-master", Offload.OPTIMIZER, COMPILED),
    "stage 2, offloaded": (2, "bf16-fp32-master", Offload.OPTIMIZER, {"workload__gradient_accumulation_steps": 2}),
    "stage 3, offloaded": (3, "bf16-fp32-master", Offload.OPTIMIZER, STAGE3),
    "stage 3, all offloaded": (3, "bf16-fp32-master", Offload.OPTIMIZER_AND_PARAMETERS, STAGE3),
    "stage 3, partly offloaded": (
        3, "bf16-fp32-master", Offload.OPTIMIZER, {**STAGE3, **COMPILED, "deepspeed__zero_optimization__offload_optimizer__ratio": 0.4},
    ),
}  # fmt: skip


def small(name: str, world: int) -> Job:
    stage, recipe, offload, more = CASES[name]
    return job(profile("cpu-demo", **{**SMALL, **more}), stage, world, recipe, offload=offload, device=Device.CPU)


ONE_RANK = ("stage 2, offloaded",)
"""What rank 0 of several does not hold as much of as another: gradients of all parameters that
touch the partition (`test_layout`)."""


@pytest.mark.parametrize(("name", "world"), [(name, world) for name in CASES for world in (1, 3) if world == 1 or name not in ONE_RANK])
def test_every_tensor_that_deepspeed_holds_is_named_with_its_bytes(name: str, world: int) -> None:
    given = small(name, world)
    with fake_ranks(world):
        engine = build_engine(given)
        for _ in range(2):
            step(engine, given)
        items, host = attribute([engine], {}, "cpu")

    expected: Counter[tuple[str, str]] = Counter()
    for each in model_states(Engine.of(given)):
        expected[each.label] += each.bytes
    assert not host
    assert {(item.component, item.name): item.bytes for item in items} == expected


def test_sources_name_what_deepspeed_has() -> None:
    """The file and the names in it that each allocation is said to come from; only the model's own
    tensors come from none."""
    found = find_spec("deepspeed")
    assert found is not None
    assert found.origin is not None
    installed, fused = Path(found.origin).parents[1], job(profile("cpu-demo", **SMALL, **COMPILED), 0, 2, "bf16-fp32-master")
    for given in (fused, *(small(name, 2) for name in CASES)):
        for each in model_states(Engine.of(given)):
            if each.source == "the model's own tensors":
                continue
            file, _, rest = each.source.partition(" ")
            place = installed if (installed / file).exists() else installed / "deepspeed" / "runtime"
            text = (place / file).read_text(encoding="utf-8")
            names = re.findall(r"[A-Za-z]\w*_\w+|_\w+", rest)
            assert [n for n in names if n not in text] == [], each.source
