"""Names that people type: what counts as the same, what is found by a part, and what is
suggested."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bf16prof.errors import InputError
from bf16prof.models.shapes import families, inventory
from bf16prof.profiles.load import load_profile, parse_set
from bf16prof.profiles.names import did_you_mean, is_same, matches, named, nearest
from bf16prof.profiles.recipes import all_recipes, find_recipe

ROWS = {"qwen2.5-7b": 1, "qwen2-57b": 2, "gpt2-xl": 3}
OTHERS = {1: ("Qwen/Qwen2.5-7B",), 2: (), 3: ()}


def find(typed: str, *, partly: bool = False) -> int:
    return named("model", typed, ROWS, OTHERS.__getitem__, partly=partly)


@pytest.mark.parametrize(
    ("typed", "row"),
    [
        ("qwen2.5-7b", 1), ("Qwen2.5_7B", 1), ("qwen 2.5 7b", 1), ("qwen2_5-7b", 1), ("qwen25-7b", 1), ("QWEN/qwen2.5-7b", 1),
        ("qwen2-57b", 2), ("Qwen2 57B", 2), ("GPT2XL", 3), ("gpt-2-xl", 3),
    ],
)  # fmt: skip
def test_letter_case_and_punctuation_do_not_count(typed: str, row: int) -> None:
    assert find(typed) == row


@pytest.mark.parametrize("typed", ["qwen-257-1b", "qwen2-5b", "", " ", "-", "qwen2.5-7b-instruct"])
def test_numbers_are_not_taken_apart_elsewhere(typed: str) -> None:
    with pytest.raises(InputError, match="unknown model"):
        find(typed)


def test_a_part_of_a_name_is_enough_only_where_that_is_wanted_and_one_row_has_it() -> None:
    assert find("xl", partly=True) == 3
    with pytest.raises(InputError, match="unknown model 'xl'"):
        find("xl")
    with pytest.raises(InputError, match="model 'q' may be any of 2") as caught:
        named("model", "q", {"q-1": 1, "q-2": 2}, partly=True)
    assert caught.value.hint == "did you mean q-1, q-2?"


def test_a_name_without_any_mark_is_asked_back_where_it_may_be_two() -> None:
    with pytest.raises(InputError, match="model 'qwen257b' may be any of 2"):
        find("qwen257b")


def test_the_exact_key_wins_over_all_that_look_like_it() -> None:
    assert matches("a-b", {"a-b": ("a-b",), "ab": ("ab",)}) == ["a-b"]
    assert matches("A B", {"a-b": ("a-b",), "ab": ("ab",)}) == ["a-b", "ab"]


@pytest.mark.parametrize(
    ("typed", "first"),
    [
        ("bf16-ful", "bf16-full"),
        ("bf16full", "bf16-full"),
        ("fp16-master", "fp16-fp32-master"),
        ("megatron", "megatron-bf16"),
        ("kahan", "bf16-kahan"),
    ],
)
def test_an_unknown_recipe_is_answered_with_the_nearest(typed: str, first: str) -> None:
    if len(matches(typed, {id_: (id_,) for id_ in all_recipes()})) == 1:
        assert find_recipe(typed).id == first
        return
    with pytest.raises(InputError, match=f"unknown recipe '{typed}'") as caught:
        find_recipe(typed)
    assert first in caught.value.hint.partition("?")[0]


@pytest.mark.parametrize(("typed", "near"), [("gpt-2", "gpt2"), ("lama", "llama"), ("transformer", "transformer-postln")])
def test_an_unknown_family_is_answered_with_the_nearest(typed: str, near: str) -> None:
    assert near in families()
    model = load_profile("gpt2-xl", [parse_set(f"model.family='{typed}'")]).profile.model
    with pytest.raises(InputError, match=r"model\.family: unknown family") as caught:
        inventory(model)
    assert caught.value.hint.startswith(f"did you mean {near}")


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("modle.x", "model"), ("model.hiddensize", "hidden_size"), ("workload.seq_length", "sequence_length"),
        ("deepspeed.zero_optimization.reduce_bucket", "reduce_bucket_size"), ("optimizer.learning_rat", None),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_nearest(key: str, near: str | None) -> None:
    with pytest.raises(InputError, match="unknown key") as caught:
        load_profile("gpt2-xl", [parse_set(f"{key}=1")])
    assert (f"(did you mean {near}" in caught.value.message) is (near is not None)
    assert "; expected one of " in caught.value.message


def test_nothing_near_is_no_question() -> None:
    assert nearest("zzz", ["alpha", "beta"]) == []
    assert did_you_mean([]) == ""


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_being_the_same_is_symmetric_and_survives_any_text(one: str, other: str) -> None:
    assert is_same(one, other) == is_same(other, one)
    assert matches(one, {"a-1": ("a-1",)}, partly=True) in ([], ["a-1"])
    assert set(nearest(one, ["a-1", "b-2"])) <= {"a-1", "b-2"}
