"""The unit of the closed form: one kind of tensor that DeepSpeed, PyTorch or the training loop
allocates."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bf16prof.vocabulary import Label


@dataclass(frozen=True)
class Storages:
    """Storages of one kind: what they are for, the bytes of each, where they live, and who
    allocates them."""

    label: Label
    sizes: tuple[int, ...]
    source: str
    on_host: bool = False

    @property
    def bytes(self) -> int:
        """Bytes of all its storages."""
        return sum(self.sizes)


def allocation(label: Label, sizes: int | Iterable[int], source: str, *, on_host: bool = False) -> Storages:
    """`Storages` of one size or of several."""
    return Storages(label, (sizes,) if isinstance(sizes, int) else tuple(sizes), source, on_host)
