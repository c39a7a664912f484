"""The unit of the closed form: one kind of tensor that DeepSpeed, PyTorch or the training loop allocates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bf16prof.records import Component


@dataclass(frozen=True)
class Allocation:
    """Storages of one kind: their component, their name, the bytes of each, where they live, and who allocates them."""

    component: Component
    name: str
    sizes: tuple[int, ...]
    source: str
    on_host: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all its storages."""
        return sum(self.sizes)


def allocation(component: Component, name: str, sizes: int | Iterable[int], source: str, *, on_host: bool = False) -> Allocation:
    """An `Allocation` of one size or of several."""
    return Allocation(component, name, (sizes,) if isinstance(sizes, int) else tuple(sizes), source, on_host)
