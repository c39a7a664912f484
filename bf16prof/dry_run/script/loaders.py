"""Data loaders of a dry-run script: they run in this process, without workers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.data import DataLoader, dataloader

from bf16prof.dry_run.script.tracker import ScriptTracker
from bf16prof.engine.nested import tensors_in
from bf16prof.scripts.face.module import Row

LEFT_OUT = {"num_workers": 0, "pin_memory": False, "persistent_workers": False, "prefetch_factor": None, "multiprocessing_context": None}
"""What a loader is told instead: worker processes would have to make tensors of this world."""

HAD_WORKERS = "_bf16prof_had_workers"


def replacements(tracker: ScriptTracker) -> Iterator[Row]:
    """All that is replaced. What workers make lies in shared memory, which no allocator counts."""
    real_init, real_iter = DataLoader.__init__, DataLoader.__iter__
    signature = inspect.signature(real_init)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments
        given.pop("self")
        object.__setattr__(self, HAD_WORKERS, bool(given.get("num_workers")))
        real_init(self, **{**given, **LEFT_OUT})

    def iterate(self: Any) -> Any:
        inner = real_iter(self)
        return _Uncounted(inner, tracker) if getattr(self, HAD_WORKERS, False) else inner

    yield DataLoader, "__init__", init
    yield DataLoader, "__iter__", iterate


class _Uncounted(dataloader._BaseDataLoaderIter):
    """An iterator whose tensors are in nobody's allocator."""

    def __init__(self, inner: Any, tracker: ScriptTracker) -> None:
        self._inner, self._tracker = inner, tracker

    def __iter__(self) -> Any:
        return self

    def __len__(self) -> int:
        return len(self._inner)

    def __next__(self) -> Any:
        with _disable_current_modes():
            batch = next(self._inner)
        self._tracker.leave_out(tensors_in(batch))
        return batch
