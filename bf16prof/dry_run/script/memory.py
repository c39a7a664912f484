"""The modelled GPU's memory as the script's own calls of `torch.cuda` count it."""

from __future__ import annotations

from bf16prof.dry_run.ledger import Ledger


class LedgerMemory:
    """Reads a ledger; the peaks are those since the script reset them."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def allocated(self) -> int:
        """`memory_allocated`."""
        return self._ledger.allocated_bytes()

    def peak(self) -> int:
        """`max_memory_allocated`."""
        return self._ledger.open_peak

    def reserved(self) -> int:
        """`memory_reserved`."""
        return self._ledger.reserved_bytes()

    def peak_reserved(self) -> int:
        """`max_memory_reserved`."""
        return self._ledger.open_peak_reserved

    def reset_peaks(self) -> None:
        """`reset_peak_memory_stats`."""
        self._ledger.reset_open_peaks()
