"""Lost updates and effective descent quality: by hand, against optimizers in float64, and on real
optimizers' steps in bf16."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import pytest
import report_fixtures
import torch
from fake_ranks import DEEPSPEED_WARNINGS, build_engine, fake_ranks, step
from rich.console import Console
from torch import Tensor, nn

from bf16prof.documents import document
from bf16prof.engine.config import deepspeed_config, engine_facts
from bf16prof.files import write_json
from bf16prof.measuring.record import job_quality
from bf16prof.measuring.results import RankQuality, RankResult
from bf16prof.profiles.optimizers import all_optimizers
from bf16prof.profiles.schema import Profile
from bf16prof.quality import watch
from bf16prof.quality.owners import layer_of, owners
from bf16prof.quality.sums import Sums, total
from bf16prof.quality.update import AdamSettings, intended_update, measured_sums
from bf16prof.quality.watch import UpdateWatch
from bf16prof.records import Case, MemoryRecord
from bf16prof.reports.console import reconciliation
from bf16prof.reports.html import render
from bf16prof.reports.learning import learning, of_recipe
from bf16prof.reports.price_figure import price, states_per_parameter
from bf16prof.reports.tables import frame, to_markdown
from bf16prof.reports.views import run_views
from bf16prof.runs import Status, load_records
from bf16prof.step_records import QualityStep, UpdateQuality
from bf16prof.vocabulary import Component, Device, Source

pytestmark = DEEPSPEED_WARNINGS

HYPER = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# By hand.


def test_half_of_the_update_arrives() -> None:
    """Intended (3, 4, 0): the first is lost, the second arrives, what was not intended does not
    count: 16 of 25."""
    sums = measured_sums(f64(3, 4, 0), f64(1, 1, 1), f64(1, 5, 2))

    assert sums == Sums(elements=3, intended=2, lost=1, projected=16.0, square=25.0)
    assert (sums.lost_updates, sums.edq) == (0.5, 16 / 25)


def test_nothing_is_lost_where_everything_arrives_and_what_goes_backwards_is_negative() -> None:
    assert measured_sums(f64(1, -2), f64(5, 5), f64(6, 3)).edq == 1.0
    assert measured_sums(f64(1, -2), f64(5, 5), f64(4, 7)).edq == -1.0
    assert measured_sums(f64(0, 0), f64(5, 5), f64(5, 5)).edq is None
    assert measured_sums(f64(0, 0), f64(5, 5), f64(5, 5)).lost_updates is None


def test_what_is_not_finite_is_left_out() -> None:
    intended = torch.tensor([1.0, math.nan, 1.0, 2.0, math.inf], dtype=torch.float64)
    before, after = torch.zeros(5), torch.tensor([1.0, 1.0, math.inf, 1.0, 0.0])
    assert measured_sums(intended, before, after) == Sums(2, 2, 0, 3.0, 5.0)
    assert measured_sums(intended[1:2], before[:1], after[:1]) == Sums()


def test_bf16_loses_an_update_below_half_of_its_spacing() -> None:
    """Between 1 and 2 the bf16 numbers are 2^-7 apart: an update of 2^-9 is lost, one of 2^-7
    arrives."""
    before = torch.ones(2, dtype=torch.bfloat16)
    intended = f64(2**-9, 2**-7)
    sums = measured_sums(intended, before, (before.double() + intended).bfloat16())

    assert sums.lost_updates == 0.5
    assert sums.edq == pytest.approx(2**-14 / (2**-14 + 2**-18))


def test_sums_add_up_over_tensors_as_over_one() -> None:
    torch.manual_seed(0)
    intended, before = torch.randn(64, dtype=torch.float64), torch.randn(64).bfloat16()
    after = (before.double() + intended / 100).bfloat16()
    parts = [measured_sums(intended[s], before[s], after[s]) for s in (slice(0, 10), slice(10, 64))]
    whole = measured_sums(intended, before, after)

    together = total(parts)
    assert (together.elements, together.intended, together.lost) == (whole.elements, whole.intended, whole.lost)
    assert together.edq == pytest.approx(whole.edq)


def test_the_first_step_of_adam_by_hand() -> None:
    """Its moments are the gradient and its square: the step is the learning rate, whatever the
    gradient, and then the decay."""
    adam = AdamSettings(lr=0.1, beta1=0.9, beta2=0.99, eps=0.0, weight_decay=0.5, decoupled=True, step=1)

    assert intended_update(f64(2, 2), f64(5, -0.001), None, None, adam).tolist() == pytest.approx([-0.1 - 0.1, 0.1 - 0.1])


# Against PyTorch's optimizers on float64 parameters.


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_the_intended_update_is_what_pytorch_does_in_float64(kind: Any) -> None:
    torch.manual_seed(1)
    parameter = nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = kind([parameter], **HYPER)
    for number in range(1, 5):
        parameter.grad = torch.randn_like(parameter)
        state = optimizer.state.get(parameter, {})
        adam = AdamSettings(0.01, 0.8, 0.9, 1e-6, 0.1, decoupled=kind is torch.optim.AdamW, step=number)
        before = parameter.detach().clone()
        intended = intended_update(before, parameter.grad, state.get("exp_avg"), state.get("exp_avg_sq"), adam)
        optimizer.step()

        assert torch.allclose(parameter.detach() - before, intended, rtol=1e-9, atol=1e-15)


def watched(optimizer: Any, layout: str, parameter: nn.Parameter) -> UpdateWatch:
    """A watch on an optimizer without an engine around it."""
    model = SimpleNamespace(named_parameters=lambda: [("head.weight", parameter)], parameters=lambda: [parameter])
    return UpdateWatch(SimpleNamespace(basic_optimizer=optimizer, optimizer=optimizer, module=model), all_optimizers()[layout])


def library(layout: str, parameter: nn.Parameter, **changed: float) -> Any:
    from bf16prof.engine.client import make_client_optimizer
    from bf16prof.engine.config import OURS

    make = make_client_optimizer({"optimizer": {"type": "AdamW", "params": {**HYPER, **changed}}, OURS: {"optimizer": layout}})
    assert make is not None
    return make([parameter])


@pytest.mark.parametrize("layout", [layout.id for layout in all_optimizers().values() if layout.class_ and layout.is_adam])
def test_libraries_intend_what_we_compute(layout: str) -> None:
    """On fp32 parameters, where next to nothing is lost: counters, corrections and decay are read
    as each optimizer means them."""
    torch.manual_seed(2)
    parameter = nn.Parameter(torch.randn(300))
    optimizer = library(layout, parameter)
    watch = watched(optimizer, layout, parameter)
    for _ in range(4):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        (sums,) = watch.take().values()

        assert sums.edq == pytest.approx(1, abs=3e-4)
        assert (sums.elements, sums.lost) == (300, 0)


@pytest.fixture(scope="module")
def in_bf16() -> dict[str, Sums]:
    """Twenty small steps on bf16 parameters, the same gradients for every optimizer."""
    found = {}
    for layout in ("torch.optim", "fp32-states", "stochastic-rounding", "kahan"):
        torch.manual_seed(3)
        parameter = nn.Parameter(torch.randn(20000).bfloat16())
        plain = layout == "torch.optim"
        optimizer = torch.optim.AdamW([parameter], 1e-3, weight_decay=0) if plain else library(layout, parameter, lr=1e-3, weight_decay=0)
        watch = watched(optimizer, layout, parameter)
        generator = torch.Generator().manual_seed(4)
        for _ in range(20):
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
            optimizer.step()
        (found[layout],) = watch.take().values()
    return found


def test_bf16_alone_loses_updates_and_descent(in_bf16: dict[str, Sums]) -> None:
    for layout in ("torch.optim", "fp32-states"):
        assert in_bf16[layout].lost_updates > 0.3  # type: ignore[operator]
        assert in_bf16[layout].edq < 0.9  # type: ignore[operator]


def test_stochastic_rounding_loses_updates_but_no_descent(in_bf16: dict[str, Sums]) -> None:
    assert in_bf16["stochastic-rounding"].lost_updates > 0.3  # type: ignore[operator]
    assert in_bf16["stochastic-rounding"].edq == pytest.approx(1, abs=0.02)


def test_kahan_summation_loses_hardly_any(in_bf16: dict[str, Sums]) -> None:
    assert in_bf16["kahan"].edq == pytest.approx(1, abs=0.01)
    assert in_bf16["kahan"].lost_updates < in_bf16["torch.optim"].lost_updates / 3  # type: ignore[operator]


def test_a_sample_is_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SAMPLE", 100)
    parameter = nn.Parameter(torch.randn(1001))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    seen = watched(optimizer, "torch.optim", parameter)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    assert {name: sums.elements for name, sums in seen.take().items()} == {"head": 91}
    assert seen.take() == {}


# Whose elements.


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("layers.3.linear1.weight", "layers.3"),
        ("model.layers.11.mlp.weight", "model.layers.11"),
        ("head.weight", "head"),
        ("alpha", "alpha"),
    ],
)
def test_the_layer_of_a_parameter(name: str, layer: str) -> None:
    assert layer_of(name) == layer


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
"""Takes BF16_Optimizer."""

WRAPPERS = [
    (0, "fp32", {}),
    (0, "bf16-fp32-master", {}),
    (0, "bf16-kahan", {}),
    (1, "bf16-full", {}),
    (2, "bf16-stochastic-rounding", {}),
    (3, "bf16-fp32-master", {"sub_group_size": 300}),
    (3, "bf16-full", {}),
    (1, "bf16-fp32-master", FP32_SUMS),
]


@pytest.mark.parametrize("torch_adam", [True, False])
@pytest.mark.parametrize(("stage", "recipe", "zero"), WRAPPERS)
def test_every_element_that_a_rank_updates_has_a_layer(stage: int, recipe: str, zero: dict[str, Any], torch_adam: bool) -> None:
    # GIVEN an engine on one of three ranks
    with fake_ranks(3):
        settings = jobs.small_profile(**(zero if zero is not FP32_SUMS else {}))
        if zero is FP32_SUMS:
            settings = Profile.model_validate({**settings.model_dump(exclude_unset=True), "deepspeed": zero})
        settings = settings.model_copy(update={"optimizer": settings.optimizer.model_copy(update={"torch_adam": torch_adam})})
        job = jobs.job(settings, stage, 3, recipe, device=Device.CPU)
        engine = build_engine(job)
        layers = {layer_of(name): 0 for name, _ in engine.module.named_parameters()}
        numel = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())

        # WHEN a step of it is watched
        found = owners(engine)
        layout = engine_facts(deepspeed_config(job)).layout
        assert layout is not None
        seen = UpdateWatch(engine, layout)
        step(engine, job)
        sums = seen.take()
        engine.destroy()

    # THEN no two layers share an element, and rank 0 has its share of them, all of it at stage 0
    share = sum(span.numel for spans in found.values() for span in spans)
    for spans in found.values():
        ordered = sorted(spans, key=lambda span: span.start)
        assert all(a.start + a.numel <= b.start for a, b in pairwise(ordered))
    assert sum(s.elements for s in sums.values()) == share
    assert share == numel if stage == 0 else numel / 3 <= share <= numel / 3 + 50
    assert set(sums) <= set(layers)


# Over the ranks.


def test_the_ranks_of_a_case_add_up() -> None:
    def rank(number: int, *steps: RankQuality) -> RankResult:
        return RankResult(number, 1, Status.FINISHED, Device.CPU, "cpu", quality=steps)

    first = rank(0, RankQuality(5, 2.0, {"a": Sums(10, 8, 2, 3.0, 4.0)}), RankQuality(6, 2.0, {}))
    second = rank(1, RankQuality(5, 4.0, {"a": Sums(10, 2, 2, 1.0, 4.0), "b": Sums(5, 0, 0, 0.0, 0.0)}))

    (found,) = job_quality([first, second])

    assert (found.step, found.loss) == (5, 3.0)
    assert (found.total.elements, found.total.lost_updates, found.total.edq) == (25, 0.4, 0.5)
    assert (found.layers["a"].elements, found.layers["b"].edq) == (20, None)


# What is said of it.


def a_record(**changes: Any) -> MemoryRecord:
    case = Case("p", 0, 2, "bf16-pure")
    steps = tuple(
        QualityStep(index, 5.0 - index, UpdateQuality(100, lost, edq), {"head": UpdateQuality(100, lost, edq)})
        for index, (lost, edq) in enumerate([(0.2, 0.9), (0.3, 0.8)])
    )
    return MemoryRecord(Source.MEASURE, case, Device.CPU, 10, **{"quality": steps, **changes})


def test_what_a_recipe_costs_is_the_mean_over_the_watched_steps() -> None:
    found = learning(a_record())

    assert found is not None
    assert (found.steps, found.lost_updates, found.loss) == (2, 0.25, 4.0)
    assert found.edq == pytest.approx(0.85)
    assert found.text == "EDQ 0.8500, 25.00 % of updates lost, loss 4 (2 steps)"
    assert learning(a_record(quality=())) is None
    assert [text.case.recipe for text, _ in of_recipe([a_record(), a_record(quality=())], "bf16-pure")] == ["bf16-pure"]
    assert of_recipe([a_record()], "bf16-full") == []


def test_a_step_in_which_nothing_was_intended_says_so() -> None:
    nothing = QualityStep(0, None, UpdateQuality(3, None, None), {})

    found = learning(a_record(quality=(nothing,)))

    assert found is not None
    assert found.text == "no finite update was intended (1 step)"


def test_records_with_quality_survive_their_file(tmp_path: Path) -> None:
    write_json(tmp_path / "records.json", document([a_record()]))

    assert load_records(tmp_path / "records.json") == (a_record(),)


def test_a_case_is_a_point_of_its_bytes_and_its_descent() -> None:
    """Ten parameters in bf16 with two moments, and a buffer that is no state of the model: 6 bytes
    each."""
    sizes = {Component.PARAMETERS: 20, Component.MOMENTUM: 20, Component.VARIANCE: 20, Component.BUFFERS: 1000}
    record = a_record(components=sizes, allocated_bytes=1060)
    (view,) = run_views([report_fixtures.run([record])])

    drawn = price([view])

    assert states_per_parameter(record) == 6.0
    assert drawn is not None
    assert '"x":[6.0]' in drawn.spec
    assert '"y":[0.85' in drawn.spec
    assert '"text":["bf16-pure"]' in drawn.spec
    assert [name for name, _, _ in drawn.legend] == ["bf16-pure"]
    assert price([]) is None


def test_points_of_a_recipe_at_several_stages_are_told_by_a_legend() -> None:
    cases = [Case("demo", stage, 2, recipe) for stage in (1, 3) for recipe in ("bf16-full", "bf16-kahan")]
    weighed = a_record(components={Component.PARAMETERS: 20}, allocated_bytes=20)

    drawn = price(run_views([report_fixtures.run([dataclasses.replace(weighed, case=case) for case in cases])]))

    assert drawn is not None
    names = [(name, symbol, bool(colour)) for name, symbol, colour in drawn.legend]
    assert names == [("bf16-full", "●", True), ("bf16-kahan", "●", True), ("zero1-w2", "●", False), ("zero3-w2", "■", False)]
    assert '"text":["' not in drawn.spec


def test_every_format_tells_the_price(capsys: pytest.CaptureFixture[str]) -> None:
    run = report_fixtures.run([a_record(components={Component.PARAMETERS: 20}, allocated_bytes=20)])

    reconciliation([run], Console(width=120))

    told = re.compile(r"zero0-w2-bf16-pure[ |]+8[ |]+2[ |]+25.00 %[ |]+0.8500")
    assert told.search(capsys.readouterr().out)
    assert told.search(to_markdown([run]))
    row = frame([run]).iloc[0]
    assert (row["lost_updates"], row["edq"]) == pytest.approx((0.25, 0.85))
    assert "EDQ" not in to_markdown([report_fixtures.run()])


def test_the_report_shows_updates_by_layer_and_in_the_summary() -> None:
    page = render([report_fixtures.run([a_record(components={Component.PARAMETERS: 20}, allocated_bytes=20)])])

    assert "Updates by layer in step 1, measure" in page
    assert "Price in learning" in page
    assert ">25.00 %<" in page
    assert ">0.8500<" in page
