"""`auto` against the real thing: what transformers' HfTrainerDeepSpeedConfig and accelerate's
plugin make of the same file."""

from __future__ import annotations

import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_ds_config import job_of

from bf16prof.engine.config import deepspeed_config, enabled_dtype, offloads_optimizer, offloads_parameters, zero_settings
from bf16prof.errors import InputError
from bf16prof.profiles.auto import ACCUMULATION, FROM_HIDDEN_SIZE, Answers
from bf16prof.profiles.ds_config import read_ds_config
from bf16prof.profiles.hidden_size import of_config
from bf16prof.profiles.training_args import read_training_args

pytestmark = pytest.mark.filterwarnings("ignore")  # of deepspeed, transformers and accelerate, while they are imported

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 96},
    "gpt2": {"n_embd": 48},
    "t5": {"d_model": 40},
    "swin": {"embed_dim": 8},
    "gemma3": {"text_config": {"hidden_size": 72}},
    "llava": {"text_config": {"model_type": "mistral", "hidden_size": 56}},
}


def maybe_auto(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(["auto", "auto", *values])


def tables(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A JSON object that may leave out any of its keys."""
    return st.fixed_dictionaries({}, optional=keys)


FILES = st.fixed_dictionaries(
    {
        "zero_optimization": st.fixed_dictionaries(
            {"stage": maybe_auto(0, 1, 2, 3)},
            optional={
                "reduce_bucket_size": maybe_auto(1000, 5e8),
                "stage3_prefetch_bucket_size": maybe_auto(10, 1e7),
                "stage3_param_persistence_threshold": maybe_auto(0, 1e4),
                "offload_optimizer": tables(device=maybe_auto("none", "cpu"), pin_memory=st.booleans()),
                "offload_param": tables(device=maybe_auto("none", "cpu")),
                "overlap_comm": st.booleans(),
            },
        ),
    },
    optional={
        "train_batch_size": maybe_auto(8),
        "train_micro_batch_size_per_gpu": maybe_auto(4),
        "gradient_accumulation_steps": maybe_auto(2),
        "gradient_clipping": maybe_auto(1.0, 0.5),
        "bf16": tables(enabled=maybe_auto(True, False)),
        "fp16": tables(enabled=maybe_auto(False), loss_scale=st.just(0)),
        "optimizer": st.just({"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}),
        "scheduler": st.just({"type": "WarmupDecayLR", "params": {"warmup_num_steps": "auto", "total_num_steps": "auto"}}),
        "steps_per_print": st.just(5),
    },
)

ARGUMENTS = st.fixed_dictionaries(
    {
        "per_device_train_batch_size": st.sampled_from([4, 8]),
        "gradient_accumulation_steps": st.sampled_from([1, 2]),
        "max_grad_norm": st.sampled_from([1.0, 0.5]),
        "bf16": st.booleans(),
        "learning_rate": st.just(1e-4),
        "weight_decay": st.just(0.1),
        "adam_beta2": st.just(0.95),
    }
)


def theirs(content: Mapping[str, Any], arguments: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """What the Trainer's own classes make of a JSON. Raises their `ValueError` where it and the
    arguments differ."""
    from accelerate.utils import DeepSpeedPlugin
    from transformers import TrainingArguments
    from transformers.integrations import deepspeed as integration

    class_: Any = integration.HfTrainerDeepSpeedConfig
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], **arguments)
    config = class_(dict(content))
    config.trainer_config_process(args)
    plugin = DeepSpeedPlugin(hf_ds_config=config)
    plugin.set_mixed_precision(args.mixed_precision)
    config.trainer_config_finalize(args, types.SimpleNamespace(config=model), 100)
    made: dict[str, Any] = config.config
    return made


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=FILES, arguments=ARGUMENTS, type_=st.sampled_from(sorted(MODELS)))
def test_the_trainers_own_classes_make_the_same_of_it(
    content: dict[str, Any], arguments: dict[str, Any], type_: str, tmp_path: Path
) -> None:
    # GIVEN a DeepSpeed JSON, training arguments, and a model
    from transformers import CONFIG_MAPPING

    model = CONFIG_MAPPING[type_](**MODELS[type_])
    file, args = tmp_path / "ds.json", tmp_path / "args.yaml"
    file.write_text(json.dumps(content))
    args.write_text(json.dumps(arguments))
    answers = Answers(lambda: of_config({"model_type": type_, **MODELS[type_]}), {}, read_training_args(args))

    # WHEN the Trainer processes the one with the other, and so do we
    try:
        expected = theirs(json.loads(json.dumps(content)), arguments, model)
    except ValueError as error:
        with pytest.raises(InputError) as caught:
            read_ds_config(file, answers=answers).batch.on(1)
        mine = caught.value.message
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16.enabled"):
            assert f"ds {key}=" not in str(error) or key in mine or "train_batch_size" in mine
        return
    train, micro_batch, steps = (expected.get(key) for key in ("train_batch_size", "train_micro_batch_size_per_gpu", ACCUMULATION))
    if train is None and micro_batch is None:
        return  # neither says the batch: DeepSpeed itself stops
    if train is not None and micro_batch is not None and steps is not None and train != micro_batch * steps:
        with pytest.raises(InputError, match="DeepSpeed stops where they differ"):  # as it does, with what has been made
            read_ds_config(file, answers=answers)
        return
    read = read_ds_config(file, answers=answers)
    job = job_of(read, world=1)
    micro, accumulation = read.batch.on(1)

    # THEN it is the same
    ours = deepspeed_config(job)
    stage = expected["zero_optimization"]["stage"]
    assert job.case.zero_stage == stage
    assert enabled_dtype(ours) == enabled_dtype(expected)
    assert micro == expected.get("train_micro_batch_size_per_gpu", micro)
    assert accumulation == expected["gradient_accumulation_steps"]
    assert micro * accumulation == expected.get("train_batch_size", micro * accumulation)
    assert ours.get("gradient_clipping", 1.0) == expected.get("gradient_clipping", 1.0)
    zero, said = zero_settings(ours).model_dump(by_alias=True), expected["zero_optimization"]
    for key in (name.rpartition(".")[2] for name in FROM_HIDDEN_SIZE):
        if said.get(key, "auto") != "auto":  # below stage 3 the Trainer leaves two of them to accelerate, and nothing looks at them
            assert zero[key] == said[key]
    devices = {key: (said.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    assert offloads_optimizer(ours) == (devices["offload_optimizer"] == "cpu")
    assert offloads_parameters(ours) == (devices["offload_param"] == "cpu" and stage == 3)
