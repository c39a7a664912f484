"""Models that are not ours, built and trained: Hugging Face's own parameters and losses, and what a
user's function may return."""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_ranks import DEEPSPEED_WARNINGS, fake_ranks
from jobs import profile
from torch import Tensor, nn

from bf16prof.cases import Job, Selection, expand
from bf16prof.engine import training
from bf16prof.engine.batch import batch_spec
from bf16prof.engine.training import TrainingLoop, loss_of, named_tensors, takes_labels
from bf16prof.errors import InputError
from bf16prof.measuring.batches import make_batches
from bf16prof.models.modules import build, build_trained
from bf16prof.profiles.models import FactorySettings, HuggingFaceSettings, Model
from bf16prof.vocabulary import Device

pytestmark = DEEPSPEED_WARNINGS

ATTENTION = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "intermediate_size": 20, "vocab_size": 31}
GROUPED = {**ATTENTION, "num_key_value_heads": 2, "max_position_embeddings": 16}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {**GROUPED, "torch_dtype": "bfloat16", "use_cache": True}),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 31}),
    "qwen2": ("Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "mixtral": ("MixtralForCausalLM", {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "bert": ("BertForMaskedLM", {**ATTENTION, "max_position_embeddings": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 4, "vocab_size": 31, "decoder_start_token_id": 0},
    ),
}


def hf(model_type: str, *, named: bool = True, **changes: Any) -> HuggingFaceSettings:
    architecture, config = CONFIGS[model_type]
    architectures = {"architectures": [architecture]} if named else {}
    return HuggingFaceSettings(hf_config={"model_type": model_type, **architectures, **config, **changes})


def job(model: Model, *, recipe: str = "fp32", stage: int = 1, **overrides: Any) -> Job:
    overrides = {"workload__sequence_length": 5, "workload__micro_batch_size": 2, "workload__data": "synthetic", **overrides}
    settings = profile("cpu-demo", **overrides).model_copy(update={"model": model})
    return expand(Selection(settings, [stage], [2], [recipe], Device.CPU))[0]


class FakeEngine:
    """As much of a DeepSpeed engine as the loop knows, without DeepSpeed."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.device = torch.device("cpu")

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.module(*arguments, **keywords)

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        pass


def trained(of: Job) -> TrainingLoop:
    """The loop after a step on a model of its own, with the batches that a rank reads."""
    torch.manual_seed(0)
    engine = FakeEngine(build(of.profile.model, activation_checkpointing=of.profile.workload.activation_checkpointing))
    loop = TrainingLoop(engine, of, make_batches(of, 0, "cpu", shifted=not takes_labels(engine.module)))
    assert loop.kept == {}
    assert loop.step() != 0
    return loop


# Hugging Face.


@pytest.mark.parametrize("model_type", CONFIGS)
def test_an_architecture_has_hugging_faces_parameters_in_fp32(model_type: str) -> None:
    import transformers

    architecture, config = CONFIGS[model_type]
    theirs = getattr(transformers, architecture)(getattr(transformers, architecture).config_class(**config))

    ours = build(hf(model_type), activation_checkpointing=False)

    assert type(ours) is type(theirs)
    assert [(name, p.shape) for name, p in ours.named_parameters()] == [(name, p.shape) for name, p in theirs.named_parameters()]
    assert {p.dtype for p in ours.parameters()} == {torch.float32}, "whatever dtype the checkpoint has"
    assert ours.training


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_an_architecture_trains_on_its_own_loss(model_type: str, checkpointing: bool) -> None:
    # WHEN it takes a step
    loop = trained(job(hf(model_type), workload__activation_checkpointing=checkpointing))

    # THEN the loss is what transformers computes from labels that are the input ids, and the
    # outputs are kept by their names
    assert torch.equal(loop.batches[-1]["input_ids"], loop.batches[-1]["labels"])
    assert loop.batches[-1]["input_ids"] is not loop.batches[-1]["labels"]
    assert loop.loss is loop.outputs.loss
    assert {"logits", "loss", "input ids", "labels"} <= set(loop.kept)
    logits = loop.kept["logits"]
    assert isinstance(logits, torch.Tensor) and logits.shape == (2, 5, 31)
    assert "past key values" not in loop.kept
    module = loop._engine.module
    assert all(p.grad is not None for name, p in module.named_parameters() if "expert" not in name)
    assert any(getattr(m, "gradient_checkpointing", False) for m in module.modules()) == checkpointing


@pytest.mark.parametrize(
    ("model_type", "expected"), [("llama", "LlamaForCausalLM"), ("t5", "T5ForConditionalGeneration"), ("bert", "BertLMHeadModel")]
)
def test_without_architectures_the_model_types_language_model_is_taken(model_type: str, expected: str) -> None:
    model = build(hf(model_type, named=False, is_decoder=True), activation_checkpointing=False)

    assert type(model).__name__ == expected


def test_a_bare_model_trains_on_the_mean_of_its_output() -> None:
    loop = trained(job(hf("bert", architectures=["BertModel"], hidden_size=16)))

    assert loop.outputs.last_hidden_state.shape == (2, 5, 16)
    assert loop.loss is not None
    assert torch.equal(loop.loss, loop.outputs.last_hidden_state.float().mean())


def test_an_attention_implementation_is_the_one_that_was_asked_for() -> None:
    def of(**chosen: Any) -> Any:
        settings = HuggingFaceSettings(hf_config=hf("llama").hf_config, **chosen)
        return build(settings, activation_checkpointing=False).config

    assert of()._attn_implementation == "sdpa"
    assert of(attn_implementation="eager")._attn_implementation == "eager"


def test_nothing_is_fetched_and_no_remote_code_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_arguments: object) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", connect)
    auto_map = {"AutoConfig": "somebody/model--code.Config", "AutoModelForCausalLM": "somebody/model--code.Model"}

    model = build(hf("llama", auto_map=auto_map, _name_or_path="somebody/model"), activation_checkpointing=False)

    assert type(model).__module__ == "transformers.models.llama.modeling_llama"


VIT = {"model_type": "vit", **{k: v for k, v in ATTENTION.items() if k != "vocab_size"}, "image_size": 8, "patch_size": 4}
NOT_BUILT: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "brand-new"}, "does not know the model_type 'brand-new'"),
    ({"model_type": "x" * 500}, "does not know the model_type 'xxx"),
    ({**hf("llama").hf_config, "architectures": ["NewForCausalLM"]}, "has no architecture 'NewForCausalLM'"),
    ({**hf("llama").hf_config, "architectures": ["pipeline"]}, "has no architecture 'pipeline'"),
    ({**hf("llama").hf_config, "architectures": ["BertForMaskedLM"]}, "cannot build this 'llama' model"),
    ({**hf("llama").hf_config, "hidden_size": "wide"}, "cannot build this 'llama' model: "),
    ({**hf("llama").hf_config, "num_attention_heads": 0}, "cannot build this 'llama' model: "),
    ({**hf("gpt2").hf_config, "n_embd": 17}, "cannot build this 'gpt2' model: ValueError"),
    ({**hf("bert").hf_config, "hidden_act": "none"}, "cannot build this 'bert' model: KeyError"),
    ({**VIT, "architectures": ["ViTForImageClassification"]}, "describe what it is called with"),
]


@pytest.mark.parametrize(("config", "expected"), NOT_BUILT, ids=range(len(NOT_BUILT)))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_transformers_cannot_build_is_one_line(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(InputError) as caught:
        build(HuggingFaceSettings(hf_config=config), activation_checkpointing=False)

    assert expected in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


def test_without_transformers_there_is_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(InputError, match="needs transformers") as caught:
        build(hf("llama"), activation_checkpointing=False)
    assert caught.value.hint == "pip install 'bf16prof[hf]'"


def test_described_inputs_feed_a_model_that_reads_no_tokens() -> None:
    inputs: dict[str, Any] = {
        "pixel_values": {"dtype": "float32", "shape": ["micro_batch", 3, 8, 8]},
        "labels": {"dtype": "int64", "shape": ["micro_batch"], "high": 2},
    }
    model = HuggingFaceSettings.model_validate({"hf_config": {**VIT, "architectures": ["ViTForImageClassification"]}, "inputs": inputs})

    loop = trained(job(model))

    assert loop.loss is loop.outputs.loss
    assert set(loop.kept) == {"logits", "loss", "pixel values", "labels"}


# A function of the user's own.

MINE = """
import torch
from torch import nn
from torch.nn import functional

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, 8), nn.Linear(8, 256)
        self.frozen = nn.Parameter(torch.zeros(3), requires_grad=False)
    def forward(self, tokens):
        return self.head(self.embed(tokens))

class Labelled(Plain):
    def forward(self, tokens, labels=None):
        logits = super().forward(tokens)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits

class Silent(Plain):
    def forward(self, tokens):
        return {"count": 3}

class Namespace:
    make = Labelled

number = 3

def wrong():
    return {"a": 1}

def broken():
    raise RuntimeError("no\\nluck")

def leaving():
    raise SystemExit("bye")
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module in the working directory, of which nothing is left afterwards."""
    (tmp_path / "mine_of_a_test.py").write_text(MINE)
    (tmp_path / "half_of_a_test.py").write_text("import nowhere_to_be_found")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("mine_of_a_test", "half_of_a_test"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def factory(path: str, **settings: Any) -> FactorySettings:
    return FactorySettings.model_validate({"factory": path if ":" in path else f"mine_of_a_test:{path}", **settings})


@pytest.mark.usefixtures("mine")
def test_a_model_of_tokens_trains_on_the_cross_entropy_of_the_next_ones() -> None:
    loop = trained(job(factory("Plain")))
    tokens, labels = loop.batches[-1]["input_ids"], loop.batches[-1]["labels"]

    assert torch.equal(tokens[:, 1:], labels[:, :-1]), "labels are the next tokens"
    assert loop.loss is not None
    assert torch.equal(loop.loss, nn.functional.cross_entropy(loop.outputs.flatten(0, 1), labels.flatten()))
    assert list(loop.kept) == ["logits", "loss", "input ids", "labels"]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize("name", ["Labelled", "Namespace.make"])
def test_a_model_that_takes_labels_computes_its_own_loss(name: str) -> None:
    loop = trained(job(factory(name)))

    assert torch.equal(loop.batches[-1]["input_ids"], loop.batches[-1]["labels"])
    assert loop.loss is loop.outputs[0]
    assert list(loop.kept) == ["output 1", "loss", "input ids", "labels"]


BROKEN = [
    ("nowhere_to_be_found:make", "cannot import nowhere_to_be_found: ModuleNotFoundError"),
    ("half_of_a_test:make", "cannot import half_of_a_test: ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
    ("absent", "mine_of_a_test has no function absent"),
    ("number", "mine_of_a_test has no function number"),
    ("Namespace.other", "has no function Namespace.other"),
    ("wrong", "returned dict, not a torch.nn.Module"),
    ("broken", "failed: RuntimeError: no luck"),
    ("leaving", "failed: SystemExit: bye"),
]


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(("path", "expected"), BROKEN)
def test_a_function_that_gives_no_model_is_one_line(path: str, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        build(factory(path), activation_checkpointing=False)

    assert expected in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.usefixtures("mine")
def test_checkpointing_needs_a_model_that_can() -> None:
    with pytest.raises(InputError, match=r"workload.activation_checkpointing: Plain has no gradient_checkpointing_enable"):
        build(factory("Plain"), activation_checkpointing=True)


@pytest.mark.usefixtures("mine")
def test_a_model_without_a_loss_is_one_line() -> None:
    with pytest.raises(InputError, match="returned dict without a floating-point tensor"):
        trained(job(factory("Silent")))


@pytest.mark.usefixtures("mine")
def test_running_out_of_memory_is_not_the_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    def starve() -> None:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setitem(sys.modules, "starving_of_a_test", SimpleNamespace(make=starve))

    with pytest.raises(torch.OutOfMemoryError):
        build(factory("starving_of_a_test:make"), activation_checkpointing=False)


# Losses and batches.

SCALAR, LOGITS, HIDDEN, IDS = torch.tensor(2.0), torch.randn(2, 3, 7), torch.randn(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
CROSS_ENTROPY = nn.functional.cross_entropy(LOGITS.flatten(0, 1), IDS.flatten())
LOSSES: list[tuple[Any, Tensor]] = [
    (SCALAR, SCALAR),
    ({"loss": SCALAR, "logits": LOGITS}, SCALAR),
    ({"logits": LOGITS, "loss": SCALAR}, SCALAR),
    (SimpleNamespace(logits=LOGITS, loss=SCALAR), SCALAR),
    ((LOGITS, SCALAR), SCALAR),
    ([IDS, SCALAR, torch.tensor(5.0)], SCALAR),
    (LOGITS, CROSS_ENTROPY),
    ((LOGITS, HIDDEN), CROSS_ENTROPY),
    ({"loss": None, "logits": LOGITS}, CROSS_ENTROPY),
    (SimpleNamespace(loss=None, logits=LOGITS), CROSS_ENTROPY),
    ({"ids": IDS, "inner": {"logits": LOGITS}}, CROSS_ENTROPY),
    (HIDDEN, HIDDEN.mean()),
    ((HIDDEN, LOGITS), HIDDEN.mean()),
    (HIDDEN.bfloat16(), HIDDEN.bfloat16().float().mean()),
    ({"scale": SCALAR, "other": LOGITS}, SCALAR),
]


@pytest.mark.parametrize(("outputs", "expected"), LOSSES, ids=range(len(LOSSES)))
def test_the_loss_is_the_first_thing_that_can_be_one(outputs: Any, expected: Tensor) -> None:
    torch.testing.assert_close(loss_of(outputs, IDS, 7), expected)


@pytest.mark.parametrize("outputs", [None, 3, "x", {}, (), IDS, {"loss": 3.0}, SimpleNamespace(a=1)])
def test_nothing_that_can_be_a_loss_is_refused(outputs: Any) -> None:
    with pytest.raises(InputError, match="without a floating-point tensor"):
        loss_of(outputs, IDS, 7)


def test_tensors_are_named_after_where_they_are() -> None:
    outputs = {"a": LOGITS, "b": (HIDDEN, None, [IDS]), "c": {"d": SCALAR}, "e": 3}

    assert list(named_tensors(outputs)) == ["a", "b 0", "b 2 0", "c d"]
    assert list(named_tensors((HIDDEN, {"x": IDS}))) == ["output 0", "output 1 x"]


def values(batch: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.tolist() for name, tensor in batch.items()}


def test_described_inputs_repeat_with_the_seed_and_differ_between_ranks_and_steps() -> None:
    inputs = {
        "x": {"dtype": "parameters", "shape": ["micro_batch", "sequence"]},
        "ids": {"dtype": "int32", "shape": [50], "high": 3},
        "mask": {"dtype": "bool", "shape": [50]},
    }
    of = job(factory("a:b", inputs=inputs), recipe="bf16-full")
    streams = [make_batches(of, rank, "cpu", shifted=True) for rank in (0, 0, 1)]
    first, same, other = (stream() for stream in streams)
    second = streams[0]()

    assert {name: (tuple(t.shape), str(t.dtype)) for name, t in first.items()} == {
        name: (spec.shape, f"torch.{spec.dtype}") for name, spec in batch_spec(of).items()
    }
    assert values(first) == values(same)
    assert len({str(values(batch)) for batch in (first, other, second)}) == 3
    assert set(first["ids"].tolist()) == {0, 1, 2}
    assert set(first["mask"].tolist()) == {False, True}
    assert first["x"].dtype == torch.bfloat16


# zero.Init.


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("kind", ["family", "hf"])
def test_zero_init_cuts_parameters_while_the_model_is_built(kind: str, wanted: bool, stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # GIVEN a job, and a look at the model as soon as it is built
    model = profile("cpu-demo", model__num_layers=1, model__hidden_size=12).model if kind == "family" else hf("llama")
    of = job(model, stage=stage, recipe="bf16-full", workload__zero_init=wanted)
    seen: list[nn.Module] = []

    def watched(*arguments: Any, **keywords: Any) -> nn.Module:
        seen.append(build_trained(*arguments, **keywords))
        assert all(hasattr(p, "ds_tensor") for p in seen[0].parameters()) == (wanted and stage == 3)
        return seen[0]

    monkeypatch.setattr(training, "build_trained", watched)

    # WHEN its engine is built
    with fake_ranks(2):
        import deepspeed

        deepspeed.init_distributed("fake")
        engine = training.build_engine(of)
        count = training.parameter_count(engine)

    # THEN nothing is missing
    assert seen
    assert count == sum(p.numel() for p in build(model, activation_checkpointing=False).parameters())
