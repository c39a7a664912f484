"""Every answer says what it is about: defaults that are nobody's preset, the line over everything,
origins, identity, schemas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from command_line import Main, csv_rows, main, refused
from jobs import write_profile
from pasted import OUT_OF_MEMORY

from bf16prof import runs
from bf16prof.commands.schemas import json_schema_text, names, schema_of
from bf16prof.reconcile import reconcile
from bf16prof.records import MemoryRecord

__all__ = ["main"]

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 301, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
}  # fmt: skip
ONE = ("--zero", "3", "--gpus", "2", "--recipe", "bf16-fp32-master")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hugging Face configuration in a folder whose name says nothing of the model."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "winter-photos"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA))
    return path


def records(main: Main, *arguments: object) -> list[dict[str, Any]]:
    code, out, err = main(*arguments, "--json")
    assert code == 0, err
    found: list[dict[str, Any]] = json.loads(out)["records"]
    return found


def test_a_model_alone_gets_the_defaults_of_deepspeed_and_the_trainer_and_they_are_called_assumed(main: Main, config: Path) -> None:
    (record,) = records(main, "estimate", "--hf-config", config, *ONE)

    workload = record["workload"]
    assert (workload["sequence_length"], workload["micro_batch_size"], workload["gradient_accumulation_steps"]) == (4096, 1, 1)
    assert workload["activation_checkpointing"] is False
    assert workload["deepspeed"]["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert workload["zero_init"] is True
    assert {"sequence length", "micro-batch", "checkpointing", "attention", "buckets", "optimizer", "GPU"} <= set(workload["assumed"])
    assert record["case"]["profile"].startswith("llama-")
    assert "winter" not in json.dumps(record["case"])


@pytest.mark.parametrize(("limit", "expected"), [(512, 512), (2048, 2048), (131072, 4096), (None, 4096)])
def test_the_sequence_is_as_long_as_the_model_allows_up_to_4096(limit: int | None, expected: int, main: Main, config: Path) -> None:
    content = {key: value for key, value in LLAMA.items() if key != "max_position_embeddings"}
    config.write_text(json.dumps(content if limit is None else {**content, "max_position_embeddings": limit}))

    (record,) = records(main, "estimate", "--hf-config", config, *ONE)

    assert record["workload"]["sequence_length"] == expected


def test_what_somebody_says_is_not_assumed(main: Main, config: Path) -> None:
    said = ("--sequence-length", "64", "--micro-batch-size", "3", "--activation-checkpointing", "--gpu", "a100-80gb")
    sets = ("--set", "deepspeed.zero_optimization.reduce_bucket_size=1000", "--set", "model.attn_implementation=eager")

    (record,) = records(main, "estimate", "--hf-config", config, *ONE, *said, *sets)

    workload = record["workload"]
    assert not {"sequence length", "micro-batch", "checkpointing", "attention", "buckets", "GPU"} & set(workload["assumed"])
    assert workload["attention"] == "eager"
    assert "accumulation" in workload["assumed"]


def test_a_preset_that_nobody_named_is_called_assumed(main: Main) -> None:
    assert "profile" in records(main, "estimate", *ONE)[0]["workload"]["assumed"]
    assert "profile" not in records(main, "estimate", "-p", "gpt2-xl", *ONE)[0]["workload"]["assumed"]


def test_the_variable_names_a_preset_too(main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BF16PROF_PROFILE", "gpt2-xl")
    assert "profile" not in records(main, "estimate", *ONE)[0]["workload"]["assumed"]


def test_records_of_different_workloads_are_never_joined(main: Main, config: Path) -> None:
    short, long = (records(main, "estimate", "--hf-config", config, *ONE, "--sequence-length", n)[0] for n in ("64", "128"))

    assert {**short["case"], "workload": ""} == {**long["case"], "workload": ""}
    assert short["case"] != long["case"]


@pytest.mark.parametrize("without_effect", ["workload.seed=7", "workload.data=pydoc", "optimizer.lr=0.5", "name=other"])
def test_what_moves_no_byte_is_no_other_workload(without_effect: str, main: Main) -> None:
    plain, changed = (records(main, "estimate", "-p", "cpu-demo", *ONE, *more)[0] for more in ((), ("--set", without_effect)))
    assert plain["case"]["workload"] == changed["case"]["workload"]


def test_two_files_of_different_workloads_stay_two_cases_in_a_report(main: Main, config: Path, tmp_path: Path) -> None:
    found: list[MemoryRecord] = []
    for length in ("64", "128"):
        path = tmp_path / f"{length}.json"
        code, _, err = main("estimate", "--hf-config", config, *ONE, "--sequence-length", length, "-o", path)
        assert code == 0, err
        found += runs.load_records(path)
    assert len({comparison.case for comparison in reconcile(found)}) == 2


def test_the_line_stands_over_the_table_the_page_markdown_and_in_csv(main: Main, config: Path, tmp_path: Path) -> None:
    files = [tmp_path / f"out{suffix}" for suffix in (".md", ".html", ".csv")]

    code, out, _ = main("estimate", "--hf-config", config, *ONE, *(part for file in files for part in ("-o", file)))

    assert code == 0
    line = next(line for line in out.splitlines() if "(sequence, micro-batch, accumulation)" in line)
    assert line.startswith("llama, ")
    for text in ("4,096 tokens x 1 x 1", "checkpointing off", "ZeRO-3, buckets 500 M, zero.Init", "assumed: sequence length"):
        assert text in line
    assert line.replace("|", r"\|") == files[0].read_text().splitlines()[0]
    assert line in files[1].read_text()
    (row,) = csv_rows(files[2])
    assert row["asked"] == line
    assert (row["sequence_length"], row["micro_batch_size"]) == ("4096", "1")
    assert json.loads(row["deepspeed"])["zero_optimization"]["stage"] == 3


def test_a_plan_says_what_it_chooses_and_what_was_assumed(main: Main, tmp_path: Path) -> None:
    files = [tmp_path / f"out{suffix}" for suffix in (".md", ".html")]

    code, out, err = main("plan", "--no-verify", "qwen2.5-0.5b", "--gpus", "2", *(part for file in files for part in ("-o", file)))

    assert code == 0, err
    line = out.splitlines()[0]
    assert "sequences of 4,096 tokens" in line and "chosen by the plan: ZeRO stage, recipe, micro-batch" in line
    assert "micro-batch" not in line.partition("assumed: ")[2]
    assert line in files[1].read_text()


def test_every_setting_has_its_origin_with_v_and_on_the_page(main: Main, config: Path, tmp_path: Path) -> None:
    page = tmp_path / "out.html"

    code, out, _ = main("estimate", "--hf-config", config, *ONE, "--micro-batch-size", "2", "-v", "-o", page)

    assert code == 0
    rows = {cells[0]: cells[1:] for line in out.splitlines() if len(cells := line.rstrip().split(maxsplit=2)) == 3}
    assert rows["workload.micro_batch_size"] == ["2", "--micro-batch-size"]
    assert rows["workload.sequence_length"][1].startswith("assumed: min(max_position_embeddings, 4096)")
    assert rows["workload.seed"] == ["42", "default"]
    assert "assumed: min(max_position_embeddings, 4096)" in page.read_text()


def test_a_named_profile_keeps_its_own_workload(main: Main, config: Path, tmp_path: Path) -> None:
    profile = write_profile(tmp_path / "mine.toml")

    (record,) = records(main, "estimate", "-p", profile, "--hf-config", config, *ONE)

    assert "sequence length" not in record["workload"]["assumed"]


# JSON Schemas.


@pytest.mark.parametrize("name", names())
def test_the_schema_that_ships_is_the_one_that_the_code_says(name: str) -> None:
    shipped = Path(runs.__file__).with_name("schemas") / f"{name.removesuffix('.json')}.json"
    assert shipped.read_text() == json_schema_text(name), "run `make schemas`"
    jsonschema.Draft202012Validator.check_schema(schema_of(name))


def test_documents_satisfy_their_schema(main: Main, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    losses = tmp_path / "loss.csv"
    losses.write_text("step,loss\n1,2.5\n2,2.25\n")
    message = tmp_path / "oom.log"
    message.write_text(OUT_OF_MEMORY)
    commands = {
        "estimate": ("estimate", "--hf-config", config, "--gpus", "2"),
        "plan": ("plan", "--no-verify", "qwen2.5-0.5b", "--gpus", "2,4"),
        "import": ("import", losses, "--hf-config", config, *ONE, "-d", run),
        "explain": ("explain", message, "--hf-config", config, *ONE),
        "report": ("report", run),
    }
    for name, command in commands.items():
        code, out, err = main(*command, "--json")
        assert code == 0, err
        jsonschema.validate(json.loads(out), schema_of(name))
    for file in (runs.MANIFEST, runs.RECORDS):
        jsonschema.validate(json.loads((run / file).read_text()), schema_of(file))


def test_a_document_that_is_wrong_does_not_satisfy_it(main: Main) -> None:
    code, out, _ = main("estimate", "-p", "cpu-demo", *ONE, "--json")
    assert code == 0
    document = json.loads(out)
    document["records"][0]["allocated_bytes"] = "many"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, schema_of("estimate"))


def test_schemas_are_listed_printed_and_named(main: Main) -> None:
    assert main("schema")[1].split() == names()
    assert main("schema", "plan")[1] == json_schema_text("plan")
    assert "unknown document 'plam'" in refused(main("schema", "plam"))
