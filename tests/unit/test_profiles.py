"""Profiles: the presets, overrides and where values come from, and what cannot be used, refused in
one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import write_profile

from bf16prof.cases import check_profile
from bf16prof.errors import InputError
from bf16prof.models.shapes import inventory
from bf16prof.profiles.load import Override, load_profile, parse_set, preset_names
from bf16prof.profiles.schema import DeepSpeedSettings, ZeroSettings

PUBLISHED_COUNTS = {
    "deepspeed-bf16-example": 6_858_007_633,  # printed by the published example (DeepSpeedExamples, training/bf16_master_weight)
    "gpt2-xl": 1_557_611_200,  # "1.5B"; the checkpoint openai-community/gpt2-xl
    "llama3-8b": 8_030_261_248,  # model.safetensors.index.json: total_size 16,060,522,496 bytes of bf16
    "llama3-70b": 70_553_706_496,  # total_size 141,107,412,992 bytes of bf16
}


def refusal(name: str | Path, *overrides: Override) -> str:
    """The message with which a profile is refused: one line, exit code 2."""
    with pytest.raises(InputError) as caught:
        check_profile(load_profile(str(name), overrides).profile)
    assert caught.value.exit_code == 2
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1500
    return caught.value.message


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_loads_fits_together_and_says_what_it_is(name: str) -> None:
    resolved = load_profile(name)

    check_profile(resolved.profile)
    assert resolved.profile.name == name
    assert resolved.profile.description
    assert next(iter(resolved.origins.values())) == f"preset {name}"
    assert {origin for key, origin in resolved.origins.items() if key.startswith("model.") and key != "model.attn_implementation"} == {
        f"preset {name}"
    }


@pytest.mark.parametrize(("name", "count"), PUBLISHED_COUNTS.items())
def test_presets_have_their_published_number_of_parameters(name: str, count: int) -> None:
    found = load_profile(name).profile

    assert sum(p.numel for p in inventory(found.model)) == count
    assert f"{count:,}" in found.description


def test_the_example_has_388_tensors_and_the_settings_of_its_repository() -> None:
    found = load_profile("deepspeed-bf16-example").profile

    assert len(inventory(found.model)) == 388
    zero = found.deepspeed.zero_optimization
    assert (zero.reduce_bucket_size, zero.param_persistence_threshold) == (50_000_000, 0)
    assert (found.workload.micro_batch_size, found.workload.sequence_length) == (1, 512)


def test_defaults_are_deepspeeds_own() -> None:
    from deepspeed.runtime import constants
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    theirs, ours = DeepSpeedZeroConfig(), ZeroSettings()

    for name in ZeroSettings.model_fields:
        if name not in ("offload_optimizer", "offload_param", "overlap_comm"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert DeepSpeedSettings().gradient_clipping is None, "it differs between DeepSpeed's versions, so it is left to DeepSpeed"
    assert DeepSpeedSettings().prescale_gradients == constants.PRESCALE_GRADIENTS_DEFAULT
    assert DeepSpeedSettings().gradient_predivide_factor == constants.GRADIENT_PREDIVIDE_FACTOR_DEFAULT


def test_aliases_are_deepspeeds_own() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name, field in ZeroSettings.model_fields.items():
        assert DeepSpeedZeroConfig.model_fields[name].alias == field.alias, name


BROKEN_FILES = {
    "empty": (b"", ["model: missing"]),
    "not TOML": (b"[model\n", ["not valid TOML", "line 1"]),
    "binary": (b"\x00\xff\xfe\x80PK\x03\x04", ["not UTF-8 text"]),
    "control characters": (b"name = 'a\x01b'\n", ["not valid TOML"]),
    "a number of 5000 digits": (b"[model]\nvocab_size = " + b"9" * 5000, ["not valid TOML", "4300 digits"]),
    "nested without end": (b"x = " + b"[" * 5000, ["not valid TOML"]),
    "a list of models": (b"[[model]]\nfamily = 'gpt2'\n", ["model", "dictionary"]),
    "a key twice": (b"name = 'a'\nname = 'b'\n", ["not valid TOML"]),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_a_file_that_is_no_profile_is_refused(case: str, tmp_path: Path) -> None:
    content, expected = BROKEN_FILES[case]
    path = tmp_path / "broken.toml"
    path.write_bytes(content)

    message = refusal(path)

    assert str(path) in message
    assert all(part in message for part in expected), message


WRONG_KEYS = {
    "unknown table": ("[modle]\nx = 1", ["modle: unknown key", "model", "workload"]),
    "unknown model key": ("[model]\nhiden_size = 1", ["model.hiden_size: unknown key (did you mean hidden_size?)", "num_layers"]),
    "unknown ZeRO key": ("[deepspeed.zero_optimization]\nstage4 = 1", ["zero_optimization.stage4: unknown key", "reduce_bucket_size"]),
    "the stage": ("[deepspeed.zero_optimization]\nstage = 3", ["refused", "--zero"]),
    "fp16": ("[deepspeed.fp16]\nenabled = true", ["refused", "--recipe"]),
    "bf16.enabled": ("[deepspeed.bf16]\nenabled = true", ["refused", "--recipe"]),
    "autocast": ("[deepspeed.torch_autocast]\nenabled = true", ["refused", "--recipe"]),
    "the optimizer": ("[deepspeed.optimizer]\ntype = 'Adam'", ["refused", "[optimizer]"]),
    "memory_breakdown": ("[deepspeed]\nmemory_breakdown = true", ["refused", "peak counter"]),
    "text for a number": ("[workload]\nmicro_batch_size = 'two'", ["workload.micro_batch_size", "integer", "'two'"]),
    "bool for a number": ("[workload]\nmicro_batch_size = true", ["workload.micro_batch_size", "integer", "'True'"]),
    "number for a bool": ("[workload]\nactivation_checkpointing = 1", ["workload.activation_checkpointing", "boolean"]),
    "float for a number": ("[workload]\nmicro_batch_size = 1.5", ["workload.micro_batch_size", "integer"]),
    "zero": ("[workload]\nmicro_batch_size = 0", ["workload.micro_batch_size", "greater than 0"]),
    "negative": ("[workload]\ngradient_accumulation_steps = -3", ["workload.gradient_accumulation_steps", "greater than 0", "-3"]),
    "huge": ("[workload]\nmicro_batch_size = 100000000000000000000", ["workload.micro_batch_size", "less than"]),
    "huge in hexadecimal": ("[workload]\nmicro_batch_size = 0x" + "f" * 5000, ["workload.micro_batch_size", "thousands of digits"]),
    "a bucket of nothing": ("[deepspeed.zero_optimization]\nreduce_bucket_size = 0", ["reduce_bucket_size", "greater than 0"]),
    "a bucket of half an element": ("[deepspeed.zero_optimization]\nreduce_bucket_size = 0.5", ["reduce_bucket_size", "integer"]),
    "an infinite bucket": ("[deepspeed.zero_optimization]\nreduce_bucket_size = inf", ["reduce_bucket_size"]),
    "NaN": ("[optimizer]\nlr = nan", ["optimizer.lr", "nan"]),
    "infinity": ("[optimizer]\nlr = inf", ["optimizer.lr", "finite"]),
    "beta above one": ("[optimizer]\nbetas = [0.9, 1.5]", ["optimizer.betas.1", "less than 1"]),
    "one beta": ("[optimizer]\nbetas = [0.9]", ["optimizer.betas.1", "missing"]),
    "another optimizer": ("[optimizer]\ntype = 'Lion'", ["optimizer.type", "'Adam'", "'AdamW'"]),
    "another dtype": ("[deepspeed.data_types]\ngrad_accum_dtype = 'fp8'", ["grad_accum_dtype", "'bf16'"]),
    "NVMe": ("[deepspeed.zero_optimization.offload_param]\ndevice = 'nvme'", ["offload_param.device", "'cpu'"]),
    "a name that is no text": ("[workload]\ndata = 5", ["workload.data", "string"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_KEYS)
def test_a_wrong_key_or_value_is_refused_by_file_and_key(case: str, tmp_path: Path) -> None:
    # GIVEN a valid profile with one thing wrong
    text, expected = WRONG_KEYS[case]
    table, _, rest = text.partition("\n")
    path = write_profile(tmp_path / "wrong.toml")
    content = path.read_text()
    path.write_text(content.replace(table, text, 1) if f"{table}\n" in content else f"{content}{table}\n{rest}\n")

    # WHEN it is loaded, THEN one line names the file, the key and what was expected
    message = refusal(path)
    assert message.startswith(f"{path}: ")
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"family": "rnn"}, ["model.family", "'rnn'"]),
        ({"hidden_size": 13}, ["model.hidden_size", "multiple of model.num_heads"]),
        ({"num_kv_heads": 1}, ["model.num_kv_heads", "no grouped-query"]),
        ({"tie_embeddings": True}, ["model.tie_embeddings"]),
        ({"family": "gpt2", "num_kv_heads": 1}, ["model.num_kv_heads"]),
        ({"family": "llama", "num_heads": 4, "num_kv_heads": 3, "hidden_size": 16}, ["multiple of model.num_kv_heads"]),
        ({"family": "llama", "num_heads": 4, "hidden_size": 12}, ["must be even"]),
        ({"max_sequence_length": 4}, ["workload.sequence_length (5)", "model.max_sequence_length (4)"]),
        ({"num_layers": 10**9}, ["model.num_layers", "less than"]),
        ({"vocab_size": 2**40}, ["model.vocab_size", "less than"]),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused(sizes: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    message = refusal(write_profile(tmp_path / "sizes.toml", **sizes))

    assert all(part in message for part in expected), message


def test_what_is_not_there_or_no_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "folder.toml"
    folder.mkdir()

    assert refusal(tmp_path / "none.toml").endswith("none.toml: No such file or directory")
    assert refusal(folder).endswith("Is a directory")
    assert refusal(tmp_path).endswith("Is a directory")
    assert "Is a directory" in refusal("")


@pytest.mark.parametrize("name", ["x" * 300, "no/such/profile", "<script>"])
def test_an_unknown_name_lists_the_presets(name: str) -> None:
    with pytest.raises(InputError, match="unknown profile") as caught:
        load_profile(name)

    assert len(caught.value.message) < 120
    assert all(preset in caught.value.hint for preset in preset_names())


@pytest.mark.parametrize(
    ("typed", "nearest"),
    [("gpt2-xxl", "gpt2-xl"), ("llama3.1-9b", "llama3.1-8b"), ("qwen2.5-8b", "qwen2.5-7b"), ("mixtral", "mixtral-8x7b")],
)
def test_a_name_that_is_nearly_a_presets_is_answered_with_it(typed: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"unknown profile '{typed}'") as caught:
        load_profile(typed)

    assert caught.value.hint.startswith("did you mean ")
    assert nearest in caught.value.hint.partition("?")[0]


def test_a_file_is_called_by_its_stem_unless_it_names_itself(tmp_path: Path) -> None:
    anonymous = write_profile(tmp_path / "mine.toml")
    named = tmp_path / "other.toml"
    named.write_text('name = "given"\n' + anonymous.read_text())

    assert load_profile(str(anonymous)).profile.name == "mine"
    assert load_profile(str(named)).profile.name == "given"


def test_a_file_without_the_suffix_is_read_too(tmp_path: Path) -> None:
    assert load_profile(str(write_profile(tmp_path / "profile"))).profile.name == "profile"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.b=3", 3),
        ("a.b=-3", -3),
        ("a.b=0.5", 0.5),
        ("a.b=5e8", 5e8),
        ("a.b=true", True),
        ("a.b=[1, 2]", [1, 2]),
        ("a.b='quoted'", "quoted"),
        ("a.b=plain text", "plain text"),
        ("a.b=text:a=b.txt", "text:a=b.txt"),
        ("a.b=", ""),
        ("a.b=True", "True"),
        (" a.b =7", 7),
        ("a.b=" + "9" * 5000, "9" * 5000),
        ("a.b=" + "[" * 5000, "[" * 5000),
    ],
)
def test_set_reads_its_value_as_toml_and_else_as_text(text: str, value: object) -> None:
    override = parse_set(text)

    assert (override.key, override.value, override.origin) == ("a.b", value, "--set")
    assert type(override.value) is type(value)


@pytest.mark.parametrize("text", ["", "=", "a.b", "=3", "a..b=3", ".a=3", "a b=3", "a-b=3", "1a=3", "a[0]=3", "\x1b[31m=3"])
def test_set_without_a_key_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"--set .*: expected section.key=value"):
        parse_set(text)


@settings(deadline=None)
@given(st.text(max_size=40))
def test_set_never_fails_in_another_way(text: str) -> None:
    try:
        override = parse_set(text)
    except InputError:
        return
    assert override.key == text.partition("=")[0].strip()


def test_later_overrides_win_and_say_so() -> None:
    resolved = load_profile(
        "gpt2-xl", [parse_set("workload.sequence_length=256"), Override("workload.sequence_length", 128, "--sequence-length")]
    )

    assert resolved.profile.workload.sequence_length == 128
    assert resolved.origins["workload.sequence_length"] == "--sequence-length"
    assert resolved.origins["model.hidden_size"] == "preset gpt2-xl"
    assert "workload.seed" not in resolved.origins, "a default comes from nowhere"


@pytest.mark.parametrize("key", ["param_persistence_threshold", "stage3_param_persistence_threshold"])
def test_deepspeeds_short_and_long_names_override_each_other(key: str) -> None:
    resolved = load_profile("deepspeed-bf16-example", [parse_set(f"deepspeed.zero_optimization.{key}=77")])

    assert resolved.profile.deepspeed.zero_optimization.param_persistence_threshold == 77
    assert resolved.origins["deepspeed.zero_optimization.stage3_param_persistence_threshold"] == "--set"


def test_a_table_replaced_as_a_whole_forgets_where_its_keys_came_from() -> None:
    resolved = load_profile("deepspeed-bf16-example", [parse_set("deepspeed.zero_optimization={reduce_bucket_size = 5}")])

    zero = {key: origin for key, origin in resolved.origins.items() if key.startswith("deepspeed.zero_optimization.")}
    assert zero == {"deepspeed.zero_optimization.reduce_bucket_size": "--set"}
    assert resolved.profile.deepspeed.zero_optimization.param_persistence_threshold == 100_000


def test_a_wrong_override_names_the_flag_and_not_the_file() -> None:
    assert refusal("gpt2-xl", parse_set("model.vocab_size=-1")).startswith("--set: model.vocab_size: ")
    assert refusal("gpt2-xl", parse_set("model.vocabulary=1")).startswith("--set: model.vocabulary: unknown key")
    assert refusal("gpt2-xl", parse_set("deepspeed.zero_optimization.param_persistence_threshold=-1")).startswith("--set: ")
    assert refusal("gpt2-xl", Override("workload.sequence_length", -1, "--sequence-length")).startswith("--sequence-length: ")
    assert "hidden_size is not a table" in refusal("gpt2-xl", parse_set("model.hidden_size.deep=1"))


def test_whole_numbers_may_be_written_as_deepspeeds_documentation_writes_them() -> None:
    resolved = load_profile("gpt2-xl", [parse_set("deepspeed.zero_optimization.reduce_bucket_size=5e8")])

    assert resolved.profile.deepspeed.zero_optimization.reduce_bucket_size == 500_000_000
