"""Dataclasses whose methods come later are dataclasses, whatever is asked of them first."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
from collections.abc import Callable

import pytest

from bf16prof.lazy_dataclass import dataclass


def classes() -> tuple[type, type]:
    """A class and one that extends it, of which nothing has been asked."""

    @dataclass(frozen=True)
    class Size:
        bytes: int
        names: list[str] = dataclasses.field(default_factory=list, compare=False)

    @dataclass(frozen=True)
    class LabelledSize(Size):
        label: str = "none"

        def __repr__(self) -> str:
            return self.label

    return Size, LabelledSize


def unpickled(kind: type, **values: object) -> object:
    """An object of a class whose `__init__` nobody has called."""
    found: object = object.__new__(kind)
    found.__dict__.update(values)
    return found


FIRST_ASKED: dict[str, Callable[[type, type], object]] = {
    "init": lambda size, _: size(3).names == [],
    "init of a class that extends it": lambda _, labelled: labelled(3, label="x").bytes == 3,
    "fields": lambda size, _: [each.name for each in dataclasses.fields(size)] == ["bytes", "names"],
    "fields of a class that extends it": lambda _, labelled: [f.name for f in dataclasses.fields(labelled)] == ["bytes", "names", "label"],
    "is it a dataclass": lambda size, _: dataclasses.is_dataclass(size),
    "equal": lambda size, _: unpickled(size, bytes=1, names=[]) == unpickled(size, bytes=1, names=["x"]),
    "not equal": lambda size, _: unpickled(size, bytes=1, names=[]) != unpickled(size, bytes=2, names=[]),
    "hash": lambda size, _: hash(unpickled(size, bytes=1)) == hash(unpickled(size, bytes=1)),
    "text": lambda size, _: repr(unpickled(size, bytes=1, names=[])).endswith("Size(bytes=1, names=[])"),
    "its own text": lambda _, labelled: repr(unpickled(labelled, label="own")) == "own",
    "signature": lambda size, _: list(inspect.signature(size).parameters) == ["bytes", "names"],
    "signature of a class that extends it": lambda _, labelled: list(inspect.signature(labelled).parameters) == ["bytes", "names", "label"],
    "copy": lambda size, _: copy.copy(unpickled(size, bytes=1, names=[])) == size(1),
    "replace": lambda size, _: dataclasses.replace(unpickled(size, bytes=1, names=[]), bytes=2) == size(2),  # type: ignore[type-var]
    "places in a pattern": lambda size, _: vars(type(size(1)))["__match_args__"] == ("bytes", "names"),
}


@pytest.mark.parametrize("asked", FIRST_ASKED)
def test_a_class_is_a_dataclass_whatever_is_asked_first(asked: str) -> None:
    # GIVEN classes of which nothing has been asked; WHEN something is; THEN they answer as dataclasses do, and go on doing so
    size, labelled = classes()
    assert FIRST_ASKED[asked](size, labelled)
    assert size(5) == size(5)
    assert labelled(5) == labelled(5)
    assert labelled(5, label="x") != labelled(5)
    assert repr(labelled(5, label="x")) == "x"


def test_a_frozen_object_does_not_change_even_where_init_was_not_called() -> None:
    size, _ = classes()
    found = unpickled(size, bytes=1, names=[])
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.bytes = 2  # type: ignore[attr-defined]
    with pytest.raises(dataclasses.FrozenInstanceError):
        del found.bytes  # type: ignore[attr-defined]


def test_an_object_is_made_by_an_init_that_calls_the_one_of_its_dataclass() -> None:
    # GIVEN a class with an __init__ of its own, which asks the dataclass for its
    size, _ = classes()

    class Page(size):  # type: ignore[misc,valid-type]
        def __init__(self) -> None:
            super().__init__(4096)

    # WHEN it is the first that does; THEN it gets there
    assert Page().bytes == 4096


def test_a_class_with_slots_is_made_at_once() -> None:
    @dataclass(slots=True)
    class Block:
        bytes: int

    assert Block(1) == Block(1)
    assert not hasattr(Block(1), "__dict__")


def test_objects_of_the_package_survive_pickling_into_a_fresh_process() -> None:
    # GIVEN a record's item, pickled; WHEN its class has just been imported, as in a process that reads it first
    from bf16prof.records import Component, Item

    item = Item(Component.PARAMETERS, "weights", 512, "x.py")
    assert pickle.loads(pickle.dumps(item)) == item
