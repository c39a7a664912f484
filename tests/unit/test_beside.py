"""What lies beside the allocator: public messages, and the assumption that is taken from them."""

from __future__ import annotations

import pytest

from bf16prof.profiles.beside import beside_the_allocator, generation_of, pairs


def test_a_message_is_what_it_says() -> None:
    """PyTorch's message of an A100 with 40 GB: 14.25 GiB in use, 12.87 allocated, 912.01 MiB
    reserved beyond."""
    (pair,) = (pair for pair in pairs() if pair.gpu == "A100 40 GB")

    assert pair.beside_bytes == pytest.approx((14.25 - 12.87) * 2**30 - 912.01 * 2**20, abs=1)
    assert len(pairs()) >= 12
    assert all(0 < each.beside_bytes < 2 * 2**30 and each.source for each in pairs())
    assert all(each.process_gib <= each.total_gib for each in pairs() if each.total_gib)


@pytest.mark.parametrize(("capability", "generation"), [((7, 5), "Turing"), ((8, 0), "Ampere"), ((8, 9), "Ada"), ((12, 0), "Blackwell")])
def test_the_assumption_is_the_highest_of_a_generation(capability: tuple[int, int], generation: str) -> None:
    (context,) = beside_the_allocator(1, capability)

    assert generation_of(capability) == generation
    assert context.bytes == max(pair.beside_bytes for pair in pairs() if pair.generation == generation and pair.ranks == 1)
    assert f"{generation}, highest of" in context.source


def test_a_generation_without_a_message_takes_the_highest_of_all() -> None:
    (context,) = beside_the_allocator(1, (9, 0))

    assert context.bytes == max(pair.beside_bytes for pair in pairs() if pair.ranks == 1)
    assert "no public message of Hopper known" in context.source
    assert len(beside_the_allocator(2, (9, 0))) == 2
