"""Mutants of valid files, given to the commands that read them. An answer is a record that can be
read again, or one line and exit code 2.

`test_fuzz.py` draws a few of each; `make fuzz` ten thousand (`benchmarks/fuzz.py`). What once broke
a reader lies in `tests/data/found`.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import json
import os
import pickle
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pasted
import report_fixtures as fixtures
from hugging_face import config
from hypothesis import strategies as st
from logs import BREAKDOWN, EXAMPLE, LOSSES, SAMPLES

from bf16prof import cli
from bf16prof.documents import document, json_text

DATA = Path(__file__).parents[1] / "data"
FOUND = DATA / "found"
SLOWEST_S = 10.0
"""Seconds of work in which an answer has to come; most come in a few hundredths."""
LONGEST_S = 300.0
"""Seconds in all, for one that waits; it may share its core with others."""

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 0.5, -0.0, 1e308, 1e-320, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**400, "", " ", "auto",
    "x", "x" * 5000, "\x00", "\x1b[31m", "\u202e", "[/red]", "<script>alert(1)</script>", "=1+1", "../..", "/dev/zero", "nan", "1e5", "٣",
    [], {}, [[]], [None], [1, "a"], {"": {}}, {"a": {"b": []}}, json.loads("[" * 60 + "]" * 60),
)  # fmt: skip
WORDS = tuple(value if isinstance(value, str) else json.dumps(value) for value in HOSTILE)
TOKEN = re.compile(r'"[^"\n]*"|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?|\w+|[^\w\s]', re.IGNORECASE)


@dataclass(frozen=True)
class Reader:
    """A command that reads a file: the valid content, what is typed, where the file lies, and what
    lies beside it.

    `{file}` and `{folder}` stand for the mutant and its folder.
    """

    valid: tuple[bytes, ...]
    words: str
    name: str = "file"
    beside: Mapping[str, bytes] = field(default_factory=dict)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


def _readers() -> dict[str, Reader]:
    run = fixtures.run()
    manifest, records = json_text(run.manifest).encode(), json_text(document(run.records)).encode()
    case = "--zero 2 --recipe bf16-full --gpus 2"
    toml = b'[model]\nhf_config = {model_type = "x", vocab_size = 5}\nsafetensors = "%s"\n[workload]\nsequence_length = 8\n'
    oom = pasted.BACKWARD + pasted.OUT_OF_MEMORY
    texts = [text.encode() for text in (pasted.THROUGHPUT, oom, pasted.TRAINER, pasted.SMI_TABLE, pasted.MICRO_STEPS, pasted.ENDS_IN_INIT)]
    preset = DATA.parents[1] / "bf16prof" / "profiles" / "presets" / "cpu-demo.toml"
    return {
        "profile": Reader((PROFILE, preset.read_bytes()), f"estimate -p {{file}} {case}",
                          "p.toml"),
        "hf-config": Reader(tuple(_json(config(kind)) for kind in ("llama", "gpt2", "mixtral", "gemma3_text", "falcon", "opt")),
                            f"estimate --hf-config {{file}} {case}", "config.json"),
        "ds-config": Reader((_json(DS_CONFIG),), "estimate -p cpu-demo --gpus 2 --ds-config {file}", "ds.json"),
        "training-args": Reader(TRAINING_ARGS, f"estimate -p cpu-demo {case} --training-args {{file}}", "args.yaml"),
        "safetensors": Reader((WEIGHTS,), f"estimate -p {{folder}}/p.toml {case}", "model.safetensors",
                              {"p.toml": toml % b"model.safetensors"}),
        "index": Reader((_json({"weight_map": {"wte.weight": "model.safetensors", "h.0.w": "model.safetensors"}}),),
                        f"estimate -p {{folder}}/p.toml {case}", "index.json",
                        {"p.toml": toml % b"index.json", "model.safetensors": WEIGHTS}),
        "run.json": Reader((manifest,), "report {folder} -o {folder}/out.html", "run.json", {"records.json": records}),
        "records.json": Reader((records,), "report {folder} -o {folder}/out.html", "records.json", {"run.json": manifest}),
        "log": Reader((EXAMPLE.read_bytes(), BREAKDOWN.read_bytes()[:4000], *texts),
                      f"import {{file}} -p cpu-demo {case} -d {{folder}}/run", "train.log"),
        "losses": Reader((LOSSES.encode(),), f"import {{file}} {case} -d {{folder}}/run", "losses.csv"),
        "nvidia-smi": Reader((SAMPLES.encode(),), f"import {{file}} {case} -d {{folder}}/run", "smi.csv"),
        "snapshot": Reader((SNAPSHOT,), f"import {{file}} {case} -d {{folder}}/run", "snapshot.pickle"),
        "message": Reader((pasted.OUT_OF_MEMORY.encode(), oom.encode()), "explain {file}", "oom"),
        "plan": Reader((PROFILE,), "plan -p {file} --gpus 2 --gpu h100-80gb --no-verify", "p.toml"),
    }  # fmt: skip


_HEADER = _json({
    "__metadata__": {"format": "pt"}, "wte.weight": {"dtype": "F32", "shape": [5, 4], "data_offsets": [0, 80]},
    "h.0.w": {"dtype": "BF16", "shape": [4, 4], "data_offsets": [80, 112]},
})  # fmt: skip
WEIGHTS = len(_HEADER).to_bytes(8, "little") + _HEADER
"""A header of safetensors; the data need not be there."""
_BLOCKS = [{"address": 0, "size": 512, "requested_size": 500, "state": "active_allocated", "frames": []},
           {"address": 512, "size": 1536, "requested_size": 0, "state": "inactive", "frames": []}]  # fmt: skip
_SEGMENT = {
    "device": 0, "address": 0, "total_size": 2048, "allocated_size": 512, "active_size": 512, "stream": 0, "segment_type": "small",
    "segment_pool_id": (0, 0), "is_expandable": False, "blocks": _BLOCKS,
}  # fmt: skip
_EVENTS = [{"action": action, "addr": 0, "size": 512, "stream": 0, "time_us": time, "frames": []} for time, action in enumerate(
    ("alloc", "free_requested", "free_completed", "alloc"))]  # fmt: skip
SNAPSHOT = pickle.dumps({"segments": [_SEGMENT], "device_traces": [_EVENTS]})
"""What `torch.cuda.memory._snapshot` gives, and people pickle."""

PROFILE = b"""\
[model]
family = "gpt2"
hidden_size = 64
num_layers = 2
num_heads = 4
vocab_size = 101
max_sequence_length = 64
[workload]
data = "synthetic"
sequence_length = 32
micro_batch_size = 2
seed = 3
[optimizer]
lr = 1e-3
betas = [0.9, 0.99]
[deepspeed]
gradient_clipping = 1.0
[deepspeed.zero_optimization]
reduce_bucket_size = 50000
"""
DS_CONFIG = {
    "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 3, "reduce_bucket_size": 5e5, "offload_optimizer": {"device": "cpu", "pin_memory": True},
                          "stage3_prefetch_bucket_size": 1000},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}, "data_types": {"grad_accum_dtype": "fp32"},
    "activation_checkpointing": {"partition_activations": False}, "wall_clock_breakdown": False, "steps_per_print": 10,
}  # fmt: skip
TRAINING_ARGS = (
    b"per_device_train_batch_size: 4\nbf16: true\nlearning_rate: 2e-5\ngradient_checkpointing: true\noptim: adamw_torch\n",
    b'{"per_device_train_batch_size": 2, "fp16": true, "weight_decay": 0.1, "gradient_accumulation_steps": 2}',
)


READERS = _readers()
"""Every reader of people's files, by name."""


@st.composite
def mutants(draw: st.DrawFn, valid: tuple[bytes, ...]) -> bytes:
    """A valid file after one to three changes: of its tree where it is JSON, of its words where it
    is text, of its bytes."""
    content = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(1, 3))):
        content = draw(st.sampled_from((_tree, _words, _bytes)))(draw, content)
    return content


def _tree(draw: st.DrawFn, content: bytes) -> bytes:
    head = content[:8] if content[8:9] == b"{" else b""
    try:
        tree = json.loads(content[8:] if head else content)
    except (ValueError, RecursionError):
        return _words(draw, content)
    places = list(_places(tree))
    if not places:
        return content
    above, key = draw(st.sampled_from(places))
    match draw(st.sampled_from(("replace", "remove", "wrap", "rename", "add"))):
        case "replace":
            above[key] = draw(st.sampled_from(HOSTILE))
        case "remove":
            del above[key]
        case "wrap":
            above[key] = draw(st.sampled_from(([above[key]], {"x": above[key]}, [above[key]] * 2)))
        case "rename" if isinstance(above, dict):
            above[str(draw(st.sampled_from(WORDS)))] = above.pop(key)
        case _:
            addition = copy.deepcopy(draw(st.sampled_from(HOSTILE)))
            above.append(addition) if isinstance(above, list) else above.update({draw(st.sampled_from(WORDS)): addition})
    text = json.dumps(tree).encode()
    return len(text).to_bytes(8, "little") + text if head else text


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    keys = range(len(tree)) if isinstance(tree, list) else list(tree) if isinstance(tree, dict) else ()
    for key in keys:
        yield tree, key
        yield from _places(tree[key])


def _words(draw: st.DrawFn, content: bytes) -> bytes:
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return _bytes(draw, content)
    found = list(TOKEN.finditer(text))
    if not found:
        return content
    token = found[draw(st.integers(0, len(found) - 1))]
    return (text[: token.start()] + draw(st.sampled_from(WORDS)) + text[token.end() :]).encode(errors="surrogatepass")


def _bytes(draw: st.DrawFn, content: bytes) -> bytes:
    start = draw(st.integers(0, len(content)))
    stop = min(len(content), start + draw(st.integers(0, 20)))
    match draw(st.sampled_from(("cut", "remove", "repeat", "insert", "replace"))):
        case "cut":
            return content[:start]
        case "remove":
            return content[:start] + content[stop:]
        case "repeat":
            return content[:stop] + content[start:stop] * draw(st.sampled_from((1, 2, 300))) + content[stop:]
        case "insert":
            return content[:start] + draw(st.binary(max_size=8)) + content[start:]
        case _:
            return content[:start] + draw(st.binary(min_size=stop - start, max_size=stop - start)) + content[stop:]


@dataclass(frozen=True)
class Answer:
    """How the program ended, and what it printed."""

    code: int
    out: str
    err: str


def ask(reader: Reader, content: bytes, folder: Path) -> Answer:
    """Give a mutant to its reader, in this process. Whatever the program raises is raised here.

    The code of a model that is not known is not run: it is the reader that is asked, and a failure
    is remembered for the same model later.
    """
    folder.mkdir()
    try:
        for name, other in reader.beside.items():
            (folder / name).write_bytes(other)
        (folder / reader.name).write_bytes(content)
        words = [word.format(file=folder / reader.name, folder=folder) for word in reader.words.split()]
        with mock.patch.dict(os.environ, {"BF16PROF_TRACE": "0"}):
            return _called(["bf16prof", *words, *(["--json"] if words[0] != "explain" else [])])
    finally:
        shutil.rmtree(folder)


def _called(words: list[str]) -> Answer:
    out, err, typed = io.StringIO(), io.StringIO(), sys.argv
    clocks = {signal.ITIMER_PROF: (signal.SIGPROF, SLOWEST_S), signal.ITIMER_REAL: (signal.SIGALRM, LONGEST_S)}
    before = {number: signal.getsignal(number) for number in (*cli.SIGNALS, *(number for number, _ in clocks.values()))}
    for clock, (number, seconds) in clocks.items():
        signal.signal(number, _too_slow)
        signal.setitimer(clock, seconds)
    sys.argv = words
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as stop:
        return Answer(stop.code if isinstance(stop.code, int) else 1, out.getvalue(), err.getvalue())
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
        sys.argv = typed
        for number, handler in before.items():
            signal.signal(number, handler)
        gc.enable()  # which the program does without; ten thousand of it in one process cannot


class TooSlow(BaseException):
    """An answer that did not come; nothing may catch it."""


def _too_slow(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow(f"no answer in {SLOWEST_S:g} s of work or {LONGEST_S:g} s in all")


def judge(answer: Answer, check: Callable[[str], object] = json.loads) -> None:
    """Assert that an answer is one."""
    lines = [line for line in answer.err.splitlines() if line.startswith("bf16prof: ")]
    assert "Traceback" not in answer.err
    assert answer.code in (0, 2), answer
    assert len(lines) == (answer.code == 2), answer
    assert "\x1b" not in answer.out + answer.err, answer
    if answer.code == 0 and answer.out.startswith("{"):
        check(answer.out)
