"""What we say DeepSpeed makes of a configuration, against what DeepSpeed makes of it: the real
engine, on ranks that do not exist."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jobs
import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS, build_engine, fake_ranks, step

from bf16prof.cases import Job
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.wrappers import model_states
from bf16prof.engine.config import (
    Wrapper,
    client_optimizer,
    deepspeed_config,
    enabled_dtype,
    engine_facts,
    overlaps_communication,
    zero_settings,
)
from bf16prof.engine.config import accumulation_dtype as accumulation_dtype_of
from bf16prof.engine.constraints import refusal_reason
from bf16prof.models.shapes import inventory
from bf16prof.profiles.recipes import runnable_recipes
from bf16prof.vocabulary import Device, Offload

pytestmark = DEEPSPEED_WARNINGS

WORLD = 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECIPES = list(runnable_recipes())


@pytest.fixture
def three_ranks() -> Iterator[None]:
    with fake_ranks(WORLD):
        yield


def a_job(stage: int, recipe: str, *, world: int = WORLD, offload: Offload | None = None, torch_adam: bool = True, **more: Any) -> Job:
    settings = jobs.small_profile(**{k: v for k, v in more.items() if k != "deepspeed"})
    optimizer = settings.optimizer.model_copy(update={"torch_adam": torch_adam})
    extra = more.get("deepspeed", {})
    deepspeed = type(settings.deepspeed).model_validate({**settings.deepspeed.model_dump(exclude_unset=True), **extra})
    settings = settings.model_copy(update={"optimizer": optimizer, "deepspeed": deepspeed})
    return jobs.job(settings, stage, world, recipe, offload=offload, device=Device.CPU)


ADMITTED = [
    (stage, recipe, offload, torch_adam)
    for stage in range(4)
    for recipe in RECIPES
    for offload, torch_adam in ((Offload.NONE, True), (Offload.NONE, False), (Offload.OPTIMIZER, False))
    if refusal_reason(a_job(stage, recipe, offload=offload, torch_adam=torch_adam)) is None
]


@pytest.mark.usefixtures("three_ranks")
@pytest.mark.parametrize(("stage", "recipe", "offload", "torch_adam"), ADMITTED)
def test_wrapper_optimizer_and_dtypes_are_those_of_the_engine(stage: int, recipe: str, offload: Offload, torch_adam: bool) -> None:
    # GIVEN a job that we say DeepSpeed runs
    job = a_job(stage, recipe, offload=offload, torch_adam=torch_adam)
    config = deepspeed_config(job)
    facts = engine_facts(config)

    # WHEN DeepSpeed builds its engine
    engine = build_engine(job)

    # THEN it is what we said
    model_dtype, accumulation_dtype = engine.get_data_types()
    assert (facts.wrapper is Wrapper.PLAIN) == (engine.optimizer is engine.basic_optimizer)
    assert facts.wrapper is Wrapper.PLAIN or type(engine.optimizer).__name__ == facts.wrapper
    client = client_optimizer(config)
    ours = client.class_.rpartition(".")[2] if client else "AdamW" if torch_adam else facts.optimizer
    assert type(engine.basic_optimizer).__name__ == ours
    assert model_dtype == DTYPES[enabled_dtype(config)]
    assert {p.dtype for p in engine.module.parameters()} == {DTYPES[facts.parameter_dtype]}
    assert accumulation_dtype == DTYPES[accumulation_dtype_of(config)]
    assert facts.wrapper is Wrapper.PLAIN or accumulation_dtype == DTYPES[facts.gradient_dtype]
    assert engine.communication_data_type == DTYPES[facts.communication_dtype]
    if facts.wrapper in (Wrapper.ZERO12, Wrapper.ZERO3):
        assert engine.optimizer.master_weights_and_grads_dtype == DTYPES[facts.master_dtype]
    autocast = engine.torch_autocast_dtype() if engine.torch_autocast_enabled() else None
    assert autocast == DTYPES.get(facts.autocast_dtype)
    if offload is Offload.OPTIMIZER and not torch_adam:
        assert facts.layout is not None
        moments = {state.dtype_for(facts.master_dtype) for state in facts.layout.states}
        assert moments == {"fp32" if engine.basic_optimizer.fp32_optimizer_states else facts.master_dtype}


@pytest.mark.usefixtures("three_ranks")
@pytest.mark.parametrize("recipe", ["bf16-fp32-master", "fp32"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_settings_are_those_of_the_engine(stage: int, recipe: str) -> None:
    from deepspeed.runtime import constants

    # GIVEN settings by DeepSpeed's long and short names, and defaults
    job = a_job(stage, recipe, stage3_param_persistence_threshold=17, sub_group_size=123, max_live_parameters=99)
    config = deepspeed_config(job)
    ours, engine = zero_settings(config), build_engine(job)
    theirs = engine._config.zero_config

    for name in type(ours).model_fields:
        if name not in ("overlap_comm", "offload_optimizer", "offload_param"):
            assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.overlap_comm == overlaps_communication(config)
    assert engine.gradient_clipping() == constants.GRADIENT_CLIPPING_DEFAULT
    assert engine.train_micro_batch_size_per_gpu() == job.profile.workload.micro_batch_size


@pytest.mark.usefixtures("three_ranks")
@pytest.mark.parametrize("clipping", [0.0, 0.5, 1.0])
def test_a_gradient_clipping_that_is_asked_for_reaches_the_engine(clipping: float) -> None:
    job = a_job(2, "bf16-full", deepspeed={"gradient_clipping": clipping})

    assert deepspeed_config(job)["gradient_clipping"] == clipping, "1.0 too: earlier versions of DeepSpeed have another default"
    assert build_engine(job).gradient_clipping() == clipping


def test_every_stage_and_every_recipe_is_admitted_somewhere() -> None:
    assert {stage for stage, *_ in ADMITTED} == {0, 1, 2, 3}
    assert {recipe for _, recipe, *_ in ADMITTED} == set(RECIPES)


@pytest.mark.usefixtures("three_ranks")
def test_fp32_accumulation_at_stage_1_takes_bf16_optimizer() -> None:
    job = a_job(1, "bf16-fp32-master", deepspeed={"data_types": {"grad_accum_dtype": "fp32"}})

    assert type(build_engine(job).optimizer).__name__ == engine_facts(deepspeed_config(job)).wrapper == "BF16_Optimizer"


def storages(*tensors: torch.Tensor | None) -> int:
    """Bytes of the storages of tensors, each storage once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t is not None}.values())


def moments(optimizer: Any, name: str) -> int:
    return storages(*(state[name] for state in optimizer.state.values()))


def tensors_of_the_engine(engine: Any, wrapper: Wrapper) -> dict[str, int]:
    """Bytes of DeepSpeed's persistent tensors, by our names for them, found under DeepSpeed's own
    attributes."""
    optimizer, basic = engine.optimizer, engine.basic_optimizer
    states = {key for state in basic.state.values() for key, value in state.items() if isinstance(value, torch.Tensor) and key != "step"}
    found = {f"optimizer state {key}": moments(basic, key) for key in states}
    parameters = list(engine.module.parameters())
    match wrapper:
        case Wrapper.PLAIN:
            return found | {"parameters": storages(*parameters)}
        case Wrapper.UNFUSED:
            masters = [p for group in optimizer.fp32_groups for p in group]
            return found | {"parameters": storages(*parameters), "master parameters": storages(*masters)}
        case Wrapper.BF16:
            return found | {
                "flat parameters": storages(*optimizer.bf16_groups_flat),
                "master parameters": storages(*optimizer.fp32_groups_flat_partition),
                "gradient partition": storages(*optimizer.fp32_groups_gradients_flat),
            }
        case Wrapper.ZERO12:
            return found | {
                "flat parameters": storages(*optimizer.bit16_groups_flat, *parameters),
                "master parameters": storages(*optimizer.single_partition_of_fp32_groups),
            }
        case _:
            gathered = [p for p in optimizer.persistent_parameters if p.data.numel() == p.ds_numel]
            partitions = [p.ds_tensor for p in parameters]
            return found | {
                "flat parameters": storages(*partitions),
                "master parameters": storages(*optimizer.fp32_partitioned_groups_flat),
                "gradient partition": storages(optimizer.grad_partitions_flat_buffer),
                "reduce bucket": storages(*(b.buffer for b in optimizer.ipg_buckets.values())),
                "persistent parameters": storages(*partitions, *gathered) - storages(*partitions),
            }


LAID_OUT: list[tuple[int, str, dict[str, Any]]] = [
    (0, "fp32", {}),
    (0, "bf16-fp32-master", {}),
    (1, "bf16-fp32-master", {}),
    (1, "bf16-fp32-master", {"deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}),
    (2, "bf16-full", {}),
    (2, "bf16-fp32-master", {"round_robin_gradients": True, "parameter_alignment": True}),
    (2, "fp32", {}),
    (3, "fp32", {}),
    (3, "fp16-fp32-master", {}),
    (3, "bf16-fp32-master", {"stage3_param_persistence_threshold": 0, "sub_group_size": 300}),
    (3, "bf16-full-autocast", {"stage3_param_persistence_threshold": 40}),
    (3, "autocast-fp32", {"stage3_model_persistence_threshold": 100}),
    (3, "bf16-full", {"contiguous_gradients": False}),
    (0, "bf16-pure", {}),
    (0, "bf16-fp32-states", {}),
    (0, "bf16-kahan", {}),
    (1, "bf16-stochastic-rounding", {}),
    (2, "bf16-kahan", {}),
    (3, "bf16-fp32-states", {"sub_group_size": 300}),
]  # fmt: skip


@pytest.mark.parametrize("world", [1, 2, 5])
def test_the_closed_form_counts_the_bytes_that_deepspeed_allocates(world: int) -> None:
    with fake_ranks(world):
        for stage, recipe, more in LAID_OUT:
            # GIVEN a case, and what the closed form says of it
            job = a_job(stage, recipe, world=world, **more)
            config = deepspeed_config(job)
            facts = engine_facts(config)
            expected = {a.label[1]: a.bytes for a in model_states(Engine(config, inventory(job.profile.model), world))}

            # WHEN DeepSpeed has built its engine and taken a step (the moments are created in the
            # first)
            engine = build_engine(job)
            step(engine, job)
            found = tensors_of_the_engine(engine, facts.wrapper)
            engine.destroy()

            # THEN every tensor has the predicted size
            assert found == {name: expected.get(name, 0) for name in found}, (stage, recipe, more)
