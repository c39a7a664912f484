"""Files of TrainingArguments: what is read of them, what becomes of it, and the Trainer's
optimizers by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from fake_ranks import DEEPSPEED_WARNINGS, fake_ranks

from bf16prof.errors import InputError
from bf16prof.profiles.trainer_optimizers import modelled, trainer_optimizers
from bf16prof.profiles.training_args import DEFAULTS, FIELDS, read_training_args

__all__ = ["main"]

pytestmark = DEEPSPEED_WARNINGS

LLAMA = Path(__file__).parent.parent / "data" / "hf-llama.json"

AUTO_JSON = {
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto"},
    "zero_optimization": {
        "stage": 2, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
    },
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}  # fmt: skip


def write(path: Path, text: str | dict[str, Any]) -> Path:
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return path


FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "the Trainer's": (
        "per_device_train_batch_size: 4\nbf16: true\nlearning_rate: 2e-5\nmax_grad_norm: 0.3\ngradient_checkpointing: true\n"
        "optim: adamw_torch\nreport_to: none\n",
        {"micro_batch_size": 4, "bf16": True, "learning_rate": 2e-5, "gradient_clipping": 0.3, "activation_checkpointing": True,
         "optim": "adamw_torch"},
    ),
    "the same as JSON": ('{"per_device_train_batch_size": 2, "fp16": true, "weight_decay": 0.1}',
                         {"micro_batch_size": 2, "fp16": True, "weight_decay": 0.1}),
    "LLaMA-Factory's": (
        "### model\nmodel_name_or_path: x/y\nfinetuning_type: full\ndeepspeed: examples/z3.json\ncutoff_len: 2048\n"
        "per_device_train_batch_size: 1\ngradient_accumulation_steps: 2\nlearning_rate: 1.0e-5\nbf16: true\nresume_from_checkpoint: null\n",
        {"sequence_length": 2048, "micro_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-5, "bf16": True},
    ),
    "axolotl's": (
        "base_model: x/y\nsequence_len: 4096\nmicro_batch_size: 1\ngradient_accumulation_steps: 4\noptimizer: adamw_torch_fused\n"
        "bf16: auto\nfp16:\ntf32: false\ngradient_checkpointing: true\nadapter: lora\nspecial_tokens:\n",
        {"sequence_length": 4096, "micro_batch_size": 1, "gradient_accumulation_steps": 4, "optim": "adamw_torch_fused", "bf16": True,
         "activation_checkpointing": True},
    ),
    "LLaMA-Factory's with LoRA": (
        "finetuning_type: lora\nlora_rank: 8\nlora_target: all\ncutoff_len: 2048\nenable_liger_kernel: true\n",
        {"use_liger": True, "sequence_length": 2048, "lora_r": 8, "lora_targets": "all-linear"},
    ),
    "axolotl's with LoRA": (
        "adapter: lora\nlora_r: 32\nlora_alpha: 16\nlora_dropout: 0.05\nlora_target_modules: [q_proj, v_proj]\n"
        "gradient_checkpointing: true\ngradient_checkpointing_kwargs:\n  use_reentrant: true\n",
        {"activation_checkpointing": True, "use_reentrant": True, "lora_r": 32, "lora_alpha": 16.0, "lora_dropout": 0.05,
         "lora_targets": ["q_proj", "v_proj"]},
    ),
    "axolotl's with QLoRA": (
        "adapter: qlora\nload_in_4bit: true\nlora_r: 32\nlora_target_modules: [q_proj]\n",
        {"load_in_4bit": True, "lora_r": 32, "lora_targets": ["q_proj"]},
    ),
    "LLaMA-Factory's with QLoRA": (
        "finetuning_type: lora\nlora_rank: 8\nlora_target: all\nquantization_bit: 4\ndouble_quantization: false\n",
        {"quantization_bit": 4, "bnb_4bit_use_double_quant": False, "lora_r": 8, "lora_targets": "all-linear"},
    ),
    "with 8 bits, which are not read": (
        "finetuning_type: lora\nlora_rank: 8\nlora_target: all\nquantization_bit: 8\nquantization_type: fp4\n",
        {"lora_r": 8, "lora_targets": "all-linear"},
    ),
    "with evaluation": (
        "eval_strategy: no\nper_device_eval_batch_size: 2\n", {"eval_strategy": "no", "per_device_eval_batch_size": 2},
    ),
    "with a rank that nothing uses": ("finetuning_type: full\nlora_rank: 8\nlora_target: all\n", {}),
    "accelerate's": (
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nmixed_precision: bf16\nnum_processes: 8\ndeepspeed_config:\n"
        "  gradient_accumulation_steps: 2\n  gradient_clipping: 1.0\n  offload_optimizer_device: cpu\n  offload_param_device: none\n"
        "  zero3_init_flag: true\n  zero_stage: 3\n",
        {"mixed_precision": "bf16", "gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "offload_optimizer_device": "cpu",
         "offload_param_device": "none", "zero_init": True, "zero_stage": 3},
    ),
    "with values that are no numbers": ('{"learning_rate": "auto", "weight_decay": "${decay}", "adam_beta1": []}', {}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_same_fields_are_read_of_every_form(form: str, tmp_path: Path) -> None:
    text, expected = FORMS[form]

    found = read_training_args(write(tmp_path / "a.yaml", text))

    assert {name: told.value for name, told in found.told.items()} == expected
    assert all(told.origin.startswith(f"{tmp_path / 'a.yaml'}: ") for told in found.told.values())
    assert found.is_trainers == (form != "accelerate's")


@pytest.mark.parametrize(("text", "message"), [
    ("per_device_train_batch_size: 0", "per_device_train_batch_size: expected a whole number above 0, got 0"),
    ("micro_batch_size: many", "micro_batch_size: expected a whole number above 0, got 'many'"),
    ("bf16: maybe", "bf16: expected true or false, got 'maybe'"),
    ("optim: 5", "optim: expected a name, got 5"),
    ("zero_stage: 4", "zero_stage: expected 0, 1, 2 or 3, got 4"),
    ("max_grad_norm: []", "max_grad_norm: expected a number, got []"),
    ("lora_target: 5", "lora_target: expected names of layers, got 5"),
    ("mixed_precision: int8", "mixed_precision: expected no, bf16 or fp16, got 'int8'"),
    ("bf16: true\nfp16: true", "bf16 and fp16 are both true"),
    ("- a", "expected a YAML object, got list"),
    ("a: [", "not valid YAML: "),
    ("a: 1\na: 2", "key 'a' is there twice"),
    ("a: &x [1]\nb: *x", "aliases (*name) are not read"),
    ("a: !!python/name:os.system", "could not determine a constructor"),
])  # fmt: skip
def test_a_field_that_cannot_be_used_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_training_args(write(tmp_path / "a.yaml", text))

    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_the_defaults_and_the_fields_are_transformers_own() -> None:
    import dataclasses

    from transformers import TrainingArguments

    theirs = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}

    for name, default in DEFAULTS.items():
        assert theirs[FIELDS[name][1][0]] == default, name
    for name in ("micro_batch_size", "gradient_accumulation_steps", "activation_checkpointing", "gradient_clipping", "learning_rate"):
        assert FIELDS[name][1][0] in theirs


# Optimizers.


def test_every_optimizer_of_the_trainer_has_a_row() -> None:
    from transformers.training_args import OptimizerNames

    assert {str(name.value) for name in OptimizerNames} <= set(trainer_optimizers())
    assert {"adamw_torch", "adamw_torch_fused", "adamw_apex_fused", "adafactor", "adamw_bnb_8bit", "lion_8bit", "sgd"} <= set(modelled())
    assert all(("why" in row) != ("settings" in row) for row in trainer_optimizers().values())


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused"])
def test_deepspeed_makes_of_our_json_what_the_trainer_hands_it(name: str, stage: int) -> None:
    """The class that transformers makes, handed to DeepSpeed, against the optimizer that DeepSpeed
    makes from our JSON."""
    import deepspeed
    import torch
    from jobs import job, small_profile
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    from bf16prof.engine.config import deepspeed_config
    from bf16prof.engine.training import initialize
    from bf16prof.models.modules import build
    from bf16prof.profiles.schema import Profile
    from bf16prof.vocabulary import Device

    table = {"type": "AdamW", "from_trainer": True, **trainer_optimizers()[name]["settings"]}
    settings = Profile.model_validate({**small_profile().model_dump(exclude_unset=True), "optimizer": table})
    case = job(settings, stage, 2, "bf16-fp32-master", device=Device.CPU)
    config = deepspeed_config(case)
    args = TrainingArguments(output_dir="unused", use_cpu=True, report_to=[], optim=name)
    class_, keywords = Trainer.get_optimizer_cls_and_kwargs(args)

    with fake_ranks(2):
        ours = initialize(build(settings.model, activation_checkpointing=False), config)
        model = build(settings.model, activation_checkpointing=False)
        blocks = {key: value for key, value in config.items() if key != "optimizer"}
        optimizer = class_(model.parameters(), **keywords)
        theirs, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config={**blocks, "zero_allow_untested_optimizer": True})

    assert type(ours.basic_optimizer) is type(theirs.basic_optimizer) is torch.optim.AdamW
    assert type(ours.optimizer) is type(theirs.optimizer)
    assert ours.basic_optimizer.defaults["fused"] == theirs.basic_optimizer.defaults["fused"]
    assert ours.basic_optimizer.defaults["foreach"] == theirs.basic_optimizer.defaults["foreach"]


def test_offloaded_it_is_deepspeeds_own_as_accelerate_makes_it() -> None:
    from jobs import job, small_profile

    from bf16prof.engine.config import BasicOptimizer, deepspeed_config, engine_facts
    from bf16prof.profiles.schema import Profile
    from bf16prof.vocabulary import Offload

    table = {"type": "AdamW", "from_trainer": True, "torch_adam": True, "fused": True}
    settings = Profile.model_validate({**small_profile().model_dump(exclude_unset=True), "optimizer": table})

    offloaded = deepspeed_config(job(settings, 2, 2, offload=Offload.OPTIMIZER))

    assert engine_facts(offloaded).optimizer is BasicOptimizer.CPU_ADAM
    assert engine_facts(deepspeed_config(job(settings, 2, 2))).optimizer is BasicOptimizer.TORCH_ADAM


# The commands.


def estimate(main: Main, *arguments: str | Path) -> dict[str, Any]:
    code, out, err = main("estimate", "--hf-config", LLAMA, "--gpus", "4", "--zero", "2", "--json", *arguments)
    assert code == 0, err
    (record,) = json.loads(out)["records"]
    return {**record, "stderr": err}


def test_what_stays_open_is_one_line_with_every_key_and_what_to_type(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", AUTO_JSON)

    message = refused(main("estimate", "--hf-config", LLAMA, "--gpus", "4", "--ds-config", file))

    for part in ("bf16.enabled", "fp16.enabled", "--recipe", "train_micro_batch_size_per_gpu", "--micro-batch-size", "--training-args"):
        assert part in message
    assert "reduce_bucket_size" not in message, "the model says it"


def test_of_a_model_whose_hidden_size_is_not_known_the_buckets_stay_open(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", AUTO_JSON)
    said = ["--model", "nowhere:model", "--ds-config", file, "--recipe", "bf16-full", "--micro-batch-size", "1"]
    zero = "deepspeed.zero_optimization."

    message = refused(main("estimate", *said))
    for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"):
        assert f"zero_optimization.{key}" in message

    given = [f"{zero}{key}=1000" for key in ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")]
    closed = refused(main("estimate", *said, *(part for key in given for part in ("--set", key))))
    assert "no closed form" in closed


def test_flags_and_training_arguments_resolve_the_same_file_alike(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", AUTO_JSON)
    args = write(tmp_path / "args.yaml", "per_device_train_batch_size: 2\nbf16: true\noptim: adamw_torch\noutput_dir: x\nadapter: lora\n")

    by_flags = estimate(main, "--ds-config", file, "--micro-batch-size", "2", "--recipe", "bf16-fp32-master", "--optim", "adamw_torch")
    by_args = estimate(main, "--ds-config", file, "--training-args", args)

    assert by_args["case"] == by_flags["case"]
    assert by_args["phases"] == by_flags["phases"]
    assert f"{args}: not used, though memory depends on it: adapter" in by_args["stderr"]
    assert f"{args}: not used: output_dir" in by_args["stderr"]


def test_foreach_takes_memory_in_the_step_that_fused_does_not(main: Main) -> None:
    """At stage 0 the update is the peak: beside fp32 copies of the gradients, a list of
    denominators as large (torch/optim/adam.py)."""
    asked = ["estimate", "llama3-8b", "--gpus", "4", "--zero", "0", "--recipe", "bf16-fp32-master", "--sequence-length", "64", "--json"]
    answers = [main(*asked, "--optim", name)[1] for name in ("adamw_torch_fused", "adamw_torch")]
    fused, foreach = (json.loads(answer)["records"][0] for answer in answers)
    more = foreach["phases"]["step"]["peak_bytes"] - fused["phases"]["step"]["peak_bytes"]

    assert more == pytest.approx(4 * fused["parameters"], rel=0.05)


def test_the_trainers_default_is_assumed_and_said(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})

    assumed = estimate(main, "--ds-config", file)
    named = estimate(main, "--ds-config", file, "--optim", "adamw_torch_fused")

    assert "optimizer" in assumed["workload"]["assumed"]
    assert "optimizer" not in named["workload"]["assumed"]
    assert "fused" in assumed["workload"]["optimizer"]
    assert assumed["phases"] == named["phases"]


@pytest.mark.parametrize(("name", "expected"), [
    ("adagrad", "--optim: adagrad is not modelled: "),
    ("paged_adamw_8bit", "--optim: paged_adamw_8bit is not modelled: "),
    ("adamw_fast", "--optim: unknown optimizer 'adamw_fast'"),
])  # fmt: skip
def test_an_optimizer_that_is_not_modelled_is_refused_by_name(name: str, expected: str, main: Main) -> None:
    message = refused(main("estimate", "--hf-config", LLAMA, "--optim", name))

    assert expected in message
    assert "adamw_torch_fused" in message


def test_an_optimizer_is_named_in_one_place(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}})

    assert "ds.json has an optimizer" in refused(main("estimate", "--hf-config", LLAMA, "--ds-config", file, "--optim", "adamw_torch"))


def test_the_trainer_stops_where_its_arguments_differ_from_the_file(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", {**AUTO_JSON, "train_micro_batch_size_per_gpu": 4, "gradient_clipping": 1.0})
    args = write(tmp_path / "args.yaml", "per_device_train_batch_size: 2\nbf16: true\nmax_grad_norm: 0.5\n")

    message = refused(main("estimate", "--hf-config", LLAMA, "--ds-config", file, "--training-args", args))

    assert "train_micro_batch_size_per_gpu is 4" in message
    assert "gradient_clipping is 1.0" in message


def test_training_arguments_alone_say_the_workload(main: Main, tmp_path: Path) -> None:
    args = write(
        tmp_path / "a.yaml", "micro_batch_size: 3\nsequence_len: 32\ngradient_checkpointing: true\nbf16: true\nmax_grad_norm: 0.5\n"
    )

    record = estimate(main, "--training-args", args)

    workload = record["workload"]
    assert (workload["micro_batch_size"], workload["sequence_length"], workload["activation_checkpointing"]) == (3, 32, True)
    assert record["case"]["recipe"] == "bf16-fp32-master"
    assert workload["deepspeed"]["gradient_clipping"] == 0.5
