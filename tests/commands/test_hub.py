"""A model by a file, a folder, an id in the local Hugging Face cache, or the preset of that id; and
MODEL, which may be any of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Main, main, refused

from bf16prof.errors import InputError
from bf16prof.profiles import hub
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.hub import configuration, is_hub_id

__all__ = ["main"]

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "intermediate_size": 128,
    "vocab_size": 1000,
}
PARAMETERS = 2 * 1000 * 64 + 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 64
CASE = ("--zero", "3", "--gpus", "8", "--recipe", "bf16-full", "--seq", "128")


def cache(home: Path, model_id: str, content: dict[str, Any]) -> None:
    """A model's configuration, as huggingface_hub keeps it below HF_HOME."""
    folder = home / "hub" / f"models--{model_id.replace('/', '--')}"
    snapshot = folder / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    (snapshot / "config.json").write_text(json.dumps(content))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, and an empty working directory."""
    cache(tmp_path / "hf", "acme/tiny", TINY)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf"


def parameters(main: Main, *arguments: str | Path) -> tuple[int, str, str]:
    """Parameters and name of the case, and what was said on stderr."""
    code, out, err = main("estimate", *arguments, *CASE, "--json")
    assert code == 0, err
    (record,) = json.loads(out)["records"]
    return record["parameters"], record["case"]["profile"], err


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("flag", [(), ("--hf-config",)])
def test_an_id_is_read_from_the_local_cache(flag: tuple[str, ...], main: Main) -> None:
    count, name, err = parameters(main, *flag, "acme/tiny")

    assert count == PARAMETERS
    assert name.startswith("llama-"), "called by type and size, not by the folder in the cache"
    assert "preset" not in err


def test_what_lies_in_the_cache_wins_over_the_preset_of_that_id(home: Path, main: Main) -> None:
    assert parameters(main, "--hf-config", "Qwen/Qwen2.5-7B-Instruct")[0] == 7_615_616_512
    cache(home, "Qwen/Qwen2.5-7B-Instruct", TINY)

    assert parameters(main, "--hf-config", "Qwen/Qwen2.5-7B-Instruct")[0] == PARAMETERS


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("flag", [(), ("--hf-config",)])
@pytest.mark.parametrize(
    ("model_id", "preset", "count"),
    [("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b", 7_615_616_512), ("meta-llama/llama-3.1-8b", "llama3.1-8b", 8_030_261_248)],
)
def test_an_id_that_is_not_in_the_cache_is_the_preset_and_that_is_said(
    flag: tuple[str, ...], model_id: str, preset: str, count: int, main: Main
) -> None:
    found = parameters(main, *flag, model_id)

    assert found[:2] == (count, preset)
    assert f"{model_id} is not in the local Hugging Face cache: the preset {preset} describes the same model" in found[2]
    assert "note:" not in parameters(main, *flag, model_id, "-q")[2]


def test_a_folder_and_a_file(tmp_path: Path, main: Main) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(TINY))
    (tmp_path / "empty").mkdir()

    for given in (tmp_path / "model", tmp_path / "model" / "config.json"):
        assert parameters(main, given)[:1] == parameters(main, "--hf-config", given)[:1] == (PARAMETERS,)
    for flag in ((), ("--hf-config",)):
        assert f"the folder {tmp_path / 'empty'} has no config.json" in refused(main("estimate", *flag, tmp_path / "empty"))
        assert "cannot read" in refused(main("estimate", *flag, tmp_path / "missing.json"))


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("flag", [(), ("--hf-config",)])
def test_an_id_that_nobody_knows_says_how_to_get_it(flag: tuple[str, ...], main: Main) -> None:
    said = refused(main("estimate", *flag, "acme/unheard-of"))
    assert "'acme/unheard-of' is no file, and not in the local Hugging Face cache" in said
    assert "--download fetches its config.json" in said

    assert "did you mean Qwen/Qwen2.5-7B" in refused(main("estimate", *flag, "Qwen/Qwen2.5-7C"))


@pytest.mark.usefixtures("home")
def test_the_network_is_asked_only_where_the_user_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(model_id: str, name: str, **_: Any) -> str:
        asked.append(model_id)
        (tmp_path / name).write_text(json.dumps(TINY))
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError):
        configuration("acme/other")
    assert asked == []

    assert configuration("acme/other", download=True).path == tmp_path / "config.json"
    assert asked == ["acme/other"]


@pytest.mark.usefixtures("home")
def test_a_download_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def download(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no\nnetwork")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(InputError, match="--download acme/other: LocalEntryNotFoundError: no network"):
        configuration("acme/other", download=True)


@pytest.mark.usefixtures("home")
def test_without_huggingface_hub_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)

    with pytest.raises(InputError, match="which only huggingface_hub can read") as caught:
        configuration("acme/tiny")
    assert caught.value.hint.endswith("pip install 'bf16prof[hf]'")
    with pytest.raises(InputError, match="--download needs huggingface_hub"):
        configuration("acme/tiny", download=True)
    assert configuration("Qwen/Qwen3-8B").preset == "qwen3-8b", "presets need no library"


@pytest.mark.parametrize("text", ["acme/tiny", "gpt2", "Qwen/Qwen2.5-7B", "a/b.c_d-e"])
def test_what_has_the_form_of_an_id(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize("text", ["", "/abs", "a/b/c", "a//b", "a--b/c", "..", "a/..", "a b", "a/b:c", "x" * 200, "a/é", "a\x00b"])
def test_what_has_not(text: str) -> None:
    assert not is_hub_id(text)


# MODEL.


def test_model_may_be_a_preset_a_profile_or_a_function(tmp_path: Path, main: Main) -> None:
    (tmp_path / "mine.toml").write_text('[model]\nfamily = "gpt2"\nhidden_size = 8\nnum_layers = 1\nnum_heads = 1\nvocab_size = 128\n'
                                        "max_sequence_length = 128\n")  # fmt: skip

    assert parameters(main, "qwen2.5-7b")[:2] == (7_615_616_512, "qwen2.5-7b")
    assert parameters(main, "Qwen2.5-7B")[:2] == (7_615_616_512, "qwen2.5-7b")
    assert parameters(main, tmp_path / "mine.toml")[1] == "mine"
    assert "only the code that builds this model" in refused(main("estimate", "mine:make"))


def test_there_is_one_model(tmp_path: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(TINY))

    assert "llama3.1-8b and --profile exclude each other" in refused(main("estimate", "llama3.1-8b", "-p", "cpu-demo"))
    assert "exclude each other: there is one model" in refused(main("estimate", "llama3.1-8b", "--hf-config", tmp_path))
    assert "exclude each other: there is one model" in refused(main("estimate", tmp_path, "--model", "mine:make"))
    assert parameters(main, tmp_path, "-p", "cpu-demo")[0] == PARAMETERS, "the profile then says the workload"

    monkeypatch.setenv("BF16PROF_PROFILE", "cpu-demo")
    monkeypatch.setenv("BF16PROF_MODEL", "mine:make")
    assert parameters(main, "llama3.1-8b")[0] == 8_030_261_248, "what is typed wins over variables"


@pytest.mark.parametrize(("typed", "near"), [("llama3.1-9b", "llama3.1-8b"), ("qwen3-7b", "qwen3-1.7b"), ("mixtral", "mixtral-8x7b")])
def test_an_unknown_model_is_answered_with_the_nearest(typed: str, near: str, main: Main) -> None:
    said = refused(main("estimate", typed))

    assert f"unknown model '{typed}'" in said
    assert near in said.partition("did you mean")[2].partition("?")[0]


def test_short_names_of_flags_and_the_next_command(main: Main) -> None:
    code, out, err = main(
        "plan", "llama3.1-8b", "--gpus", "8", "--gpu", "h100", "--seq", "2048", "--batch-size", "1", "--gas", "2", "--no-verify"
    )

    assert code == 0, err
    assert "2,048" in out
    assert "next: bf16prof simulate llama3.1-8b --sequence-length 2048 " in err
    assert "--profile" not in err


def test_a_gpu_of_which_only_the_memory_is_known_gets_a_plan_without_a_speed(main: Main, tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    code, out, err = main("plan", "gpt2-xl", "--gpus", "8", "--gpu", "80GiB", "--zero", "3", "--no-verify", "-o", page)

    assert code == 0, err
    assert "step time: not known" in out
    assert "tokens/s" not in out.partition("Order:")[0]
    assert "GPU 80GiB: only its memory is known, 85,899,345,920 bytes" in err
    assert "the GPU&#39;s speed is not known" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("gpu", ["v100-16gb", "mi300x", "24GiB"])
def test_records_and_grids_say_which_numbers_rest_on_another_gpu(gpu: str, main: Main) -> None:
    _, out, _ = main("estimate", "gpt2-xl", *CASE, "--gpu", gpu, "--json")
    (record,) = json.loads(out)["records"]
    (caveat,) = find_gpu(gpu).caveats()

    assert caveat in record["notes"]
    assert caveat in main("estimate", "gpt2-xl", *CASE, "--gpus", "8,16", "--gpu", gpu)[2]
    assert ("step_time_floor_s" in record and record["step_time_floor_s"] is not None) == (gpu != "24GiB")


def test_the_start_imports_no_library_of_models() -> None:
    start = "import sys; from bf16prof.app import make_app; make_app()"
    code = f"{start}\nassert not {{'huggingface_hub', 'transformers', 'torch'}} & set(sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
