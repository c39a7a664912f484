"""The table of DeepSpeed's keys: complete against DeepSpeed's own classes, and the same verdict
from every command."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from jobs import profile

from bf16prof.errors import InputError
from bf16prof.profiles.features import Fate, features, find, refusals, sort_keys

__all__ = ["main"]

HERE = Path(__file__).parent
LLAMA = HERE.parent / "data" / "hf-llama.json"


# The table against DeepSpeed.


def models() -> Iterator[tuple[str, type[Any]]]:
    """DeepSpeed's own classes of the tables that it closes to unknown keys."""
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    yield "zero_optimization", DeepSpeedZeroConfig
    yield "zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig
    yield "zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig
    yield "bf16", DeepSpeedBF16Config
    yield "fp16", DeepSpeedFP16Config


def test_closed_tables_hold_the_keys_that_deepspeed_knows() -> None:
    removed = {key for key, row in features().items() if row.removed}
    for table, model in models():
        theirs = {f"{table}.{field.alias or name}" for name, field in model.model_fields.items()}
        ours = {key for key in features() if key.rpartition(".")[0] == table} - removed
        assert ours == theirs
        assert features()[table].closed


def test_the_keys_that_deepspeed_has_removed_are_told_so() -> None:
    from deepspeed.runtime import config

    removed = set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS) | {f"zero_optimization.{key}" for key in config._REMOVED_ZERO_CONFIG_KEYS}

    assert {key for key, row in features().items() if row.removed} == removed


def test_every_key_that_deepspeed_reads_has_a_row() -> None:
    """What its class is asked for at the top of the file, found by handing it a table that
    remembers."""
    from deepspeed.runtime.config import DeepSpeedConfig

    class Remembering(dict[str, Any]):
        asked: set[str] = set()  # noqa: RUF012

        def get(self, key: str, default: Any = None) -> Any:
            self.asked.add(key)
            return super().get(key, default)

        def __contains__(self, key: object) -> bool:
            self.asked.add(str(key))
            return super().__contains__(key)

        def __copy__(self) -> Remembering:
            return Remembering(self)

    DeepSpeedConfig(Remembering(train_batch_size=1))
    unlisted = {key for key in Remembering.asked if find(key) is None}

    assert unlisted <= {"allgather_size"}, "a key of the form of ZeRO that is a switch"
    assert len(Remembering.asked) > 30


# On and off.

OFF: dict[str, dict[str, Any]] = {
    "the hybrid engine": {"hybrid_engine": {"enabled": False, "max_out_tokens": 512}},
    "quantized weights": {"zero_optimization": {"zero_quantized_weights": False, "zero_quantized_gradients": False}},
    "AutoTP of one rank": {"tensor_parallel": {"autotp_size": 1}},
    "AutoTP of none": {"tensor_parallel": {"autotp_size": 0}},
    "sequences in one part": {"sequence_parallel_size": 1},
    "a curriculum": {"curriculum_learning": {"enabled": False, "curriculum_type": "seqlen"}},
    "a curriculum inside of data efficiency": {
        "data_efficiency": {"enabled": True, "data_sampling": {"curriculum_learning": {"enabled": False}}},
    },
    "data efficiency": {"data_efficiency": {"enabled": False, "data_routing": {"random_ltd": {"enabled": True}}}},
    "compression": {"compression_training": {"weight_quantization": {"shared_parameters": {"enabled": False}}}},
    "amp": {"amp": {"enabled": False, "opt_level": "O1"}},
    "elasticity": {"elasticity": {"enabled": False}},
    "dropped layers": {"progressive_layer_drop": {"enabled": False}},
    "sparse gradients": {"sparse_gradients": False},
    "DeepCompile": {"compile": {"deepcompile": False}},
    "one stage": {"pipeline": {"stages": 1}},
    "stages that DeepSpeed counts": {"pipeline": {"stages": "auto"}},
    "null": {"zero_optimization": {"zenflow": None}, "amp": None, "hybrid_engine": None},
    "SuperOffload": {"zero_optimization": {"offload_optimizer": {"device": "cpu", "super_offload": False}}},
    "an old stage 1": {"zero_optimization": {"legacy_stage1": False}},
    "MiCS": {"zero_optimization": {"mics_shard_size": -1, "mics_hierarchical_params_gather": False}},
    "experts": {"expert_parallel": {"enabled": False, "autoep_size": 4}},
    "a switch in words": {"hybrid_engine": {"enabled": "false"}},
    "MS-AMP": {"msamp": {"enabled": False}},
}  # fmt: skip


@pytest.mark.parametrize("case", OFF)
def test_what_is_off_is_no_feature(case: str) -> None:
    found = sort_keys(OFF[case])

    assert not found.refused
    assert not [key for key, value in found.kept.items() if value and key != "zero_optimization"]
    assert found.kept.get("zero_optimization", {}).keys() <= {"offload_optimizer"}


ON: dict[str, tuple[dict[str, Any], str]] = {
    "hybrid engine": ({"hybrid_engine": {"enabled": True}}, "hybrid_engine.enabled: "),
    "quantized gradients": ({"zero_optimization": {"stage": 3, "zero_quantized_gradients": True}}, "zero_quantized_gradients: "),
    "curriculum": ({"curriculum_learning": {"enabled": True}}, "curriculum_learning.enabled: "),
    "token dropping": (
        {"data_efficiency": {"enabled": True, "data_routing": {"enabled": True, "random_ltd": {"enabled": True}}}}, "random_ltd.enabled: ",
    ),
    "compression": ({"compression_training": {"sparse_pruning": {"shared_parameters": {"enabled": True}}}}, "compression_training: "),
    "DeepCompile": ({"compile": {"deepcompile": True}}, "compile.deepcompile: "),
    "ZenFlow": ({"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.05}}}, "zero_optimization.zenflow: ZenFlow"),
    "ZenFlow by its name alone": ({"zero_optimization": {"stage": 2, "zenflow": {}}}, "zero_optimization.zenflow: ZenFlow"),
    "SuperOffload": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}}}, "super_offload: ",
    ),
    "MiCS": ({"zero_optimization": {"stage": 3, "mics_shard_size": 2}}, "zero_optimization.mics_shard_size: MiCS"),
    "experts": ({"expert_parallel": {"enabled": True}}, "expert_parallel.enabled: AutoEP"),
    "own accumulation": ({"managed_gradient_accumulation": False}, "managed_gradient_accumulation: "),
    "NVMe": ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "/x"}}}, "device: parameters on NVMe"),
    "two of them": ({"amp": {"enabled": True}, "sparse_attention": {"mode": "fixed"}}, "amp.enabled: "),
    "a key that DeepSpeed stops at": ({"zero_optimization": {"stage": 2, "find_unused_parameters": True}}, "stops at it"),
    "partitions that do not divide": ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, "(3) must divide the number of"),
}  # fmt: skip


def commands(file: Path, log: Path) -> list[list[str | Path]]:
    said: list[str | Path] = ["--hf-config", LLAMA, "--ds-config", file]
    return [
        ["estimate", *said, "--gpus", "4"],
        ["simulate", *said, "--gpus", "4"],
        ["plan", *said, "--gpus", "4", "--zero", "3"],
        ["import", log, *said, "--gpus", "4"],
    ]


@pytest.mark.parametrize("case", ON)
def test_what_is_on_and_not_modelled_is_refused_by_all_commands_alike(case: str, tmp_path: Path, main: Main) -> None:
    blocks, expected = ON[case]
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, **blocks}))

    for command in commands(file, HERE.parent / "data" / "deepspeed-breakdown.log"):
        if case == "partitions that do not divide" and command[0] == "import":
            continue  # a log is imported whatever the estimate beside it says
        assert expected in refused(main(*command)), command[0]


def test_all_that_is_refused_is_named_at_once(tmp_path: Path) -> None:
    assert [line.partition(":")[0] for line in refusals({"amp": {"enabled": True}, "hybrid_engine": {"enabled": True}})] == [
        "amp.enabled",
        "hybrid_engine.enabled",
    ]


def test_a_profile_of_ones_own_is_looked_at_as_well() -> None:
    from bf16prof.cases import check_profile

    settings = profile("cpu-demo", deepspeed__more={"hybrid_engine": {"enabled": True}})

    with pytest.raises(InputError, match=r"deepspeed\.more: refused: hybrid_engine\.enabled: the hybrid engine"):
        check_profile(settings)


# Notes, and what may hold anything.


def test_what_deepspeed_does_not_know_is_passed_on_with_a_note() -> None:
    found = sort_keys({"my_own": {"a": "auto"}, "zero_force": 1, "zero_optimization": {"foo": "auto"}})

    assert found.kept == {"my_own": {"a": "auto"}, "zero_force": 1, "zero_optimization": {}}
    assert found.notes == ["my_own, zero_force: DeepSpeed does not know them and ignores them"]


def test_a_key_that_is_gone_from_deepspeed_has_a_note_where_it_is_off() -> None:
    assert sort_keys({"sparse_gradients": False}).notes == [
        "sparse_gradients: DeepSpeed 0.19.8 stops at this key, also where it is off; it is left out here"
    ]


@pytest.mark.parametrize("key", [key for key, row in features().items() if row.fate in (Fate.PASSED, Fate.LEFT_OUT)])
def test_what_no_byte_depends_on_may_hold_anything(key: str) -> None:
    value: Any = {"x": "auto", "y": ["auto"]}
    for part in reversed(key.split(".")):
        value = {part: value}

    found = sort_keys(value)

    assert not found.refused
    assert "auto" not in json.dumps(found.kept)


def test_a_learning_rate_in_words_is_left_out_and_one_in_numbers_kept() -> None:
    params = {"lr": "${lr}", "betas": ["auto", 0.9], "eps": None, "weight_decay": 0.1, "torch_adam": True}

    found = sort_keys({"optimizer": {"type": "AdamW", "params": params}})

    assert found.kept["optimizer"]["params"] == {"weight_decay": 0.1, "torch_adam": True}
    assert [note.partition(":")[0] for note in found.notes] == ["optimizer.params.lr"]


def test_the_page_of_what_can_be_described_is_what_the_tables_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE.parents[1] / "docs"))
    import make_features

    assert make_features.PAGE.read_text(encoding="utf-8") == make_features.page(), "run `make features`"
