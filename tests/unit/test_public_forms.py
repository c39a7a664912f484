"""DeepSpeed JSONs in the forms that are met in public: each is taken as it is, or refused in one
line for a reason of its own.

The forms are facts (which keys stand together, which are `auto`, how they are spelled); the values
are ours.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused

__all__ = ["main"]

LLAMA = Path(__file__).parent.parent / "data" / "hf-llama.json"
HIDDEN = json.loads(LLAMA.read_text())["hidden_size"]
PRESET = "llama3.2-1b"
"""Its peaks come with the package."""

TRAINER = {
    "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}  # fmt: skip
DTYPES: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 700, "initial_scale_power": 12, "hysteresis": 2, "min_loss_scale": 1},
    "bf16": {"enabled": "auto"},
}
ADAMW = {"optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}}
WARMUP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}}
STEPS = {"last_batch_iteration": -1, "total_num_steps": "auto", "warmup_num_steps": "auto", "warmup_min_lr": 0, "warmup_max_lr": "auto"}
DECAY = {"scheduler": {"type": "WarmupDecayLR", "params": STEPS}}
STAGE_3 = {
    "stage": 3, "overlap_comm": True, "contiguous_gradients": True, "sub_group_size": 3e8, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto", "stage3_max_live_parameters": 3e8,
    "stage3_max_reuse_distance": 3e8, "stage3_gather_16bit_weights_on_model_save": True,
}  # fmt: skip
STAGE_2 = {
    "stage": 2, "allgather_partitions": True, "allgather_bucket_size": 3e8, "overlap_comm": True, "reduce_scatter": True,
    "reduce_bucket_size": 3e8, "contiguous_gradients": True,
}  # fmt: skip
ON_CPU = {"device": "cpu", "pin_memory": True}
LOGGING = {"steps_per_print": 900, "wall_clock_breakdown": False}

TAKEN: dict[str, dict[str, Any]] = {
    "Trainer, stage 2": {**DTYPES, **ADAMW, **WARMUP, "zero_optimization": STAGE_2, **TRAINER, **LOGGING},
    "Trainer, stage 2 offloaded": {**DTYPES, "zero_optimization": {**STAGE_2, "offload_optimizer": ON_CPU}, **TRAINER},
    "Trainer, stage 3 offloaded": {
        **DTYPES, **ADAMW, **DECAY, "zero_optimization": {**STAGE_3, "offload_optimizer": ON_CPU, "offload_param": ON_CPU}, **TRAINER,
    },
    "LLaMA-Factory, stage 0": {
        **TRAINER, "zero_allow_untested_optimizer": True, **DTYPES,
        "zero_optimization": {**STAGE_2, "stage": 0, "round_robin_gradients": True},
    },
    "LLaMA-Factory, stage 3": {**TRAINER, "zero_allow_untested_optimizer": True, **DTYPES, "zero_optimization": STAGE_3},
    "LLaMA-Factory, half offloaded": {
        **TRAINER, **DTYPES, "zero_optimization": {**STAGE_3, "offload_optimizer": {**ON_CPU, "ratio": 0.4}},
    },
    "axolotl, stage 1": {"zero_optimization": {"stage": 1, "overlap_comm": True}, **DTYPES, **TRAINER, "wall_clock_breakdown": False},
    "axolotl, stage 3 in bf16": {**TRAINER, "zero_optimization": STAGE_3, "bf16": {"enabled": True}, "wall_clock_breakdown": False},
    "axolotl, compiled": {"compile": {"disable": False, "backend": "inductor"}, "zero_optimization": {"stage": 2}, **DTYPES, **TRAINER},
    "FastChat": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True, "overlap_comm": True},
        "fp16": {"enabled": "auto"}, **TRAINER,
    },
    "LLaVA, stage 3": {**DTYPES, **TRAINER, "zero_optimization": STAGE_3},
    "accelerate with a file": {
        **DTYPES, **ADAMW, **WARMUP, "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}, **TRAINER,
        "steps_per_print": "inf",
    },
    "Lightning": {
        "zero_allow_untested_optimizer": True, "zero_optimization": {**STAGE_2, "offload_optimizer": ON_CPU},
        "activation_checkpointing": {"partition_activations": False, "cpu_checkpointing": False, "number_checkpoints": False},
        "train_micro_batch_size_per_gpu": 3, "bf16": {"enabled": True},
    },
    "DeepSpeedExamples, BERT": {
        "train_batch_size": 64, "train_micro_batch_size_per_gpu": 8, "steps_per_print": 11, "prescale_gradients": False,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-5, "weight_decay": 0.0, "bias_correction": False}}, "gradient_clipping": 1.0,
        "wall_clock_breakdown": False, "fp16": {"enabled": True, "loss_scale": 0}, "sparse_gradients": False,
    },
    "DeepSpeedExamples, the old ways to say ZeRO": {
        "train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 2, "cpu_offload": True, "cpu_offload_use_pin_memory": True},
        "fp16": {"enabled": True}, "optimizer": {"type": "Adam", "params": {"lr": 1e-4, "torch_adam": False}},
    },
    "DeepSpeedExamples, ZeRO as a switch": {
        "train_batch_size": 8, "zero_optimization": True, "disable_allgather": True, "fp32_allreduce": True, "fp16": {"enabled": True},
        "optimizer": {"type": "Adam", "params": {"lr": 1e-4}},
    },
    "chat": {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "steps_per_print": 10, "memory_breakdown": True,
        "zero_optimization": {
            "stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"}, "memory_efficient_linear": False,
            "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 3e7, "stage3_prefetch_bucket_size": 3e7,
        },
        "fp16": {"enabled": True, "loss_scale_window": 100}, "gradient_clipping": 1.0, "prescale_gradients": False,
        "hybrid_engine": {"enabled": False, "max_out_tokens": 512, "inference_tp_size": 1, "release_inference_cache": False},
        "tensorboard": {"enabled": False, "output_path": "x/", "job_name": "y"},
    },
    "GPT-NeoX": {
        "train_batch_size": 32, "train_micro_batch_size_per_gpu": 4, "fp16": {"enabled": True}, "num-layers": 12, "hidden-size": 768,
        "optimizer": {"type": "Adam", "params": {"lr": 6e-4, "betas": [0.9, 0.95]}}, "zero_optimization": {"stage": 1},
    },
    "a curriculum that is off": {
        **DTYPES, **TRAINER, "zero_optimization": STAGE_2, "curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"},
        "data_efficiency": {"enabled": False}, "elasticity": {"enabled": False}, "amp": {"enabled": False, "opt_level": "O1"},
    },
    "monitors and timers": {
        **TRAINER, **DTYPES, "zero_optimization": STAGE_2, "wandb": {"enabled": True, "project": "x"}, "csv_monitor": {"enabled": "auto"},
        "flops_profiler": {"enabled": True, "profile_step": 4}, "comms_logger": {"enabled": True, "verbose": False}, "dump_state": True,
        "checkpoint": {"tag_validation": "Warn", "use_node_local_storage": True}, "aio": {"block_size": 1048576, "queue_depth": 8},
        "timers": {"throughput": {"enabled": True, "synchronized": False}}, "nebula": {"enabled": False},
    },
    "auto where nobody fills it in": {**TRAINER, **DTYPES, "zero_optimization": {**STAGE_3, "stage3_max_live_parameters": "auto"}},
}  # fmt: skip

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ZenFlow": (
        {**TRAINER, "zero_optimization": {**STAGE_2, "offload_optimizer": ON_CPU, "zenflow": {"topk_ratio": 0.05, "overlap_step": True}}},
        "zero_optimization.zenflow",
    ),
    "NVMe": ({"zero_optimization": {**STAGE_3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}, **TRAINER}, "NVMe"),
    "ZeRO++": (
        {**TRAINER, "zero_optimization": {**STAGE_3, "zero_quantized_gradients": True, "zero_hpz_partition_size": 8}},
        "zero_quantized_gradients",
    ),
    "1-bit Adam": ({**TRAINER, "optimizer": {"type": "OneBitAdam", "params": {"freeze_step": 10}}}, "OneBitAdam"),
    "compression": (
        {"train_batch_size": 4, "compression_training": {"weight_quantization": {"shared_parameters": {"enabled": True}}}},
        "compression_training",
    ),
    "a template": ({"train_micro_batch_size_per_gpu": "BATCH_SIZE", "zero_optimization": {"stage": 1}}, "train_micro_batch_size_per_gpu"),
    "a list of stages to tune": ({**TRAINER, "zero_optimization": {"stage": [0, 1, 2]}}, "zero_optimization.stage"),
    "a key of another library": ({**TRAINER, "zero_optimization": {**STAGE_2, "find_unused_parameters": True}}, "find_unused_parameters"),
}  # fmt: skip


def arguments(file: Path) -> list[str | Path]:
    said: list[str | Path] = ["--hf-config", LLAMA, "--ds-config", file, "--gpus", "8", "--recipe", "bf16-fp32-master"]
    return [*said, "--sequence-length", "16"]


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("form", TAKEN)
def test_a_form_that_is_met_is_taken_as_it_is(form: str, main: Main, tmp_path: Path) -> None:
    content = TAKEN[form]
    micro = ["--micro-batch-size", "2"] if content.get("train_micro_batch_size_per_gpu", "auto") == "auto" else []
    micro = [] if isinstance(content.get("train_batch_size"), int) else micro

    code, out, err = main("estimate", *arguments(write(tmp_path / "ds.json", content)), *micro, "--json")

    assert code == 0, err
    (record,) = json.loads(out)["records"]
    assert record["allocated_bytes"] > 0


@pytest.mark.parametrize("form", REFUSED)
def test_a_form_that_cannot_be_taken_is_refused_in_one_line(form: str, main: Main, tmp_path: Path) -> None:
    content, expected = REFUSED[form]

    message = refused(main("estimate", *arguments(write(tmp_path / "ds.json", content)), "--micro-batch-size", "2"))

    assert f"{tmp_path / 'ds.json'}: " in message
    assert expected in message


def test_comments_and_trailing_commas_are_read_as_deepspeed_reads_them(main: Main, tmp_path: Path) -> None:
    import hjson

    text = """{
      // of one line
      # and another kind
      "train_micro_batch_size_per_gpu": 2, /* of several
      lines */
      "bf16": {"enabled": true,},
      "zero_optimization": {"stage": 1, "reduce_bucket_size": 5e8},
    }"""
    (tmp_path / "a.json").write_text(text)
    write(tmp_path / "b.json", dict(hjson.loads(text)))

    results = [main("estimate", *arguments(tmp_path / name), "--json") for name in ("a.json", "b.json")]

    assert [code for code, _, _ in results] == [0, 0]
    first, second = (json.loads(out)["records"][0] for _, out, _ in results)
    assert first["case"] == second["case"]
    assert first["phases"] == second["phases"]


def test_memory_breakdown_is_refused_where_it_would_spoil_a_measurement(main: Main, tmp_path: Path) -> None:
    content = {"train_micro_batch_size_per_gpu": 1, "memory_breakdown": True, "zero_optimization": {"stage": 1}}
    file = write(tmp_path / "ds.json", content)

    message = refused(main("measure", "--hf-config", LLAMA, "--ds-config", file, "--output-dir", tmp_path / "run"))
    code, _, err = main("estimate", *arguments(file), "--json")

    assert f"{file}: memory_breakdown: refused: it resets torch's peak counter" in message
    assert not (tmp_path / "run").exists()
    assert code == 0, err


# What a plan writes.


def test_a_plan_keeps_every_key_of_the_users_file(main: Main, tmp_path: Path) -> None:
    own = {
        **TAKEN["monitors and timers"], **ADAMW, **DECAY, "steps_per_print": 77, "my_own": [1, {"a": None}],
        "zero_optimization": {**STAGE_3, "offload_optimizer": {**ON_CPU, "buffer_count": 4}}, "memory_breakdown": True,
    }  # fmt: skip
    file = write(tmp_path / "ds.json", own)

    code, _, err = main("plan", "--no-verify", PRESET, "--ds-config", file, "--gpus", "8", "--sequence-length", "512",
                        "--write", tmp_path / "w.json", "--zero", "2", "--offload", "none", "--recipe", "bf16-full")  # fmt: skip
    assert code == 0, err
    written = json.loads((tmp_path / "w.json").read_text())

    assert [key for key in own if key not in written] == []
    for key in ("steps_per_print", "my_own", "wandb", "csv_monitor", "scheduler", "optimizer", "memory_breakdown", "checkpoint", "timers"):
        assert written[key] == own[key], key
    zero = written["zero_optimization"]
    assert (zero["stage"], zero["reduce_bucket_size"], zero["sub_group_size"]) == (2, 2048 * 2048, 300_000_000)
    assert zero["offload_optimizer"] == {"device": "none", "pin_memory": True, "buffer_count": 4}
    assert set(STAGE_3) <= set(zero)
    assert written["bf16"] == {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert written["fp16"]["enabled"] is False
    assert written["fp16"]["initial_scale_power"] == 12
    assert written["train_batch_size"] == written["train_micro_batch_size_per_gpu"] * written["gradient_accumulation_steps"] * 8
    assert "TrainingArguments(per_device_train_batch_size=" in err


def test_a_plan_writes_no_optimizer_that_the_trainer_brings(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", TAKEN["LLaMA-Factory, stage 3"])

    code, _, err = main("plan", "--no-verify", PRESET, "--ds-config", file, "--gpus", "8", "--sequence-length", "512",
                        "--write", tmp_path / "w.json")  # fmt: skip

    assert code == 0, err
    assert "optimizer" not in json.loads((tmp_path / "w.json").read_text())
    assert "the optimizer that the Trainer makes: AdamW (torch, fused)" in err


def test_what_a_plan_has_written_is_read_again(main: Main, tmp_path: Path) -> None:
    file = write(tmp_path / "ds.json", TAKEN["Trainer, stage 3 offloaded"])
    said = [PRESET, "--gpus", "8", "--sequence-length", "512"]
    code, out, err = main("plan", "--no-verify", *said, "--ds-config", file, "--write", tmp_path / "w.json", "--json")
    assert code == 0, err
    first = json.loads(out)["plans"][0]
    checkpointing = "--activation-checkpointing" if first["activation_checkpointing"] else "--no-activation-checkpointing"

    code, out, err = main("estimate", *said, "--ds-config", tmp_path / "w.json", "--json", checkpointing)
    assert code == 0, err
    (record,) = json.loads(out)["records"]

    assert record["run_peak_allocated_bytes"] == first["peak_bytes"]
    assert (record["case"]["zero_stage"], record["case"]["recipe"]) == (first["case"]["zero_stage"], first["case"]["recipe"])
