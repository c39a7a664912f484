"""Streams and events where nothing runs behind the host: of the modelled GPU, and of a CPU that
stands for one."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any


class GpuStream:
    """A CUDA stream, as far as DeepSpeed uses one. Number 0 is the default stream."""

    _numbers = itertools.count(1)

    def __init__(self, *_: Any, number: int | None = None, **__: Any) -> None:
        self.number = next(self._numbers) if number is None else number

    def wait_stream(self, _: GpuStream) -> None:
        """Order work after another stream's."""

    def wait_event(self, _: GpuEvent) -> None:
        """Order work after an event."""

    def synchronize(self) -> None:
        """Wait for the stream."""

    def record_event(self, event: GpuEvent | None = None) -> GpuEvent:
        """An event at this point of the stream."""
        return event or GpuEvent()


class GpuEvent:
    """A CUDA event; everything has happened already."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, _: GpuStream | None = None) -> None:
        """Mark a point of a stream."""

    def wait(self, _: GpuStream | None = None) -> None:
        """Order work after this event."""

    def query(self) -> bool:
        """Whether it has happened."""
        return True

    def synchronize(self) -> None:
        """Wait for it."""

    def elapsed_time(self, _: GpuEvent) -> float:
        """Milliseconds between two events."""
        return 0.0


class HostAccelerator:
    """Streams, events and the cache of a CPU, which has none."""

    Stream, Event = GpuStream, GpuEvent

    def __init__(self) -> None:
        self._stream = GpuStream(number=0)

    def synchronize(self) -> None:
        """Kernels are done when they return."""

    def empty_cache(self) -> None:
        """The CPU's allocator caches nothing."""

    def current_stream(self) -> GpuStream:
        """The only one."""
        return self._stream

    def default_stream(self) -> GpuStream:
        """The only one."""
        return self._stream

    def stream(self, _: Any) -> contextlib.AbstractContextManager[None]:
        """Nothing changes in this block."""
        return contextlib.nullcontext()
