"""Signatures as data: packed and unpacked, kept in files, found again, listed and removed; what is
said where there is none."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused
from jobs import profile

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.anatomy import inquiries_of
from bf16prof.closed_form.gap import closed_form_gap
from bf16prof.closed_form.predict import predict
from bf16prof.errors import InputError
from bf16prof.models.autograd.events import GRADIENT, NO_LAYER, Event, ParameterKey
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import load_profile, preset_names
from bf16prof.profiles.models import HuggingFaceSettings
from bf16prof.signatures import inquiry, shipped, store
from bf16prof.signatures.general import General
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.signatures.signature import Called, HeldTensor, Signature
from bf16prof.signatures.sources import ReadSources
from bf16prof.vocabulary import Component, Device, Label

__all__ = ["main"]

MADE: Label = (Component.ACTIVATIONS, "mm (forward)")
HEAD = ParameterKey(NO_LAYER, "head")
WEIGHT = ParameterKey(NO_LAYER, "head.weight")
SIGNATURE = Signature(
    parameters=(ParameterSpec("head.weight", (8, 4), "Linear", also=("tied.weight",)), ParameterSpec("old", (3,), "Net", trainable=False)),
    held=(HeldTensor("positions", 64, is_registered=True),),
    modules=(Called("", ()), Called("head", ("head.weight",), is_leaf=True)),
    outputs=(("logits", 128),),
    loss_bytes=4,
    events=(
        Event("fetch", HEAD, 0), Event("compute", "forward", 512), Event("memory", MADE, 128), Event("pin", (WEIGHT, 3), 0),
        Event("logits", None, 0), Event("loss", None, 0), Event("backward", None, 0), Event("unpin", (WEIGHT, 3), 0),
        Event("memory", GRADIENT, 64), Event("gradient", WEIGHT, 64), Event("compute", "backward", 1024),
    ),
    building=(0, 0),
    problem="",
    versions={"torch": "9.9"},
    about="a net",
)  # fmt: skip
BERT = {"model_type": "bert", "vocab_size": 31}


def job(model: dict[str, Any] | None = None, device: Device = Device.GPU) -> Job:
    changes: dict[str, Any] = {"model__hf_config": model} if model else {}
    gpu = find_gpu("h100-80gb") if device is Device.GPU else None
    return expand(Selection(profile("cpu-demo", **changes), [2], [2], ["bf16-full"], device, gpu))[0]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path))
    store.forget()
    yield tmp_path / "signatures"
    store.forget()


def test_what_is_packed_comes_out_again() -> None:
    again = Signature.unpacked(SIGNATURE.packed())

    assert all(getattr(again, each.name) == getattr(SIGNATURE, each.name) for each in dataclasses.fields(Signature))
    assert again.packed() == SIGNATURE.packed()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"{"),
        gzip.compress(b"[]"),
        gzip.compress(json.dumps({"format": 0}).encode()),
        SIGNATURE.packed()[:-9],
    ],
    ids=["nothing", "no gzip", "no JSON", "no object", "another format", "cut off"],
)
def test_what_is_no_signature_is_refused_and_as_good_as_absent(content: bytes, cache: Path) -> None:
    asked = Inquiry.of(job(BERT))
    cache.mkdir(parents=True)
    (cache / f"{asked.name}.signature").write_bytes(content)

    with pytest.raises(InputError, match="not a signature"):
        Signature.unpacked(content)
    assert store.find(asked) is None


def test_an_answer_is_found_again_by_what_was_asked_alone(cache: Path) -> None:
    store.keep(Inquiry.of(job(BERT)), SIGNATURE.packed())
    store.forget()

    found = store.find(Inquiry.of(job(BERT)))
    assert found is not None
    assert found.events == SIGNATURE.events
    assert store.find(Inquiry.of(job({**BERT, "vocab_size": 32}))) is None
    assert [path.suffix for path in cache.iterdir()] == [".signature"], "nothing is left of how it was written"


def test_a_folder_that_cannot_be_written_costs_nothing_but_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path / "file"))
    asked = Inquiry.of(job(BERT))

    store.keep(asked, SIGNATURE.packed())

    assert store.find(asked) is not None


def test_an_answer_of_other_code_counts_only_where_nothing_can_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Inquiry.of(job(BERT))
    monkeypatch.setattr(inquiry, "environment", lambda: "another")
    store.keep(asked, SIGNATURE.packed())
    monkeypatch.setattr(inquiry, "environment", lambda: "this")
    store.forget()

    assert store.find(asked) is None
    monkeypatch.setattr(store, "can_trace", lambda _: False)
    assert store.find(asked) is not None


TRAIN, TRAIN_HF, LEFT = "pip install 'bf16prof[train]'", "pip install 'bf16prof[train,hf]'", "--no-trace"


@pytest.mark.parametrize(
    ("installed", "expected", "of_ours"),
    [
        ({}, TRAIN_HF, TRAIN),
        ({"torch": "2", "deepspeed": "0"}, TRAIN_HF, LEFT),
        ({"torch": "2", "deepspeed": "0", "transformers": "5"}, LEFT, LEFT),
    ],
)
def test_what_is_not_recorded_is_said_in_one_line(
    installed: dict[str, str], expected: str, of_ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inquiry, "versions", lambda: installed)

    gap = closed_form_gap(job(BERT)) or ""

    assert expected in gap
    assert "\n" not in gap
    on_cpu = predict(job(device=Device.CPU))
    assert on_cpu.allocated_bytes
    assert on_cpu.peak_allocated_bytes is None
    assert of_ours in on_cpu.notes[0]


OTHER_PRECISIONS = ("fp32", "autocast-fp32", "bf16-full-autocast")


def of_a_preset(
    name: str = "olmo2-1b",
    stage: int = 2,
    *,
    checkpointing: bool = False,
    at: tuple[int, int] | None = None,
    recipe: str = "bf16-full",
    gpu: str = "h100-80gb",
) -> Job:
    workload: dict[str, object] = {"activation_checkpointing": checkpointing}
    if at is not None:
        workload |= {"micro_batch_size": at[0], "sequence_length": at[1]}
    changed = profile(name, **{f"workload__{key}": value for key, value in workload.items()})
    return expand(Selection(changed, [stage], [8], [recipe], Device.GPU, find_gpu(gpu)))[0]


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("at", [(1, 4096), (1, 777), (6, 3000), (64, 32768)], ids=str)
def test_a_preset_has_peaks_where_nothing_can_be_recorded(stage: int, at: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "can_trace", lambda _: False)
    found = predict(of_a_preset(stage=stage, at=at))

    assert found.allocated_bytes
    assert all(memory.peak_bytes for memory in found.phases.values())
    assert found.parameters == 1_484_916_736  # as the published checkpoint has them


def test_what_ships_counts_where_a_package_is_missing_that_its_model_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inquiry, "versions", lambda: {"torch": "99.0", "deepspeed": "99.0"})

    assert predict(of_a_preset()).peak_allocated_bytes


def test_what_ships_counts_only_with_the_releases_that_it_was_recorded_with(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Inquiry.of(of_a_preset())
    releases = General.unpacked(shipped.general_file_of(asked).read_bytes()).whole.versions

    monkeypatch.setattr(shipped, "versions", lambda: {name: version.partition("+")[0] + "+cu130" for name, version in releases.items()})
    assert shipped.find_general(asked) is not None
    monkeypatch.setattr(shipped, "versions", lambda: {**releases, "transformers": "99.0"})
    assert shipped.find_general(asked) is None


def test_all_that_ships_can_be_read() -> None:
    exact = [Signature.unpacked(path.read_bytes()) for path in shipped.FOLDER.glob(f"*{shipped.SUFFIX}")]
    general = [General.unpacked(path.read_bytes()) for path in shipped.FOLDER.glob(f"*{shipped.GENERAL}")]

    assert len(exact) + len(general) == len(list(shipped.FOLDER.iterdir()))
    assert all(each.events and not each.problem for each in exact)
    assert all(each.pieces and not each.whole.problem for each in general)


def test_all_that_ships_is_asked_for_by_a_preset() -> None:
    """A digest that has changed would leave files that nobody finds: `make signatures`."""
    cases = [(name, stage) for name in preset_names() for stage in (2, 3)]
    jobs = [of_a_preset(*case, checkpointing=flag) for case in cases for flag in (False, True)]
    on_a100 = [of_a_preset(*case, checkpointing=flag, gpu="a100-80gb") for case in cases for flag in (False, True)]
    first = [job for job in on_a100 if job.profile.name.startswith(("llama3.", "qwen2.5-", "mistral-"))]
    others = [of_a_preset(*case, checkpointing=flag, recipe=each) for case in cases for flag in (False, True) for each in OTHER_PRECISIONS]

    pairs = [{shipped.file_of(each).name, shipped.general_file_of(each).name} for each in inquiries_of([*jobs, *first])]
    there = {path.name for path in shipped.FOLDER.iterdir()}

    assert all(pair & there for pair in pairs)
    assert there <= set().union(*pairs, (shipped.general_file_of(each).name for each in inquiries_of([*others, *on_a100])))


@pytest.mark.parametrize("recipe", ["bf16-fp32-master", "bf16-full", "fp16-fp32-master", *OTHER_PRECISIONS])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_preset_answers_its_first_question_without_torch(stage: int, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "can_trace", lambda _: False)

    assert predict(of_a_preset("llama3.1-8b", stage, recipe=recipe)).peak_allocated_bytes


@pytest.mark.parametrize("gpu", ["a100-80gb", "l4-24gb", "rtx-4090-24gb"])
def test_a_preset_has_peaks_on_gpus_that_run_the_kernels_of_an_a100(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipped, "can_trace", lambda _: False)

    assert predict(of_a_preset("llama3.1-8b", gpu=gpu)).peak_allocated_bytes


def test_no_preset_has_heads_that_a_small_gpu_runs_with_other_kernels() -> None:
    """Of more than 192 elements: up to 224, or with dropout
    (`dry_run/hardware/cuda_operators/attention.py`)."""
    models = [load_profile(name).profile.model for name in preset_names()]
    configs = [model.hf_config for model in models if isinstance(model, HuggingFaceSettings)]
    wide = [(each, max(_widths_of_heads(each))) for each in (config.get("text_config", config) for config in configs)]

    assert len(configs) > 30
    assert [width for config, width in wide if width > 192 and (width <= 224 or config.get("attention_dropout"))] == []


def _widths_of_heads(config: Mapping[str, Any]) -> set[int]:
    whole = config.get("head_dim") or int(config["hidden_size"]) // int(config["num_attention_heads"])
    latent = int(config.get("qk_nope_head_dim", 0)) + int(config.get("qk_rope_head_dim", 0))
    return {int(whole), latent, int(config.get("v_head_dim") or 0)}


@pytest.fixture
def of_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inquiry:
    """Recorded of a function that read a file, one that was not there, and a variable."""
    monkeypatch.setenv("MY_LAYERS", "3")
    (tmp_path / "model.py").write_text("three layers")
    asked = Inquiry.of(jobs_of_a_function())
    read = [str(tmp_path / "model.py"), str(tmp_path / "missing")]
    store.keep(asked, SIGNATURE.packed(), ReadSources.of(read, ["MY_LAYERS", "NOT_SET"], SIGNATURE.packed()).packed())
    store.forget()
    return asked


def jobs_of_a_function() -> Job:
    return expand(Selection(profile("cpu-demo", model__factory="model:build"), [2], [2], ["bf16-full"], Device.CPU, None))[0]


def test_a_function_is_not_recorded_again_while_all_that_it_read_is_as_it_was(of_a_function: Inquiry) -> None:
    assert store.find(of_a_function) is not None


@pytest.mark.parametrize(
    "change", ["the file", "a file that was missing", "a variable", "one that was not set", "the folder", "the answer"]
)
def test_a_function_is_recorded_again_after(
    change: str, of_a_function: Inquiry, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if change == "the file":
        (tmp_path / "model.py").write_text("four layers, and more")
    elif change == "a file that was missing":
        (tmp_path / "missing").write_text("")
    elif change == "a variable":
        monkeypatch.setenv("MY_LAYERS", "4")
    elif change == "one that was not set":
        monkeypatch.setenv("NOT_SET", "")
    elif change == "the folder":
        monkeypatch.chdir(tmp_path)
        of_a_function = Inquiry.of(jobs_of_a_function())
    else:
        (cache / f"{of_a_function.name}.signature").write_bytes(dataclasses.replace(SIGNATURE, about="another").packed())

    assert store.find(of_a_function) is None


def test_what_a_process_reads_is_seen(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os\nopen(os.environ['DATA']).read()\nopen(os.environ['DATA'] + '.out', 'w').close()\n")
    (tmp_path / "data").write_text("8")
    code = """if True:
        import sys
        from bf16prof.tracing.reads import Reads
        reads = Reads()
        import mine
        print("\\n".join([*reads.files(besides="/nowhere"), *reads.variables()]))
    """
    surroundings = {**os.environ, "DATA": str(tmp_path / "data"), "PYTHONPATH": str(tmp_path)}
    seen = [subprocess.check_output([sys.executable, "-c", code], env=surroundings, text=True).split() for _ in range(2)]

    for each in seen:  # the second time Python reads what it compiled
        assert {str(tmp_path / "mine.py"), str(tmp_path / "data"), "DATA"} <= set(each)
        assert str(tmp_path / "data.out") not in each


def test_a_reason_is_kept_as_the_answer() -> None:
    asked = Inquiry.of(job(BERT))
    store.give_up(asked, "its code asks for values")

    assert closed_form_gap(job(BERT)) == "its code asks for values"
    assert store.missing([asked]) == []


def test_the_cache_is_listed_and_cleared(main: Main, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path))
    store.keep(Inquiry.of(job(BERT)), SIGNATURE.packed())

    code, out, _ = main("cache", "list", "--json")
    assert code == 0
    (listed,) = json.loads(out)["signatures"]
    assert (listed["about"], listed["parameters"], listed["events"]) == ("a net", 35, len(SIGNATURE.events))
    assert "a net" in main("cache", "list")[1]
    assert main("cache", "clear") == (0, "", f"removed 1 from {tmp_path / 'signatures'}\n")
    assert json.loads(main("cache", "list", "--json")[1])["signatures"] == []


def test_an_unknown_model_is_refused_with_what_to_do(main: Main, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(BERT))

    assert "--no-trace" in refused(main("estimate", tmp_path / "config.json", "--no-trace"))
