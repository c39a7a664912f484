"""bf16prof: predict, measure and reconcile the memory of DeepSpeed training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bf16prof.measure.script.watching import watch as watch

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`watch` is imported when somebody asks for it: it needs torch, and nothing else here does."""
    if name == "watch":
        from bf16prof.measure.script.watching import watch

        return watch
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
