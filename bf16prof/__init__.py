"""bf16prof: predict, measure and reconcile the memory of DeepSpeed training::

    import bf16prof

    outcome = bf16prof.estimate("llama3.1-8b", gpus=8, gpu="h100", zero=3)
    outcome.records[0].peak_allocated_bytes

Each function is a command of the terminal; `bf16prof.api` documents them. They are imported when
somebody asks for them, so that `import bf16prof` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bf16prof.api import estimate as estimate
    from bf16prof.api import import_logs as import_logs
    from bf16prof.api import load as load
    from bf16prof.api import measure as measure
    from bf16prof.api import plan as plan
    from bf16prof.api import simulate as simulate
    from bf16prof.errors import Bf16profError as Bf16profError
    from bf16prof.measuring.script.watching import watch as watch

__version__ = "0.2.0"

_HOMES = {
    **dict.fromkeys(("estimate", "import_logs", "load", "measure", "plan", "simulate"), "bf16prof.api"),
    "Bf16profError": "bf16prof.errors",
    "watch": "bf16prof.measuring.script.watching",  # needs torch, as nothing else here does
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
