"""The probe of a GPU, over a stand-in for PyTorch's allocator counters: what survives a reset of
them."""

from __future__ import annotations

import pytest
import torch

from bf16prof.measuring.probes.cuda import CudaProbe


class Counters:
    """`torch.cuda`'s counters of one device: what is held now, and the most since the last
    reset."""

    def __init__(self) -> None:
        self.allocated = self.reserved = self.most_allocated = self.most_reserved = 0

    def hold(self, allocated: int, reserved: int) -> None:
        self.allocated, self.reserved = allocated, reserved
        self.most_allocated, self.most_reserved = max(self.most_allocated, allocated), max(self.most_reserved, reserved)

    def reset(self) -> None:
        self.most_allocated, self.most_reserved = self.allocated, self.reserved


@pytest.fixture
def counters(monkeypatch: pytest.MonkeyPatch) -> Counters:
    found = Counters()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "stand-in")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: found.allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: found.most_allocated)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: found.reserved)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: found.most_reserved)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", found.reset)
    return found


def test_a_phase_ends_with_its_peak_and_the_run_keeps_the_highest(counters: Counters) -> None:
    probe = CudaProbe()
    counters.hold(900, 1000)
    counters.hold(100, 1000)
    assert probe.take_phase_peak() == 900
    counters.hold(300, 1000)
    assert (probe.take_phase_peak(), probe.run_peak_bytes()) == (300, 900)


def test_reserved_memory_that_was_given_back_counts(counters: Counters) -> None:
    """DeepSpeed empties the cache while it builds an engine (zero/stage_1_and_2.py)."""
    probe = CudaProbe()
    counters.hold(500, 2000)
    counters.hold(100, 200)
    assert probe.reserved_bytes() == 2000
    probe.take_phase_peak()
    counters.hold(150, 300)
    assert probe.reserved_bytes() == 2000
