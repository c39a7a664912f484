"""ZeRO-3's leaf modules: those that DeepSpeed fetches and releases as one, with everything in them
(zero/leaf_module_config.py)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from bf16prof.models.autograd.events import ParameterKey


class Leaves:
    """Modules that are taken as one, with everything in them. To release one, DeepSpeed looks for
    its parameters in all of what follows, whole containers included; to release another, it finds
    nothing in them (`__params_to_release`, iter_params)."""

    def __init__(self, modules: Collection[ParameterKey], trace: Sequence[ParameterKey], numels: Mapping[ParameterKey, int]) -> None:
        self.modules = modules
        self._trace = trace
        known: dict[ParameterKey, int] = {}
        self._distance = [0]
        for module in trace:
            if module not in known:
                known[module] = sum(numel for key, numel in numels.items() if _holds(module, key))
            self._distance.append(self._distance[-1] + known[module])

    def is_reused(self, key: ParameterKey, step: int, limit: int) -> bool:
        """Whether a parameter comes again, from that step on, before so many elements have
        passed."""
        for following in range(step, len(self._trace)):
            if self._distance[following] - self._distance[step] >= limit:
                return False
            if _holds(self._trace[following], key):
                return True
        return False


def _holds(module: ParameterKey, key: ParameterKey) -> bool:
    """Whether a module has a parameter somewhere in it."""
    return not module.name or key.name.startswith(f"{module.name}.")
