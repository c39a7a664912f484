"""ZeRO-3's leaf modules: those that DeepSpeed fetches and releases as one, with everything in them (zero/leaf_module_config.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from bf16prof.closed_form.gradients import Key

BLOCK = "block"
"""A layer itself, among its modules."""


class Leaves:
    """Modules that are taken as one, with everything in them. To release one, DeepSpeed looks for its parameters in all of what follows,
    whole containers included; to release another, it finds nothing in them (`__params_to_release`, iter_params)."""

    def __init__(
        self, modules: Collection[Key], trace: Sequence[Key], numels: Mapping[Key, int], holds: Callable[[Key, Key], bool]
    ) -> None:
        """`holds`: whether a module, the first, has a parameter somewhere in it."""
        self.modules = modules
        self._trace, self._holds = trace, holds
        known: dict[Key, int] = {}
        self._distance = [0]
        for module in trace:
            if module not in known:
                known[module] = sum(numel for key, numel in numels.items() if self._holds(module, key))
            self._distance.append(self._distance[-1] + known[module])

    def is_reused(self, key: Key, step: int, limit: int) -> bool:
        """Whether a parameter comes again, from that step on, before so many elements have passed."""
        for following in range(step, len(self._trace)):
            if self._distance[following] - self._distance[step] >= limit:
                return False
            if self._holds(self._trace[following], key):
                return True
        return False


def in_layers(root: str) -> Callable[[Key, Key], bool]:
    """Of keys by layer; `root`: the module outside of the layers that holds them."""

    def holds(module: Key, key: Key) -> bool:
        layer, name = module
        if layer < 0:
            return not name or (name == root and (key[0] >= 0 or key[1].startswith(f"{name}."))) or key == (-1, f"{name}.weight")
        return key[0] == layer and (name == BLOCK or key[1].startswith(f"{name}."))

    return holds


def by_name(module: Key, key: Key) -> bool:
    """Of keys with whole names."""
    return not module[1] or key[1].startswith(f"{module[1]}.")
