"""The three kinds of [model] in a profile: read without torch, refused in one line, and carried
whole into job files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import SMALL_MODEL, profile, write_profile
from pydantic import TypeAdapter

from bf16prof.cases import JobFile, Selection, check_profile, expand
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.engine.batch import TensorSpec, batch_spec
from bf16prof.errors import InputError
from bf16prof.files import write_json
from bf16prof.profiles.load import Override, Resolved, load_profile, parse_set
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, ModelSettings
from bf16prof.profiles.plain import DEEPEST, problem, read_json_object
from bf16prof.profiles.secrets import TAKEN_OUT
from bf16prof.runs import read
from bf16prof.signatures import store
from bf16prof.vocabulary import Device

LLAMA = {"model_type": "llama", "hidden_size": 8, "vocab_size": 31, "rope_theta": 1e4, "max_position_embeddings": 7, "id2label": {"0": "x"}}
KEPT = {**LLAMA, "id2label": {"0": TAKEN_OUT}}
"""What a profile keeps of it: how many labels there are, and none of their texts."""


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_model(path: Path, *lines: str) -> Path:
    """A profile file with this [model] table."""
    path.write_text("\n".join(["[workload]", "sequence_length = 5", "[model]", *lines]) + "\n", encoding="utf-8")
    return path


def refusal(name: str | Path, *overrides: Override) -> str:
    with pytest.raises(InputError) as caught:
        check_profile(load_profile(str(name), overrides).profile)
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 1000
    return caught.value.message


def hf_model(resolved: Resolved) -> HuggingFaceSettings:
    assert isinstance(resolved.profile.model, HuggingFaceSettings)
    return resolved.profile.model


@pytest.fixture
def hf_profile(tmp_path: Path) -> Path:
    """A profile beside the configuration that it names."""
    write(tmp_path / "models" / "llama.json", LLAMA)
    return write_model(tmp_path / "mine.toml", 'hf_config = "models/llama.json"')


def test_a_configuration_is_found_from_the_files_folder_and_its_content_becomes_the_profiles(
    hf_profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")

    resolved = load_profile(str(hf_profile))

    assert hf_model(resolved).hf_config == KEPT
    assert resolved.profile.name == "mine"
    assert resolved.origins["model.hf_config.hidden_size"] == str(tmp_path / "models" / "llama.json")
    assert resolved.profile.model.vocab_size == 31


def test_an_override_replaces_another_kind_of_model_and_later_ones_change_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "c.json", LLAMA)
    monkeypatch.chdir(tmp_path)

    resolved = load_profile("cpu-demo", [parse_set("model.hf_config=c.json"), parse_set("model.hf_config.hidden_size=16")])

    assert hf_model(resolved).hf_config == {**KEPT, "hidden_size": 16}
    assert resolved.origins["model.hf_config.hidden_size"] == "--set"
    assert resolved.origins["model.hf_config.vocab_size"] == "c.json"
    assert not [key for key in resolved.origins if key == "model.family"]
    back = load_profile(
        "cpu-demo", [parse_set("model.hf_config=c.json"), *(Override(f"model.{k}", v, "x") for k, v in SMALL_MODEL.items())]
    )
    assert back.profile.model == ModelSettings.model_validate(SMALL_MODEL)


def test_a_new_configuration_keeps_what_the_table_says_besides(hf_profile: Path, tmp_path: Path) -> None:
    with hf_profile.open("a", encoding="utf-8") as stream:
        stream.write('attn_implementation = "eager"\n[model.inputs.pixel_values]\ndtype = "bf16"\nshape = ["micro_batch", 3, 8]\n')
    write(tmp_path / "other.json", {**LLAMA, "model_type": "vit"})

    model = hf_model(load_profile(str(hf_profile), [Override("model.hf_config", str(tmp_path / "other.json"), "--hf-config")]))

    assert (model.family, model.attn_implementation) == ("vit", "eager")
    assert model.inputs["pixel_values"].shape == ("micro_batch", 3, 8)


def test_a_job_file_holds_the_configuration_itself(hf_profile: Path, tmp_path: Path) -> None:
    settings = load_profile(str(hf_profile), [parse_set("deepspeed.more.scheduler.type='WarmupLR'")]).profile
    job = expand(Selection(settings, [3], [2], ["bf16-full"], Device.CPU))[0]
    write_json(tmp_path / "job.json", JobFile.of(job))
    (tmp_path / "models" / "llama.json").unlink()

    again: JobFile = read(tmp_path / "job.json", JobFile)

    assert again.job().profile == settings
    assert again.job() == job


FACTORY = 'factory = "pkg.mod:make"'
IMAGE = "[model.inputs.image]"


def test_a_factory_describes_its_inputs(tmp_path: Path) -> None:
    lines = [FACTORY, "vocab_size = 17", IMAGE, 'dtype = "parameters"', 'shape = ["micro_batch", 3, "sequence"]']
    lines += ["[model.inputs.ids]", 'dtype = "int64"', 'shape = ["sequence"]', "[model.inputs.mask]", 'dtype = "bool"', "shape = [2]"]
    settings = load_profile(str(write_model(tmp_path / "m.toml", *lines)), [parse_set("workload.micro_batch_size=4")]).profile
    jobs = expand(Selection(settings, [1], [2], ["fp32", "bf16-full", "autocast-fp32"], Device.CPU))
    specs = {job.case.recipe: batch_spec(job) for job in jobs}

    assert specs["bf16-full"] == {
        "image": TensorSpec((4, 3, 5), "bfloat16"),
        "ids": TensorSpec((5,), "int64", 17),
        "mask": TensorSpec((2,), "bool"),
    }
    assert specs["fp32"]["image"].dtype == specs["autocast-fp32"]["image"].dtype == "float32"


@pytest.mark.parametrize("name", ["cpu-demo", "hf", "factory"])
def test_models_of_tokens_are_called_with_ids_and_labels(name: str, tmp_path: Path) -> None:
    files = {
        "hf": lambda: write_model(tmp_path / "m.toml", f'hf_config = "{write(tmp_path / "c.json", LLAMA)}"'),
        "factory": lambda: write_model(tmp_path / "m.toml", FACTORY),
    }
    settings = load_profile(str(files[name]()) if name in files else name).profile
    workload, vocab = settings.workload, settings.model.vocab_size
    expected = TensorSpec((workload.micro_batch_size, workload.sequence_length), "int64", vocab)

    assert batch_spec(expand(Selection(settings, [1], [2], ["fp32"], Device.CPU))[0]) == {"input_ids": expected, "labels": expected}
    assert vocab == {"cpu-demo": 257, "hf": 31, "factory": 256}[name]


WRONG = {
    "a key beside hf_config": (['hf_config = "c.json"', "hidden_size = 3"], ["model.hidden_size: unknown key", "attn_implementation"]),
    "a key beside factory": ([FACTORY, "layers = 3"], ["model.layers: unknown key", "factory, vocab_size, inputs"]),
    "a family without sizes": (['family = "gpt2"'], ["model.hidden_size: missing"]),
    "nothing": ([], ["model.family: missing"]),
    "no model_type": (['hf_config = { vocab_size = 3 }'], ["model.hf_config: expected", "model_type"]),
    "a model_type that is no text": (["hf_config = { model_type = 3 }"], ["model.hf_config: expected", "model_type"]),
    "a date": (["hf_config = { model_type = 'llama', when = 2020-01-01 }"], ["model.hf_config", "when: date is no type of JSON"]),
    "NaN": (["hf_config = { model_type = 'llama', x = [nan] }"], ["model.hf_config", "x.0: nan is no number of JSON"]),
    "a number for a configuration": (["hf_config = 3"], ["model.hf_config: ", "dictionary", "'3'"]),
    "no such file": (['hf_config = "none.json"'], ["cannot read", "none.json: No such file"]),
    "a path with a zero byte": (['hf_config = "a\\u0000b"'], ["cannot read", "null byte"]),
    "no vocabulary": (["hf_config = { model_type = 'llama' }"], ["model.hf_config has no vocab_size"]),
    "a factory without a function": (['factory = "pkg.mod"'], ["model.factory: expected PACKAGE.MODULE:FUNCTION", "'pkg.mod'"]),
    "a factory by path": (['factory = "./mod.py:make"'], ["model.factory: expected PACKAGE.MODULE:FUNCTION"]),
    "an empty factory": (['factory = ""'], ["model.factory: expected"]),
    "a factory that is no text": (["factory = 3"], ["model.factory: ", "string"]),
    "an input without a shape": ([FACTORY, IMAGE, "dtype = 'bool'"], ["model.inputs.image.shape: missing"]),
    "an input without a dtype": ([FACTORY, IMAGE, "size = 3"], ["model.inputs.image.dtype: missing"]),
    "an unknown dtype": ([FACTORY, IMAGE, "dtype = 'fp8'", "shape = [1]"], ["model.inputs.image.dtype: ", "'int64'", "'fp8'"]),
    "an unknown word": ([FACTORY, IMAGE, "dtype = 'bool'", "shape = ['batch']"], ["image.shape.0: ", "micro_batch or sequence"]),
    "an extent of nothing": ([FACTORY, IMAGE, "dtype = 'bool'", "shape = [0]"], ["model.inputs.image.shape.0: ", "'0'"]),
    "true as an extent": ([FACTORY, IMAGE, "dtype = 'bool'", "shape = [true]"], ["model.inputs.image.shape.0: ", "'True'"]),
    "a name that is no keyword": ([FACTORY, '[model.inputs."a b"]', "dtype = 'bool'", "shape = [1]"], ["model.inputs.a b", "pattern"]),
    "an unknown key": ([FACTORY, IMAGE, "dtype = 'bool'", "shape = [1]", "hi = 2"], ["model.inputs.image.hi: unknown key", "shape, high"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_model_that_cannot_be_is_refused_by_file_and_key(case: str, tmp_path: Path) -> None:
    lines, expected = WRONG[case]
    write(tmp_path / "c.json", LLAMA)

    message = refusal(write_model(tmp_path / "wrong.toml", *lines))

    assert all(part in message for part in expected), message
    assert "hf_config.hf_config" not in message, "pydantic's tags are no keys"
    assert "factory.factory" not in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\x80\x00", "not UTF-8 text"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b'{"a": NaN}', "model.hf_config: expected a Hugging Face configuration with a model_type"),
        (b'{"a": {"b": [1e999]}}', "a.b.0: inf is no number of JSON"),
        (b'{"a": 1, "a": 2}', "key 'a' is there twice"),
        (b'{"a": "\\ud800"}', "a: no Unicode text"),
        (b'{"\\ud800": 1}', "\\ud800: no Unicode text"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 90000 + b"1" + b"}" * 90000, "not valid JSON"),
        (b'{"a":' * (DEEPEST + 1) + b"1" + b"}" * (DEEPEST + 1), f"nested more than {DEEPEST} deep"),
    ],
    ids=range(13),
)
def test_a_hostile_file_is_one_line_that_names_it(content: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "evil.json"
    path.write_bytes(content)

    for message in (refusal("cpu-demo", Override("model.hf_config", str(path), "--hf-config")),):
        assert str(path) in message
        assert expected in message


NO_FILES = [("/dev/zero", "a device, not a regular file"), ("/", "Is a directory"), ("/none", "No such file")]


@pytest.mark.parametrize(("path", "expected"), NO_FILES)
def test_what_is_no_file_is_refused(path: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        read_json_object(Path(path))


def test_a_byte_order_mark_is_no_harm(tmp_path: Path) -> None:
    (tmp_path / "bom.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(LLAMA).encode())

    assert read_json_object(tmp_path / "bom.json") == LLAMA


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(json_values)
def test_what_is_called_plain_survives_json_and_nothing_else_is_called_so(value: Any) -> None:
    try:
        text = json.dumps(value, allow_nan=False)
        again = TypeAdapter(Any).validate_json(text)
    except ValueError:
        assert problem(value) is not None
        return
    assert (problem(value) is None) == (again == value)


POSITIONS: list[tuple[dict[str, Any], int | None]] = [
    ({"model_type": "gpt2", "n_positions": 7}, 7),
    ({"model_type": "bert", "max_position_embeddings": 7}, 7),
    ({"model_type": "bert"}, None),
    ({"model_type": "llama", "max_position_embeddings": 7, "rope_theta": 1e4}, None),
    ({"model_type": "llama", "max_position_embeddings": 7, "rope_scaling": None}, None),
    ({"model_type": "llama", "max_position_embeddings": 7, "rms_norm_eps": 1e-6}, None),
    ({"model_type": "gptj", "n_positions": 7, "rotary_dim": 4}, None),
    ({"model_type": "t5", "n_positions": 7, "relative_attention_num_buckets": 4}, None),
    ({"model_type": "llava", "text_config": {"max_position_embeddings": 7, "vocab_size": 5}}, 7),
]


@pytest.mark.parametrize(("config", "limit"), POSITIONS)
def test_learned_positions_limit_the_sequence(config: dict[str, Any], limit: int | None) -> None:
    settings = profile("cpu-demo", model__hf_config={"vocab_size": 5, **config}, workload__sequence_length=8)

    if limit is None:
        check_profile(settings)
    else:
        with pytest.raises(InputError, match=rf"workload.sequence_length \(8\) is longer than model.hf_config.\w+ \({limit}\)"):
            check_profile(settings)


@pytest.fixture
def unrecorded() -> None:
    """Nobody records passes, whatever other tests of this process have asked for."""
    store.trace_with(None)
    store.forget()


@pytest.mark.usefixtures("unrecorded")
@pytest.mark.parametrize("model", [HuggingFaceSettings(hf_config={**LLAMA, "model_type": "bert"}), FactorySettings(factory="a:b")])
def test_models_that_only_their_code_knows_have_no_closed_form(model: Any) -> None:
    settings = profile("cpu-demo").model_copy(update={"model": model, "name": "x"})

    assert "parameters" in (closed_form_gap(expand(Selection(settings, [1], [2], ["bf16-full"], Device.CPU))[0]) or "")


@pytest.mark.usefixtures("unrecorded")
def test_described_inputs_leave_open_what_a_model_returns() -> None:
    inputs = {"input_ids": {"dtype": "int64", "shape": ["micro_batch", "sequence"]}}
    settings = profile("cpu-demo", model__hf_config={"model_type": "gpt2", "vocab_size": 5}, model__inputs=inputs)

    gap = closed_form_gap(expand(Selection(settings, [1], [2], ["bf16-full"], Device.CPU))[0])

    assert (gap or "").startswith("only the code that builds this model knows its parameters")


def test_a_profile_of_a_family_reads_as_before(tmp_path: Path) -> None:
    assert load_profile(str(write_profile(tmp_path / "p.toml"))).profile.model == ModelSettings.model_validate(SMALL_MODEL)
