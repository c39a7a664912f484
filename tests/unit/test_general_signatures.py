"""Signatures of any batch and length: fitted through points, folded over layers, confirmed, refused
where something does not agree.

The model here is a small program that writes signatures, so that what it does at every point is
known.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from jobs import profile

from bf16prof.cases import Job, Selection, expand
from bf16prof.commands import recording
from bf16prof.errors import InputError
from bf16prof.kernels import KernelCall, scratch_bytes
from bf16prof.models.autograd.events import GRADIENT, NO_LAYER, Event, ParameterKey
from bf16prof.models.shapes import ParameterSpec
from bf16prof.profiles.gpus import find_gpu
from bf16prof.reductions import Processor, processor_of
from bf16prof.signatures import shipped, store
from bf16prof.signatures.general import General
from bf16prof.signatures.inquiry import Inquiry
from bf16prof.signatures.polynomials import Fit, Point
from bf16prof.signatures.sampling import folded, generalized, is_same_in_fp16
from bf16prof.signatures.signature import Called, Signature, SilentCall
from bf16prof.vocabulary import Component, Device, Label

MADE: Label = (Component.ACTIVATIONS, "mm (forward)")
SCRATCH: Label = (Component.WORKSPACE, "scratch of embedding_dense_backward")
WIDTH, VOCABULARY, LAYERS = 64, 1000, 20
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
H100 = find_gpu("h100-80gb")
EXTRA = Callable[[int, int], int]


def config(layers: int = LAYERS, **changes: object) -> dict[str, Any]:
    return {"model_type": "bert", "vocab_size": VOCABULARY, "num_hidden_layers": layers, "max_position_embeddings": 4096, **changes}


def job(batch: int = 2, length: int = 512, gpu: str = "h100-80gb", *, recipe: str = "bf16-full", **changes: object) -> Job:
    changed = profile(
        "cpu-demo",
        model__hf_config=config(**changes),  # type: ignore[arg-type]
        workload__micro_batch_size=batch,
        workload__sequence_length=length,
    )
    return expand(Selection(changed, [3], [2], [recipe], Device.GPU, find_gpu(gpu)))[0]


def embedding(batch: int, length: int) -> KernelCall:
    return KernelCall("embedding, backward", (batch * length, WIDTH, VOCABULARY, 0, 8, 2))


def recorded(asked: Job, extra: EXTRA = lambda batch, length: 0) -> Signature:
    """What a model does that keeps one tensor and one pinned weight for each layer, and scores for
    each pair of positions."""
    batch, length = asked.profile.workload.micro_batch_size, asked.profile.workload.sequence_length
    layers = asked.profile.model.hf_config["num_hidden_layers"]  # type: ignore[union-attr]
    size, scores = 2 * batch * length * WIDTH, batch * length**2 + extra(batch, length)
    weights = [ParameterKey(NO_LAYER, f"layers.{number}.weight") for number in range(layers)]
    events = [
        event
        for number, weight in enumerate(weights)
        for event in (
            Event("fetch", ParameterKey(NO_LAYER, f"layers.{number}"), 0), Event("memory", MADE, size), Event("memory", MADE, scores),
            Event("memory", MADE, -scores), Event("compute", "forward", 2 * batch * length * WIDTH**2), Event("pin", (weight, number), 0),
        )
    ]  # fmt: skip
    events += [Event("logits", None, 0), Event("loss", None, 0), Event("backward", None, 0)]
    for number, weight in reversed(list(enumerate(weights))):
        events += [Event("unpin", (weight, number), 0), Event("memory", MADE, -size), Event("memory", GRADIENT, 2 * WIDTH**2)]
        events += [Event("gradient", weight, 2 * WIDTH**2)]
    call, last = embedding(batch, length), len(events)
    scratch = scratch_bytes(call, processor_of(asked.gpu))
    return Signature(
        parameters=tuple(ParameterSpec(name, (WIDTH, WIDTH), "Linear") for _, name in weights),
        held=(),
        modules=tuple(Called(f"layers.{number}", (weight[1],)) for number, weight in enumerate(weights)),
        outputs=(("logits", 2 * batch * length * VOCABULARY),),
        loss_bytes=4,
        events=(*events, *([Event("memory", SCRATCH, scratch), Event("memory", SCRATCH, -scratch)] if scratch else ())),
        building=(0, 0),
        problem="",
        versions={"torch": "9.9"},
        about=f"a net, {batch} x {length}, bf16",
        calls={last: call, last + 1: call} if scratch else {},
        silent=() if scratch else (SilentCall(last, SCRATCH, call),),
    )


class Asked:
    """Answers, and remembers how many layers it was asked for at how many points."""

    def __init__(self, extra: EXTRA = lambda batch, length: 0) -> None:
        self.extra = extra
        self.layers: list[int] = []

    def __call__(self, inquiries: Sequence[Inquiry]) -> dict[str, Signature]:
        self.layers += [each.job.profile.model.hf_config["num_hidden_layers"] for each in inquiries]  # type: ignore[union-attr]
        return {each.digest: recorded(each.job, self.extra) for each in inquiries}


def agrees(found: General | None, at: Point, gpu: str = "h100-80gb", extra: EXTRA = lambda batch, length: 0) -> bool:
    asked = job(*at, gpu)
    answer, real = found.at(at, processor_of(asked.gpu)) if found else None, recorded(asked, extra)
    return answer is not None and (answer.events, answer.outputs, answer.modules) == (real.events, real.outputs, real.modules)


def test_a_number_is_a_polynomial_where_a_point_more_than_it_takes_confirms_it() -> None:
    points = [(batch, length) for batch in (2, 64) for length in (256, 1000, 4000)]

    confirmed = Fit([*points, (3, 512)])
    assert confirmed.is_confirmed
    assert not Fit(points).is_confirmed
    found = confirmed.through([3 + b + 5 * b * s + b * s * s // 2 for b, s in [*points, (3, 512)]])
    assert found is not None
    assert (found((7, 100)), found((1, 1))) == (3 + 7 + 3500 + 35000, None), "half a byte is none"
    assert confirmed.through([b * s + (s > 600) for b, s in [*points, (3, 512)]]) is None
    assert confirmed.through([s**3 for _, s in [*points, (3, 512)]]) is None


def test_a_few_points_tell_any_other_event_by_event() -> None:
    ask = Asked()

    found = generalized(Inquiry.of(job()), ask)

    assert [layers for layers in ask.layers if layers == LAYERS] == [LAYERS] * 2, "all layers are recorded once for each range"
    assert max(layers for layers in ask.layers if layers != LAYERS) < LAYERS // 4
    for at in ((1, 4096), (2, 256), (3, 1024), (17, 777), (64, 4096)):
        assert agrees(found, at), at
    assert found is not None
    assert [found.at(at, processor_of(H100)) for at in ((1, 255), (65, 512), (2, 4097))] == [None] * 3, "nothing is guessed outside"


def test_scratch_is_that_of_the_gpu_and_of_the_kernel_at_the_point() -> None:
    """The kernel sorts from 3,073 indices on: no polynomial has its bytes."""
    found = generalized(Inquiry.of(job()), Asked())

    assert found is not None
    for at in ((3, 1024), (2, 1537)):
        answer = found.at(at, Processor(7, 2048))
        assert answer is not None
        expected = [scratch_bytes(embedding(*at), Processor(7, 2048))] * (at[0] * at[1] > 3072)
        assert [each.bytes for each in answer.events if each.subject == SCRATCH and each.bytes > 0] == expected


def test_at_one_length_batches_are_told_apart_by_three() -> None:
    ask = Asked()

    found = generalized(Inquiry.of(job()), ask, [640])

    assert len(ask.layers) == 4
    assert agrees(found, (40, 640))
    assert found is not None
    assert found.at((40, 704), processor_of(H100)) is None


def test_an_answer_at_one_point_has_each_kind_of_layer_once() -> None:
    ask = Asked()

    found = folded(Inquiry.of(job(1, 640)), ask)

    assert found is not None
    assert len(ask.layers) == 2
    assert len(found.pieces[0].steps) < found.events // 2
    assert agrees(found, (1, 640))
    assert [found.at(at, processor_of(H100)) for at in ((2, 640), (1, 641))] == [None] * 2


def test_what_was_recorded_in_bf16_answers_in_fp16_where_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_bf16, in_fp16 = Inquiry.of(job(3, 1024)), Inquiry.of(job(3, 1024, recipe="fp16-fp32-master"))
    found = generalized(in_bf16, Asked())
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    monkeypatch.setattr(shipped, "can_trace", lambda _: False)
    assert found is not None
    assert in_fp16.as_shipped == ((in_fp16.general, False), (in_bf16.general, True))

    assert not is_same_in_fp16(found, in_fp16, Asked(lambda batch, length: 512))
    shipped.general_file_of(in_bf16).write_bytes(found.packed())
    assert shipped.find_general(in_fp16) is None
    assert is_same_in_fp16(found, in_fp16, Asked())
    shipped.general_file_of(in_bf16).write_bytes(dataclasses.replace(found, is_that_of_fp16=True).packed())
    assert agrees(shipped.find_general(in_fp16), in_fp16.point)
    (only,) = Inquiry.of(job(3, 1024, recipe="fp32")).as_shipped
    assert only == (Inquiry.of(job(3, 1024, recipe="fp32")).general, False)


def test_lengths_that_are_laid_out_in_another_way_are_left_to_be_recorded() -> None:
    def padded(batch: int, length: int) -> int:
        return batch * length * (-length % 8)

    found = generalized(Inquiry.of(job()), Asked(padded))

    assert agrees(found, (5, 1088), extra=padded)
    assert found is not None
    assert found.at((5, 1088 + 8), processor_of(H100)) is None


@pytest.mark.parametrize(
    "extra",
    [lambda batch, length: 512 * (length > 1500), lambda batch, length: length**3, lambda batch, length: 512 * (batch > 4)],
    ids=["a step in the length", "a third power", "a step in the batch"],
)
def test_what_does_not_agree_is_no_answer(extra: EXTRA) -> None:
    found = generalized(Inquiry.of(job()), Asked(extra))

    assert not agrees(found, (5, 2048), extra=extra)
    assert found is None or found.at((5, 2048), processor_of(H100)) is None


def test_a_window_that_the_configuration_names_parts_the_lengths() -> None:
    def windowed(batch: int, length: int) -> int:
        return batch * 4096 * (length > 2048)

    inquiry = Inquiry.of(job(sliding_window=2048))
    found = generalized(inquiry, Asked(windowed))

    assert found is not None
    for at in ((5, 2048), (1, 2112), (9, 3000)):
        answer = found.at(at, processor_of(H100))
        assert answer is not None
        assert answer.events == recorded(job(*at), windowed).events


def test_lengths_are_multiples_whatever_the_window_is() -> None:
    """Else all that are recorded after a window of 2047 are 7 above a multiple of 8, and padding to
    8 looks like none."""

    def padded(batch: int, length: int) -> int:
        return batch * length * (-length % 8)

    found = generalized(Inquiry.of(job(sliding_window=2047)), Asked(padded))

    assert found is not None
    for at in ((5, 3008), (5, 3009), (1, 4032), (4, 1024)):
        answer = found.at(at, processor_of(H100))
        assert answer is None or answer.events == recorded(job(*at), padded).events
    assert found.at((5, 3008), processor_of(H100)) is not None


def test_what_is_packed_comes_out_again() -> None:
    found = generalized(Inquiry.of(job()), Asked())
    assert found is not None

    again = General.unpacked(found.packed())

    assert again.packed() == found.packed()
    assert agrees(again, (7, 999))
    for broken in (b"", found.packed()[:-9], found.packed()[4:]):
        with pytest.raises(InputError, match="not a signature"):
            General.unpacked(broken)


def test_an_answer_is_found_at_its_point_by_another_process_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path))
    store.forget()
    inquiry = Inquiry.of(job())
    found = generalized(inquiry, Asked(), [512])
    assert found is not None
    store.keep_general(inquiry, found)
    store.forget()

    answer = store.find(Inquiry.of(job(31, 512)))
    assert answer is not None
    assert answer.events == recorded(job(31, 512)).events
    assert store.find(Inquiry.of(job(31, 513))) is None
    assert store.find(Inquiry.of(job(31, 512, gpu="a100-80gb"))) is None, "another generation runs other kernels"
    assert store.clear() == 1
    store.forget()


def test_what_is_found_out_later_is_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path))
    store.forget()
    for length in (512, 640):
        inquiry = Inquiry.of(job(2, length))
        found = generalized(inquiry, Asked(), [length])
        assert found is not None
        store.keep_general(inquiry, found)
    store.forget()

    assert all(store.find(Inquiry.of(job(9, length))) for length in (512, 640))
    (listed,) = store.entries()
    assert (listed.about, listed.parameters) == ("a net, other batches and lengths, bf16", LAYERS * WIDTH**2)
    assert abs(listed.events - len(recorded(job()).events)) <= 2
    store.forget()


def test_a_model_whose_layers_are_not_alike_is_recorded_whole() -> None:
    """Where folding fails, all layers are recorded at every point, and still confirm each other."""

    class Growing(Asked):
        def __call__(self, inquiries: Sequence[Inquiry]) -> dict[str, Signature]:
            answers = super().__call__(inquiries)
            return {digest: _grown(signature) for digest, signature in answers.items()}

    ask = Growing()
    found = generalized(Inquiry.of(job()), ask, [512])

    assert ask.layers[-3:] == [LAYERS] * 3
    assert found is not None
    answer = found.at((9, 512), processor_of(H100))
    assert answer is not None
    assert answer.events == _grown(recorded(job(9, 512))).events


def _grown(signature: Signature) -> Signature:
    events = [each._replace(bytes=each.bytes + index) if each.kind == "compute" else each for index, each in enumerate(signature.events)]
    return dataclasses.replace(signature, events=tuple(events))


class Passes(Asked):
    """A session that counts what it records."""

    def record(self, inquiries: Sequence[Inquiry], on_progress: object = None) -> dict[str, Signature]:
        return self(inquiries)

    def answer(self, inquiries: Sequence[Inquiry], on_progress: object) -> None:
        for each, signature in zip(inquiries, self(inquiries).values(), strict=True):
            store.keep(each, signature.packed())


def test_how_far_all_is_known_is_told() -> None:
    everywhere, here = generalized(Inquiry.of(job()), Asked()), generalized(Inquiry.of(job()), Asked(), [512])

    assert everywhere is not None
    assert here is not None
    assert (everywhere.reach((1, 512), 0), everywhere.reach((3, 512), 1)) == (64, 4096)
    assert (here.reach((1, 512), 0), here.reach((2, 512), 1), here.reach((2, 513), 0)) == (64, 512, 2)


def test_a_search_records_a_handful_of_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = Passes()
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path))
    monkeypatch.setattr(recording, "_session", lambda: session)
    store.forget()
    try:
        recording.record_for([job(1)], trace=True, quiet=True, searches=True)
        assert len(session.layers) == 1, "what is asked first is recorded as it is"
        assert all(store.find(Inquiry.of(job(batch))) for batch in (2, 3, 4, 8, 16, 32, 64))
        assert len(session.layers) == 1 + 4, "one through all layers, and three through a few"
        assert store.find(Inquiry.of(job(128))) is not None
        assert len(session.layers) == 1 + 4 + 1, "what lies outside is recorded"
        assert all(store.find(Inquiry.of(job(batch, length))) for batch in (1, 2, 64) for length in (256, 640, 1000, 4096))
        assert session.layers.count(LAYERS) == 3 + 2, "and for all lengths, two more through all layers"
        assert len(session.layers) < 30
    finally:
        store.trace_with(None)
        store.forget()


def test_what_ships_anew_is_told_apart_from_what_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("BF16PROF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(shipped, "FOLDER", tmp_path)
    script = importlib.import_module("signatures")

    def written(extra: EXTRA) -> bool:
        store.forget()
        store.clear()
        changed: bool = script._write_general("a net", Inquiry.of(job()), Passes(extra))
        return changed

    def more(batch: int, length: int) -> int:
        return 512 * batch

    assert not written(lambda batch, length: 0)
    assert "a net: new" in capsys.readouterr().out
    assert not written(lambda batch, length: 0)
    assert "changed" not in capsys.readouterr().out
    assert written(more)
    was, now = Event("memory", MADE, 2 * 256**2), Event("memory", MADE, 2 * 256**2 + 1024)
    assert f"a net: changed\n  2 x 256: event 2: {was} is {now} now" in capsys.readouterr().out
    store.forget()
