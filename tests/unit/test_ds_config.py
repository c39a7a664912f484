"""A user's DeepSpeed JSON: what becomes of it, held against DeepSpeed's own reading of the same
file."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_ranks import DEEPSPEED_WARNINGS, fake_ranks
from jobs import profile

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.predict import predict
from bf16prof.engine.config import BasicOptimizer, deepspeed_config, engine_facts
from bf16prof.engine.constraints import alternatives, refusal_reason
from bf16prof.errors import InputError
from bf16prof.measuring.prepare import needed
from bf16prof.profiles.ds_config import BatchSizes, DeepSpeedFile, read_ds_config
from bf16prof.profiles.load import Override, load_profile
from bf16prof.profiles.recipes import DS_CONFIG, all_recipes, find_recipe, runnable_recipes
from bf16prof.vocabulary import Device, Offload

pytestmark = DEEPSPEED_WARNINGS

BF16: dict[str, Any] = {"bf16": {"enabled": True}}
AUTOCAST = {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
SGD = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


def write(folder: Path, **content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def job_of(file: DeepSpeedFile, *more: Override, stage: int | None = None, recipe: str = "", world: int = 2) -> Job:
    """The job that a file means over the small preset."""
    settings = load_profile("cpu-demo", [*file.overrides, *more]).profile
    stages, recipes = [file.stage if stage is None else stage], [recipe or file.recipe]
    return expand(Selection(settings, stages, [world], recipes, Device.CPU))[0]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        job_of(read_ds_config(path))
    assert caught.value.message.startswith(f"{path}: ")
    assert "\n" not in caught.value.message
    return caught.value.message.removeprefix(f"{path}: ")


# Precision.


@pytest.mark.parametrize("recipe", [recipe.id for recipe in runnable_recipes().values() if recipe.is_json])
def test_the_blocks_of_a_recipe_are_the_recipe(recipe: str, tmp_path: Path) -> None:
    file = read_ds_config(write(tmp_path, **(runnable_recipes()[recipe].deepspeed or {})))

    assert file.recipe == recipe
    assert "more" not in job_of(file).profile.deepspeed.model_dump(exclude_defaults=True)


SPELLINGS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({}, "fp32", {}),
    ({"fp16": {"enabled": False}, "bf16": {"enabled": True}}, "bf16-fp32-master", {}),
    ({"bfloat16": {"enabled": True}}, "bf16-fp32-master", {}),
    ({"bf16": {"enabled": True, "bf16_optimizer_states": False}, "fp16": None}, "bf16-fp32-master", {}),
    ({"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale": 0}}, "fp16-fp32-master", {"initial_scale_power": 12}),
    ({"torch_autocast": {"enabled": True, "dtype": "bf16"}}, "autocast-fp32", {}),
    ({"torch_autocast": {"enabled": False, "dtype": "float16"}}, "fp32", {}),
    ({**BF16, **AUTOCAST}, DS_CONFIG, {"enabled": True}),
    ({"torch_autocast": {"enabled": True, "dtype": "float16"}}, DS_CONFIG, {"enabled": True}),
    ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, DS_CONFIG, {"enabled": True}),
    ({**BF16, "fp16": {"enabled": True}}, DS_CONFIG, {"enabled": True}),
]


@pytest.mark.parametrize(("blocks", "recipe", "passed_on"), SPELLINGS, ids=range(len(SPELLINGS)))
def test_a_precision_is_found_by_what_decides_it(blocks: dict[str, Any], recipe: str, passed_on: dict[str, Any], tmp_path: Path) -> None:
    file = read_ds_config(write(tmp_path, **blocks))
    more = load_profile("cpu-demo", file.overrides).profile.deepspeed.more

    assert file.recipe == recipe
    for key, value in passed_on.items():
        assert any(block.get(key) == value for block in more.values()), more
    if recipe != DS_CONFIG:
        assert not [key for block in more.values() for key in block if key in ("enabled", "dtype")]


def test_the_precision_of_the_user_is_a_recipe_that_nobody_can_list() -> None:
    recipe = find_recipe(DS_CONFIG)

    assert DS_CONFIG not in all_recipes()
    assert (recipe.id, recipe.deepspeed, set(recipe.dtypes.values())) == (DS_CONFIG, {}, {"none"})


def test_a_recipe_that_was_named_takes_the_place_of_the_precision(tmp_path: Path) -> None:
    path = write(tmp_path, fp16={"enabled": True, "hysteresis": 4}, **AUTOCAST, zero_optimization={"stage": 1})

    config = deepspeed_config(job_of(read_ds_config(path, precision=False), recipe="bf16-full"))

    assert config["fp16"] == {"hysteresis": 4}
    assert "torch_autocast" not in config
    assert config["bf16"]["bf16_optimizer_states"] is True


def test_spoiling_precisions_are_refused_without_alternatives(tmp_path: Path) -> None:
    file = read_ds_config(write(tmp_path, bf16={"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}))
    job = job_of(file, stage=1)

    assert "truncates" in (refusal_reason(job) or "")
    assert alternatives(job) == ()


# The rest of the file, against DeepSpeed.

ADAM = {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}}}
SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 7}}}
FILES: dict[str, dict[str, Any]] = {
    "as small as can be": {},
    "the published baseline": {
        **ADAM, **BF16, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 1, "steps_per_print": 1,
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True, "reduce_bucket_size": 5e7,
                              "stage3_prefetch_bucket_size": 5e7, "stage3_param_persistence_threshold": 0},
    },
    "short names": {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 17, "param_persistence_threshold": 5}},
    "no clipping": {"gradient_clipping": 0.0, "zero_optimization": {"stage": 2, "compute_grad_norm": False}},
    "another rule of reduction": {"zero_optimization": {"stage": 2}, "gradient_allreduce_op": "sum"},
    "features that are off": {
        "zero_optimization": {"stage": 3, "zero_quantized_weights": False, "zero_hpz_partition_size": 1, "zenflow": None},
        "hybrid_engine": {"enabled": False}, "tensor_parallel": {"autotp_size": 1}, "sequence_parallel_size": 1,
        "compile": {"deepcompile": False}, "expert_parallel": {"enabled": False}, "managed_gradient_accumulation": True,
        "data_efficiency": {"enabled": False, "data_sampling": {"curriculum_learning": {"enabled": True, "curriculum_metrics": {}}}},
    },
    "saving": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}},
    "offloading": {
        **BF16, "zero_optimization": {
            "stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": False, "buffer_count": 3, "ratio": 0.5},
            "offload_param": {"device": "cpu", "buffer_size": 1000, "max_in_cpu": 5},
        },
    },
    "offloading as it was written once": {"zero_optimization": {"stage": 2, "cpu_offload": True}},
    "no offloading": {"zero_optimization": {"stage": 2, "offload_optimizer": None, "offload_param": {"device": "none"}}},
    "ZeRO as a switch": {"zero_optimization": True},
    "fp16 and its scaling": {"fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 10, "hysteresis": 3, "min_loss_scale": 2}},
    "autocast and its modules": {**BF16, "torch_autocast": {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": ["a.B"]}},
    "another optimizer": {**SGD, **SCHEDULER, "zero_allow_untested_optimizer": True},
    "an optimizer with a switch of its own": {"optimizer": {"type": "adam", "params": {"lr": 1e-3, "adam_w_mode": False}}},
    "an optimizer in small letters": {"optimizer": {"type": "adamw", "params": {"lr": 1e-3}}},
    "sums in fp32": {
        **BF16, "data_types": {"grad_accum_dtype": "float32", "keep_in_fp32_modules": "auto"}, "zero_optimization": {"stage": 2},
    },
    "communication in fp16": {"communication_data_type": "FP16", "prescale_gradients": True, "gradient_predivide_factor": 2.0},
    "checkpointing and other blocks": {
        "activation_checkpointing": {"partition_activations": True}, "wall_clock_breakdown": True, "aio": {"block_size": 4096},
        "comms_logger": {"enabled": True, "verbose": False}, "memory_breakdown": False, "checkpoint": {"tag_validation": "Warn"},
    },
}  # fmt: skip


def deepspeeds(config: dict[str, Any]) -> dict[str, Any]:
    """What DeepSpeed's own class makes of a configuration: everything that trains, by name."""
    from deepspeed.runtime.config import DeepSpeedConfig

    found = DeepSpeedConfig(dict(config))
    plain = [
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "communication_data_type",
        "prescale_gradients", "gradient_predivide_factor", "grad_accum_dtype", "keep_in_fp32_modules", "torch_autocast_enabled",
        "torch_autocast_dtype", "torch_autocast_lower_precision_safe_modules", "scheduler_name", "scheduler_params",
        "zero_allow_untested_optimizer", "wall_clock_breakdown", "memory_breakdown", "optimizer_name", "optimizer_params",
    ]  # fmt: skip
    nested = ["zero_config", "float16_config", "bfloat16_config"]
    read = {name: getattr(found, name) for name in plain} | {name: getattr(found, name).model_dump() for name in nested}
    for key in ("offload_optimizer", "offload_param"):  # where nothing is offloaded there are two ways to say so
        if (read["zero_config"][key] or {}).get("device") == "none":
            read["zero_config"][key] = None
    read["zero_config"].pop("cpu_offload", None)
    return read


@contextlib.contextmanager
def ranks_that_deepspeed_knows(world: int) -> Iterator[None]:
    import deepspeed

    with fake_ranks(world):
        deepspeed.init_distributed("fake")
        assert deepspeed.comm.get_world_size() == world
        yield


@pytest.mark.parametrize("case", FILES)
def test_deepspeed_reads_what_it_would_have_read(case: str, tmp_path: Path) -> None:
    # GIVEN a file, with the batch sizes and the optimizer that the profile has where it says
    # nothing
    content = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, **FILES[case]}
    job = job_of(read_ds_config(write(tmp_path, **content)))

    # WHEN DeepSpeed reads it, and what we made of it
    with ranks_that_deepspeed_knows(2):
        theirs, ours = deepspeeds(content), deepspeeds(deepspeed_config(job))

    # THEN it is the same, in DeepSpeed's names of dtypes and with its defaults of optimizers
    # written out
    ours["optimizer_params"] = {k: v for k, v in (ours["optimizer_params"] or {}).items() if k in (theirs["optimizer_params"] or {})}
    if "optimizer" not in content:
        ours |= {"optimizer_name": None, "optimizer_params": None}
    names = {"float32": "fp32"}
    theirs["grad_accum_dtype"] = names.get(theirs["grad_accum_dtype"], theirs["grad_accum_dtype"])
    assert ours == theirs


def test_it_takes_the_place_of_the_profiles_settings(tmp_path: Path) -> None:
    settings = load_profile("cpu-demo", read_ds_config(write(tmp_path, **ADAM, zero_optimization={"stage": 2})).overrides)

    assert profile("cpu-demo").deepspeed.zero_optimization.reduce_bucket_size == 500_000
    assert settings.profile.deepspeed.zero_optimization.reduce_bucket_size == 500_000_000, "DeepSpeed's default"
    assert not settings.profile.optimizer.torch_adam
    assert settings.origins["optimizer.lr"] == str(tmp_path / "ds.json")
    assert not [key for key, origin in settings.origins.items() if key.startswith(("deepspeed.", "optimizer.")) and "preset" in origin]


def test_without_an_optimizer_the_profiles_stays(tmp_path: Path) -> None:
    assert load_profile("cpu-demo", read_ds_config(write(tmp_path, **BF16)).overrides).profile.optimizer == profile("cpu-demo").optimizer


def test_what_comes_later_wins_over_it(tmp_path: Path) -> None:
    file = read_ds_config(write(tmp_path, zero_optimization={"stage": 3, "reduce_bucket_size": 5, "elastic_checkpoint": True}))
    bucket = Override("deepspeed.zero_optimization.reduce_bucket_size", 7, "--set")
    elastic = Override("deepspeed.more.zero_optimization.elastic_checkpoint", False, "--set")

    config = deepspeed_config(job_of(file, bucket, elastic, stage=2))

    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 7, "elastic_checkpoint": False}


def test_offloading_by_flag_wins_over_it(tmp_path: Path) -> None:
    offload = {"device": "cpu", "buffer_count": 3}
    settings = load_profile("cpu-demo", read_ds_config(write(tmp_path, zero_optimization={"offload_optimizer": offload})).overrides).profile
    selection = Selection(settings, [2], [2], ["bf16-full"], Device.CPU, offload=Offload.NONE)

    assert deepspeed_config(expand(selection)[0])["zero_optimization"]["offload_optimizer"] == {"buffer_count": 3}


@pytest.mark.parametrize("block", ["tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "autotuning", "memory_breakdown"])
def test_what_writes_files_or_calls_out_is_left_out(block: str, tmp_path: Path) -> None:
    assert block not in deepspeed_config(job_of(read_ds_config(write(tmp_path, **{block: {"enabled": "auto"}}))))


def test_more_replaces_an_optimizer_and_a_scheduler_and_merges_the_rest() -> None:
    more = {"optimizer": {"type": "Lion"}, "scheduler": {"type": "X"}, "zero_optimization": {"offload_param": {"max_in_cpu": 3}}}
    zero = {"offload_param": {"device": "cpu"}}
    settings = profile("cpu-demo", deepspeed={"zero_optimization": zero, "more": more})

    config = deepspeed_config(expand(Selection(settings, [3], [2], ["fp32"], Device.CPU))[0])

    assert config["optimizer"] == {"type": "Lion"}
    assert config["scheduler"] == {"type": "X"}
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu", "max_in_cpu": 3}


@pytest.mark.parametrize("key", ["zero_quantized_weights", "mics_shard_size"])
def test_in_a_profile_the_same_keys_are_still_unknown(key: str) -> None:
    with pytest.raises(InputError, match="unknown key"):
        profile("cpu-demo", **{f"deepspeed__zero_optimization__{key}": True})


@pytest.mark.parametrize("more", [{"zero_optimization": {"stage": 1}}, {"train_batch_size": 3}, {"memory_breakdown": True}])
def test_more_does_not_say_what_is_said_elsewhere(more: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"deepspeed.more: (zero_optimization.stage|train_batch_size|memory_breakdown) is said elsewhere"):
        profile("cpu-demo", deepspeed__more=more)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"train_batch_size": "auto"}, "'auto' that the Hugging Face Trainer fills in, and that is not known here: train_batch_size (--micro"),
    ({"optimizer": {"type": "auto"}}, "not known here: optimizer.type (write the value)"),
    ({"optimizer": {"type": "Adam", "params": 5}}, "optimizer.params: expected an object, got 5"),
    ({"optimizer": {"type": "Adam", "params": "abc"}}, "optimizer.params: expected an object, got 'abc'"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 7]}}}, "optimizer.betas.1: input should be less than 1"),
    ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type: 'OneBitAdam': DeepSpeed 0.19.8 has it no more"),
    ({"optimizer": {"type": "adamw_hf"}}, "optimizer.type: 'adamw_hf': neither DeepSpeed nor torch.optim has it"),
    ({"optimizer": {"type": "Adam", "params": {"max_grad_norm": 1.0}}}, "optimizer.params.max_grad_norm: DeepSpeed stops at it"),
    ({"scheduler": []}, "scheduler: expected an object, got []"),
    ({"tensor_parallel": 2}, "tensor_parallel: expected an object, got 2"),
    ({"zero_optimization": {"cpu_offload_params": True}}, "cpu_offload_params: DeepSpeed does not know this key and stops at it; did you"),
    ({"train_batch_size": 0}, "train_batch_size: expected a whole number above 0, got 0"),
    ({"train_micro_batch_size_per_gpu": "4"}, "train_micro_batch_size_per_gpu: expected a whole number above 0, got '4'"),
    ({"gradient_accumulation_steps": 1.5}, "gradient_accumulation_steps: expected a whole number"),
    ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps: expected a whole number"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got 4"),
    ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage: expected"),
    ({"zero_optimization": [3]}, "zero_optimization: expected an object"),
    ({"zero_optimization": {"offload_param": "cpu"}}, "zero_optimization.offload_param: expected an object"),
    ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param.device: parameters on NVMe are not modelled"),
    ({"zero_optimization": {"reduce_bucket_size": "many"}}, "deepspeed.zero_optimization.reduce_bucket_size: input should be"),
    ({"bf16": True}, "bf16: expected an object, got True"),
    ({"fp16": "on"}, "fp16: expected an object"),
    ({"torch_autocast": {"enabled": True}}, "torch_autocast.dtype: expected bfloat16 or float16, got None"),
    ({"torch_autocast": {"enabled": True, "dtype": "fp8"}}, "torch_autocast.dtype: expected"),
    ({"data_types": {"grad_accum_dtype": "int8"}}, "deepspeed.data_types.grad_accum_dtype: "),
    ({"optimizer": "Adam"}, "optimizer: expected an object"),
    ({"optimizer": {"type": "Adam", "params": {"lr": -1}}}, "optimizer.lr: input should be greater than or equal to 0"),
    ({"gradient_clipping": -1}, "deepspeed.gradient_clipping: "),
]


@pytest.mark.parametrize(("content", "expected"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_used_is_refused_by_file_and_key(content: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in refusal(write(tmp_path, **content))


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "// hjson\n[]", "// hjson\n{a: 1\na: 2}", '{"a":' * 40 + "1" + "}" * 40]
)
def test_a_broken_file_is_one_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)

    refusal(path)


# Batch sizes.


def batches() -> Iterator[tuple[int | None, int | None, int | None]]:
    yield from itertools.product((None, 1, 6, 8, 24), (None, 1, 2, 3), (None, 1, 2))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_sizes_are_derived_as_deepspeed_derives_them(world: int) -> None:
    from deepspeed.runtime.config import DeepSpeedConfig

    with ranks_that_deepspeed_knows(world):
        for train, micro, accumulation in batches():
            given = {"train_batch_size": train, "train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation}
            try:
                theirs = DeepSpeedConfig({key: value for key, value in given.items() if value is not None})
            except AssertionError:
                with pytest.raises(InputError, match="train_batch_size is not equal to"):
                    BatchSizes("ds.json", train, micro, accumulation).on(world)
            else:
                expected = (theirs.train_micro_batch_size_per_gpu, theirs.gradient_accumulation_steps)
                assert BatchSizes("ds.json", train, micro, accumulation).on(world) == expected, given
                assert BatchSizes("ds.json", train, micro, accumulation).fit(world)


def test_each_number_of_ranks_has_its_own_batch_sizes() -> None:
    selection = Selection(profile("cpu-demo"), [1], [1, 2, 4], ["fp32"], Device.CPU, batch=BatchSizes("ds.json", 8, None, 2))

    assert [job.profile.workload.micro_batch_size for job in expand(selection)] == [4, 2, 1]
    with pytest.raises(InputError, match=r"ds.json: .* 8 != 1 \* 2 \* 3"):
        expand(Selection(profile("cpu-demo"), [1], [3], ["fp32"], Device.CPU, batch=BatchSizes("ds.json", 8, None, 2)))


# What predictions make of it.

GAPS: list[tuple[dict[str, Any], str]] = [
    (SGD, "the optimizer 'SGD' is not modelled"),
    ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True, "torch_adam": True}}}, "optimizer.params.amsgrad"),
    ({**BF16, **AUTOCAST}, "a precision that is no recipe's"),
    ({"zero_optimization": {"stage": 3, "leaf_module": {"names": ["mlp"]}}}, "zero_optimization.leaf_module"),
    ({"data_types": {"buffer_dtype": "fp32"}}, "data_types.buffer_dtype"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
]


@pytest.mark.parametrize(("content", "expected"), GAPS, ids=range(len(GAPS)))
def test_what_the_closed_form_does_not_know_it_says(content: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert expected in (closed_form_gap(job_of(read_ds_config(write(tmp_path, **content)))) or "")


HARMLESS = (
    "as small as can be",
    "the published baseline",
    "saving",
    "offloading",
    "fp16 and its scaling",
    "checkpointing and other blocks",
)


@pytest.mark.parametrize("case", HARMLESS)
def test_what_allocates_nothing_leaves_the_closed_form_standing(case: str, tmp_path: Path) -> None:
    job = job_of(read_ds_config(write(tmp_path, **FILES[case])))

    assert closed_form_gap(job) is None
    assert predict(job).allocated_bytes


OPTIMIZERS: list[tuple[dict[str, Any], dict[str, Any], BasicOptimizer, list[str]]] = [
    ({"type": "SGD"}, {}, BasicOptimizer.OTHER, []),
    ({"type": "Lion", "params": None}, {}, BasicOptimizer.OTHER, ["FusedLionBuilder"]),
    ({"type": "lion"}, {"offload_optimizer": {"device": "cpu"}}, BasicOptimizer.OTHER, ["CPULionBuilder"]),
    ({"type": "Adagrad"}, {"offload_optimizer": {"device": "cpu"}}, BasicOptimizer.OTHER, ["CPUAdagradBuilder"]),
    ({"type": "Adam", "params": {"adam_w_mode": True}}, {}, BasicOptimizer.FUSED_ADAM, ["FusedAdamBuilder"]),
    ({}, {}, BasicOptimizer.OTHER, []),
]


@pytest.mark.parametrize(("block", "zero", "optimizer", "builders"), OPTIMIZERS, ids=range(len(OPTIMIZERS)))
def test_any_optimizer_has_facts_and_what_compiles_it(
    block: dict[str, Any], zero: dict[str, Any], optimizer: BasicOptimizer, builders: list[str], tmp_path: Path
) -> None:
    job = job_of(read_ds_config(write(tmp_path, optimizer={**block, "x": 1}, zero_optimization={"stage": 2, **zero})))

    assert engine_facts(deepspeed_config(job)).optimizer is optimizer
    assert [part for part in needed([job]) if part.endswith(("LionBuilder", "AdamBuilder", "AdagradBuilder", "LambBuilder"))] == builders
