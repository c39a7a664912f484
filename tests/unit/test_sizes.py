"""Nothing that is allocated is below zero: not in the type, and not in what any source says of a
job."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import numpy
import pytest
import report_fixtures as fixtures
import torch
from torch import nn

from bf16prof.engine.attribution import attribute
from bf16prof.records import Item, MemoryRecord, OutOfMemory, Timeline, with_other
from bf16prof.vocabulary import Component, Device, Phase, Source

BELOW_ZERO: dict[str, Callable[[], object]] = {
    "item": lambda: Item(Component.OTHER, "x", -1),
    "component": lambda: made(allocated_bytes=9, components={Component.PARAMETERS: 10, Component.OTHER: -1}),
    "component without a total": lambda: made(components={Component.OTHER: -1}),
    "peak": lambda: made(peak_allocated_bytes=9, peak_components={Component.ACTIVATIONS: -1, Component.OTHER: 10}),
    "timeline": lambda: Timeline((0, 1), (), {Component.OTHER: (3, -1)}),
    "holder": lambda: OutOfMemory(Phase.STEP, 0, "x", 1, 1, 1, 1, {Component.OTHER: -1}),
}


def made(**fields: object) -> MemoryRecord:
    return MemoryRecord(Source.ESTIMATE, fixtures.case(), Device.CPU, 5, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", BELOW_ZERO)
def test_what_is_below_zero_cannot_be_made(what: str) -> None:
    with pytest.raises(ValueError, match=r": -1 bytes$"):
        BELOW_ZERO[what]()


def test_what_is_left_over_is_other() -> None:
    named = Item(Component.PARAMETERS, "p", 10)

    assert with_other([named], 10) == ((named,), None)
    items, doubt = with_other([named], 12)
    assert ([(item.component, item.bytes) for item in items], doubt) == ([(Component.PARAMETERS, 10), (Component.OTHER, 2)], None)


def test_too_much_that_is_named_is_said_and_not_taken_off() -> None:
    items, doubt = with_other([Item(Component.PARAMETERS, "p", 10)], 9)

    assert [(item.component, item.bytes) for item in items] == [(Component.OTHER, 9)]
    assert doubt == "components are not known: the engine holds 10 B of tensors, 9 B are allocated"


def test_memory_that_pytorch_did_not_allocate_is_not_counted() -> None:
    """The probes count PyTorch's allocators; NumPy's memory is in none of them."""

    module = nn.Linear(3, 5)
    module.register_buffer("table", torch.from_numpy(numpy.zeros(1000, dtype=numpy.float32)))
    engine = SimpleNamespace(module=module, optimizer=SimpleNamespace(), basic_optimizer=SimpleNamespace())

    items, on_host = attribute([engine], {}, "cpu")

    assert sum(item.bytes for item in items) == 4 * (15 + 5)
    assert on_host == []
