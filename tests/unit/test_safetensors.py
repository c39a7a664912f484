"""A checkpoint's header as a list of parameters: read as data, refused in one line, and judged by
the library that writes such files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import profile
from safetensors.torch import save_file

from bf16prof.cases import Job, JobFile, Selection, expand
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.predict import predict
from bf16prof.errors import InputError
from bf16prof.files import write_json
from bf16prof.models.modules import build
from bf16prof.models.shapes import inventory
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.profiles.safetensors import read_shapes
from bf16prof.runs import read
from bf16prof.vocabulary import Component, Device

BERT = {
    "model_type": "bert", "architectures": ["BertForMaskedLM"], "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 20, "vocab_size": 31,
}  # fmt: skip


@pytest.fixture
def bert(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A model that has no closed form of its own; its checkpoint, in one file and in two with an
    index, lies in the folder."""
    module = build(HuggingFaceSettings(hf_config=BERT), activation_checkpointing=False)
    tensors = {name: parameter.detach() for name, parameter in module.named_parameters()}
    (tmp_path / "config.json").write_text(json.dumps(BERT))
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    parts = {"a.safetensors": list(tensors)[::2], "b.safetensors": list(tensors)[1::2]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: file for file, names in parts.items() for name in names}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def with_file(folder: Path, name: str = "model.safetensors") -> Any:
    sets = [f"model.hf_config={folder / 'config.json'}", f"model.safetensors={folder / name}", "workload.sequence_length=5"]
    return load_profile("cpu-demo", [parse_set(value) for value in sets])


def job(settings: Any, stage: int = 3) -> Job:
    return expand(Selection(settings, [stage], [2], ["fp32"], Device.CPU))[0]


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_a_checkpoint_lists_the_parameters_of_any_model(name: str, bert: dict[str, torch.Tensor], tmp_path: Path) -> None:
    resolved = with_file(tmp_path, name)

    assert {p.name: p.shape for p in inventory(resolved.profile.model)} == {n: tuple(t.shape) for n, t in bert.items()}
    assert closed_form_gap(job(resolved.profile)) is None
    record = predict(job(resolved.profile))
    assert record.parameters == sum(t.numel() for t in bert.values())
    assert record.components[Component.MOMENTUM] == 4 * sum(-(-t.numel() // 2) for t in bert.values())
    assert resolved.origins[f"model.safetensors.{next(iter(bert))}"] == str(tmp_path / name)


@pytest.mark.usefixtures("bert")
def test_a_job_file_holds_the_list_itself(tmp_path: Path) -> None:
    before = job(with_file(tmp_path).profile)
    write_json(tmp_path / "job.json", JobFile.of(before))
    (tmp_path / "model.safetensors").unlink()

    again: JobFile = read(tmp_path / "job.json", JobFile)

    assert again.job() == before
    assert inventory(again.job().profile.model) == inventory(before.profile.model)


@pytest.mark.usefixtures("bert")
def test_another_configuration_is_not_the_one_of_the_list(tmp_path: Path) -> None:
    text = '[workload]\nsequence_length = 5\n[model]\nhf_config = "config.json"\nsafetensors = "model.safetensors"\n'
    (tmp_path / "mine.toml").write_text(text)

    alone = load_profile(str(tmp_path / "mine.toml")).profile.model
    other = load_profile(str(tmp_path / "mine.toml"), [parse_set(f"model.hf_config={tmp_path / 'config.json'}")]).profile.model

    assert isinstance(alone, HuggingFaceSettings)
    assert isinstance(other, HuggingFaceSettings)
    assert alone.safetensors
    assert other.safetensors is None


def test_the_data_need_not_be_there_and_buffers_are_no_parameters(tmp_path: Path) -> None:
    tensors = {
        "h.0.attn.bias": torch.zeros(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4), "h.0.attn.c_attn.bias": torch.zeros(12),
        "rotary_emb.inv_freq": torch.zeros(2), "bn.num_batches_tracked": torch.tensor(3), "attention.bias": torch.zeros(3),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(content[: 8 + int.from_bytes(content[:8], "little")])

    assert read_shapes(tmp_path / "x.safetensors") == {"attention.bias": [3], "h.0.attn.c_attn.bias": [12]}


def entry(shape: object = (2, 3), dtype: object = "F32", offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def header(table: object) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


DEEP = b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
WRONG: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "its header would be of 0 bytes"),
    "short": (b"\x05", "its header ends after 0 of 5 bytes"),
    "absurd": (b"\xff" * 8 + b"{}", "its header would be of 18446744073709551615 bytes"),
    "longer than the format allows": ((100_000_001).to_bytes(8, "little") + b"{}", "its header would be of 100000001 bytes"),
    "truncated": (header({"a": entry()})[:-3], "its header ends after"),
    "no JSON": (header(b"{'a'"), "header: not valid JSON"),
    "no text": (header(b"\xff\xfe\xfd"), "header: not UTF-8"),
    "no object": (header([1]), "header: expected a JSON object, got list"),
    "nested": (header(DEEP), "header: "),
    "twice": (header(b'{"a": 1, "a": 2}'), "key 'a' is there twice"),
    "huge number": (header(b'{"a": ' + b"9" * 5000 + b"}"), "header: not valid JSON"),
    "nothing": (header({"__metadata__": {"format": "pt"}}), "no parameters in it"),
    "an entry that is none": (header({"a": 3}), "a: expected a dtype and a shape"),
    "no shape": (header({"a": {"dtype": "F32"}}), "a: expected a dtype and a shape"),
    "no dtype": (header({"a": entry(dtype=3)}), "a: expected a dtype and a shape"),
    "a shape of text": (header({"a": entry(shape="23")}), "a: expected a dtype and a shape"),
    "a negative extent": (header({"a": entry(shape=[-2, 3])}), "a: expected a dtype and a shape"),
    "true as an extent": (header({"a": entry(shape=[True])}), "a: expected a dtype and a shape"),
    "an absurd extent": (header({"a": entry(shape=[2**62])}), "a: expected a dtype and a shape"),
    "many dimensions": (header({"a": entry(shape=[1] * 99)}), "a: expected a dtype and a shape"),
    "other data": (header({"a": entry(offsets=[0, 20])}), r"a: data_offsets do not fit a shape of \[2, 3\] in F32"),
    "no data": (header({"a": entry(offsets=None)}), "a: data_offsets do not fit"),
    "quantised": (header({"a.qweight": entry(dtype="I32")}), "a.qweight is of 'I32': expected one of F64, F32, F16, BF16"),
    "an endless name": (header({"x" * 5000: entry(shape=3)}), "xxx: expected a dtype"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_none_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, expected = WRONG[case]
    path = tmp_path / "wrong.safetensors"
    path.write_bytes(content)

    with pytest.raises(InputError, match=expected) as caught:
        read_shapes(path)

    assert str(path) in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


INDEXES: list[tuple[object, str]] = [
    ({}, "weight_map: expected a table"),
    ({"weight_map": ["a"]}, "weight_map: expected a table"),
    ({"weight_map": {"a": "../part.safetensors"}}, "weight_map: expected a table of the names of files beside this one"),
    ({"weight_map": {"a": ".."}}, "weight_map: expected a table of the names|cannot read"),
    ({"weight_map": {"a": "/etc/passwd"}}, "weight_map: expected a table of the names"),
    ({"weight_map": {"a": 3}}, "weight_map: expected a table of the names"),
    ({"weight_map": {"a": "none.safetensors"}}, "cannot read .*none.safetensors: No such file"),
    ({"weight_map": {"b": "part.safetensors"}}, "no tensor 'b', which wrong.index.json says is there"),
    ({"weight_map": {}}, "no parameters in it"),
    ([], "expected a JSON object"),
]


@pytest.mark.parametrize(("index", "expected"), INDEXES, ids=range(len(INDEXES)))
def test_an_index_that_is_none_is_refused_in_one_line(index: object, expected: str, tmp_path: Path) -> None:
    (tmp_path / "part.safetensors").write_bytes(header({"a": entry()}))
    (tmp_path / "wrong.index.json").write_text(json.dumps(index))

    with pytest.raises(InputError, match=expected) as caught:
        read_shapes(tmp_path / "wrong.index.json")
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("path", ["", "/", "/dev/null", "a\0b", "x" * 5000])
def test_a_path_that_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(InputError):
        read_shapes(Path(path))


def test_a_list_of_nothing_is_refused() -> None:
    with pytest.raises(InputError, match="safetensors"):
        profile("cpu-demo", model__hf_config=BERT, model__safetensors={})
