"""ZeRO-3 between two steps: which parameters are gathered when, and where their gradients go.

An emulator of DeepSpeed's coordinator (zero/partitioned_param_coordinator.py), which decides in
elements of whole parameters, and of the reduce buckets of zero/stage3.py. From the second step on
the order of modules is known and parameters are prefetched; see `forget` for the first one. What
depends on the number of ranks in more than padding is left to `Meter.resolve`. References are to
DeepSpeed 0.19.8, `deepspeed/runtime/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bf16prof.closed_form.engine import FP64_BYTES
from bf16prof.closed_form.leaves import Leaves
from bf16prof.closed_form.passes import Handler, Meter
from bf16prof.closed_form.strategy import Launched, Strategy
from bf16prof.engine.labels import ALL_GATHER_BUCKETS, GATHERED_PARAMETERS, GRADIENT_NORM, REDUCE_SCATTER_BUFFER
from bf16prof.models.autograd.events import GRADIENT, ParameterKey
from bf16prof.rounding import ceil_div, round_up

if TYPE_CHECKING:
    from bf16prof.closed_form.gather_settings import GatherSettings

NEVER = -(10**10)


@dataclass(eq=False)
class GatheredParameter:
    """The memory of one gathered parameter: its bytes, and how many views of it autograd holds."""

    bytes: int
    pins: int = 0
    is_released: bool = False


@dataclass(eq=False)
class Handle:
    """`MultipleAllGatherHandles`: parameters that are gathered together, by the bytes of an element
    they are sent in."""

    keys: Sequence[ParameterKey]
    flat: tuple[int, ...]
    waiting: int
    is_complete: bool = False


@dataclass
class Reducing:
    """`IPGBucket` of one communication dtype: the gradients in it and those too large for it, in
    bytes."""

    keys: list[ParameterKey] = field(default_factory=list)
    elements: int = 0
    large: int = 0
    cast: int = 0


class Gathers(Strategy):
    """The state of every parameter, and the memory that follows from it."""

    def __init__(
        self,
        meter: Meter,
        numels: Mapping[ParameterKey, int],
        *,
        itemsizes: Mapping[ParameterKey, int],
        communication: Mapping[ParameterKey, int],
        owned: Mapping[ParameterKey, Sequence[ParameterKey]],
        trace: Sequence[ParameterKey],
        order: Sequence[ParameterKey],
        settings: GatherSettings,
        leaves: Leaves | None = None,
    ) -> None:
        """`itemsizes`: bytes of an element of each parameter when it is gathered, `communication`
        when its gradient is reduced; `owned`: parameters of each module; `trace`: modules as they
        run; `order`: the parameters as they were cut (`ds_id`); `leaves`: the modules among them
        that are taken as one."""
        self._meter, self._numels, self._owned, self._settings = meter, numels, owned, settings
        self._itemsizes, self._communication = itemsizes, communication
        self._leaves = leaves
        ids = {key: index for index, key in enumerate(order)}
        self._order = [(key, step) for step, module in enumerate(trace) for key in sorted(owned.get(module, ()), key=ids.__getitem__)]
        self._ranking = {key: (itemsizes[key], ids[key]) for key in numels}
        self._uses: dict[ParameterKey, list[int]] = {}
        self._distance = [0]
        for step, module in enumerate(trace):
            for key in owned.get(module, ()):
                self._uses.setdefault(key, []).append(step)
            direct = () if leaves is not None and module in leaves.modules else owned.get(module, ())
            self._distance.append(self._distance[-1] + sum(numels[key] for key in direct))
        self._available: dict[ParameterKey, GatheredParameter] = {key: GatheredParameter(0) for key in settings.persistent}
        self._handles: dict[ParameterKey, Handle] = {}
        self._active: dict[ParameterKey, set[ParameterKey]] = {}
        self._entered: dict[ParameterKey, None] = {}
        self._pins: dict[Any, GatheredParameter] = {}
        self._buckets: dict[int, Reducing] = {}
        self._decisions: dict[tuple[ParameterKey, int], frozenset[ParameterKey]] = {}
        self._is_recording = False
        # in the first step other parameters are gathered together: where some stay later, or a
        # module has several
        self.differs_at_first = not self.is_free and (bool(settings.persistent) or any(len(keys) > 1 for keys in owned.values()))
        self.start()

    @property
    def is_free(self) -> bool:
        """Whether gathered parameters are their partitions: on one rank nothing is copied
        (`NoGatherHandle`)."""
        return self._settings.world_size == 1 and not self._settings.on_host

    def handlers(self) -> dict[str, Handler]:
        """Nothing is gathered where gathered parameters are their partitions."""
        if self.is_free:
            return super().handlers()
        return super().handlers() | {
            "fetch": self.fetch,
            "fetch backward": self.fetch_backward,
            "release": self.release,
            "release backward": self.release_backward,
            "pin": self.pin,
            "unpin": self.unpin,
        }

    def forget(self) -> None:
        """The very first micro-step: not even persistent parameters are gathered, and the order of
        modules is yet to be recorded."""
        self._available.clear()
        self._is_recording = True

    def start(self, *, is_boundary: bool = True) -> None:
        """`reset_step`: a forward pass begins. What is still in flight is released."""
        for key, handle in list(self._handles.items()):
            self._wait(key, handle)
            self._release(key)
        self._step = self._live = self._next = 0
        self.launched = Launched()
        self._is_boundary = is_boundary
        self._fetched: dict[ParameterKey, int] = {}

    def fetch(self, module: ParameterKey, _: int = 0) -> None:
        """`fetch_sub_module`: gather and wait for the module's parameters, then gather ahead."""
        keys = self._owned.get(module, ())  # none of most modules: this runs a million times in a search
        if keys:
            if missing := [key for key in keys if key not in self._available and key not in self._handles]:
                self._gather(missing)
            for key in keys:
                self._active.setdefault(key, set()).add(module)
                if (handle := self._handles.get(key)) is not None:
                    self._wait(key, handle)
        if not self._is_recording:
            if keys:
                self._skip(keys)
            if self._settings.prefetch_bucket > 0:
                self._prefetch()
        self._step += 1

    def fetch_backward(self, module: ParameterKey, _: int = 0) -> None:
        """The same in backward."""
        self._entered[module] = None
        self.fetch(module)

    def release(self, module: ParameterKey, _: int = 0) -> None:
        """`release_sub_module`."""
        if module not in self._owned:
            return
        free = None if self._is_recording else self._free_to_go(module)
        for key in self._owned[module]:
            self._active.get(key, set()).discard(module)
            if free is None or key in free:
                self._release(key)

    def release_backward(self, module: ParameterKey, _: int = 0) -> None:
        """The same in backward."""
        self.release(module)
        self._entered.pop(module, None)

    def pin(self, subject: tuple[ParameterKey, Any], _: int = 0) -> None:
        """Autograd holds a view of a parameter."""
        key, number = subject
        memory = self._available.get(key, GatheredParameter(0))
        memory.pins += 1
        self._pins[number] = memory

    def unpin(self, subject: tuple[ParameterKey, Any], _: int = 0) -> None:
        """Autograd lets go of it."""
        memory = self._pins.pop(subject[1])
        memory.pins -= 1
        if memory.is_released and not memory.pins:
            self._meter.give(GATHERED_PARAMETERS, memory.bytes)

    def ready(self, key: ParameterKey, size: int) -> None:
        """`reduce_independent_p_g_buckets_and_remove_grads`: a gradient goes into the bucket, or
        waits if it is too large."""
        numel, communication = self._numels[key], self._communication[key]
        limit = self._settings.reduce_bucket
        bucket = self._buckets.setdefault(communication, Reducing())
        if bucket.elements and bucket.elements + numel > limit:
            self._reduce(communication)
            bucket = self._buckets[communication]
        if self._settings.contiguous and bucket.elements + numel <= limit:
            self._meter.give(GRADIENT, size)
        else:
            bucket.large += size
            bucket.cast += numel * communication if size != numel * communication else 0
        bucket.keys.append(key)
        bucket.elements += numel

    def finish(self) -> None:
        """The end of backward: what is left in the buckets, and modules whose inputs needed no
        gradient (`release_backward_leftovers`)."""
        for communication in list(self._buckets):
            self._reduce(communication)
        while self._entered:
            module, _ = self._entered.popitem()
            for key in self._owned.get(module, ()):
                self._active.get(key, set()).discard(module)
                if key not in self._settings.persistent:
                    self._release(key)
        self._is_recording = False

    def release_all(self) -> None:
        """`release_and_reset_all`: the step begins."""
        self._active.clear()
        for key, handle in list(self._handles.items()):
            self._wait(key, handle)
        for key in list(self._available):
            self._release(key)

    def _gather(self, keys: Sequence[ParameterKey]) -> None:
        """`all_gather_coalesced`, in the order of the model and by dtype."""
        numels, settings, meter = self._numels, self._settings, self._meter
        keys = sorted(keys, key=self._ranking.__getitem__) if len(keys) > 1 else keys
        self.launched.gathered.append((meter.phase, tuple(keys)))
        for key in keys:
            self._live += numels[key]
        world, flat = settings.world_size, []
        if world == 1 and settings.on_host:  # `NoGatherHandle` copies at once
            meter.take(GATHERED_PARAMETERS, *(numels[key] * settings.itemsize for key in keys))
        for itemsize in self._sorted_itemsizes(keys) if world > 1 else ():
            mine = [key for key in keys if self._itemsizes[key] == itemsize]
            flat.append(sum([-(-numels[key] // world) for key in mine]) * world * itemsize)
            is_parameter = len(keys) == 1 and itemsize == settings.itemsize
            meter.take(GATHERED_PARAMETERS if is_parameter else ALL_GATHER_BUCKETS, flat[-1])
            if settings.copies:
                meter.touch(ALL_GATHER_BUCKETS, flat[-1])
            if itemsize != settings.itemsize or settings.on_host:
                self._pass_on(mine, itemsize)
        handle = Handle(keys, tuple(flat), len(keys))
        for key in keys:
            self._handles[key] = handle

    def _sorted_itemsizes(self, keys: Sequence[ParameterKey]) -> list[int]:
        """The bytes of an element in which they are sent."""
        return sorted({self._itemsizes[key] for key in keys}) if len(keys) > 1 else [self._itemsizes[keys[0]]]

    def _pass_on(self, keys: Sequence[ParameterKey], itemsize: int) -> None:
        """What is sent of each parameter is a copy of its partition, from the host or in another
        dtype, until all is sent."""
        is_cast, on_host = itemsize != self._settings.itemsize, self._settings.on_host
        sent: list[int] = []
        most: list[int] = []
        for key in keys:
            sent.append(self._numels[key] * itemsize)
            now = [*sent, self._numels[key] * self._settings.itemsize] if is_cast and on_host else sent
            most = list(now) if sum(now) > sum(most) else most
        self._meter.share(ALL_GATHER_BUCKETS, *most)

    def _wait(self, key: ParameterKey, handle: Handle) -> None:
        """The first wait makes every parameter of the bucket available; the bucket goes when all
        have been waited for."""
        del self._handles[key]
        if not handle.is_complete:
            handle.is_complete = True
            for each in handle.keys:
                self._available[each] = GatheredParameter(self._copy(each, len(handle.keys) == 1))
        handle.waiting -= 1
        if not handle.waiting and not (len(handle.keys) == 1 and self._itemsizes[key] == self._settings.itemsize):
            self._meter.give(ALL_GATHER_BUCKETS, *handle.flat)

    def _copy(self, key: ParameterKey, is_alone: bool) -> int:
        numel, itemsize, sent, world = self._numels[key], self._settings.itemsize, self._itemsizes[key], self._settings.world_size
        if world == 1:
            return numel * itemsize if self._settings.on_host else 0
        if is_alone and sent == itemsize:
            return round_up(numel, world) * itemsize
        if sent != itemsize and not is_alone:
            self._meter.take(ALL_GATHER_BUCKETS, numel * sent)
        self._meter.take(GATHERED_PARAMETERS, numel * itemsize)
        if sent != itemsize and not is_alone:
            self._meter.give(ALL_GATHER_BUCKETS, numel * sent)
        return numel * itemsize

    def _release(self, key: ParameterKey) -> None:
        if key in self._available and key not in self._handles and not self._active.get(key):
            memory = self._available.pop(key)
            memory.is_released = True
            self._live -= self._numels[key]
            if not memory.pins:
                self._meter.give(GATHERED_PARAMETERS, memory.bytes)

    def _skip(self, keys: Sequence[ParameterKey]) -> None:
        """What is needed now leaves the queue of parameters to prefetch."""
        wanted = {key for key in keys if self._fetched.get(key, NEVER) < self._step}
        seen: set[ParameterKey] = set()
        while self._next < len(self._order) and len(seen) < len(wanted):
            key, step = self._order[self._next]
            self._next += 1
            self._fetched[key] = step
            seen.add(key)

    def _prefetch(self) -> None:
        limit = min(self._settings.max_live - self._live, self._settings.prefetch_bucket)
        if limit <= 0 or self._next == len(self._order):
            return
        chosen: dict[ParameterKey, None] = {}
        numel = 0
        order, fetched = self._order, self._fetched
        while self._next < len(order) and numel < limit:
            key, step = order[self._next]
            self._next += 1
            fetched[key] = max(fetched.get(key, NEVER), step)
            if key not in chosen and key not in self._available and key not in self._handles:
                chosen[key] = None
                numel += self._numels[key]
        if chosen:
            self._gather(list(chosen))

    def _free_to_go(self, module: ParameterKey) -> frozenset[ParameterKey]:
        """`__params_to_release`: not persistent, not skipped by a prefetch, not used again soon.
        DeepSpeed remembers its decisions."""
        known = (module, self._step)
        if known not in self._decisions:
            keys = self._owned.get(module, ())
            self._decisions[known] = frozenset(
                key
                for key in keys
                if key not in self._settings.persistent and self._fetched.get(key, NEVER) <= self._step and not self._is_reused(key, module)
            )
        return self._decisions[known]

    def _is_reused(self, key: ParameterKey, module: ParameterKey) -> bool:
        if self._leaves is not None and module in self._leaves.modules:
            return self._leaves.is_reused(key, self._step, self._settings.max_reuse_distance)
        following = next((step for step in self._uses[key] if step >= self._step), None)
        if following is None:
            return False
        return self._distance[following] - self._distance[self._step] < self._settings.max_reuse_distance

    def _reduce(self, communication: int) -> None:
        """`__reduce_and_partition_ipg_grads`."""
        bucket = self._buckets.pop(communication, Reducing())
        if not bucket.keys:
            return
        self.launched.reduced.append(tuple(bucket.keys))
        numels = [self._numels[key] for key in bucket.keys]
        if self._settings.contiguous and not self._settings.scatters and bucket.elements <= self._settings.reduce_bucket:
            self._reduce_whole(bucket.elements, max(numels), communication)
        else:
            self._scatter(numels, bucket.cast, communication)
        self._meter.give(GRADIENT, bucket.large)
        self._buckets[communication] = Reducing()

    def _reduce_whole(self, elements: int, largest: int, itemsize: int) -> None:
        """`__avg_scatter_contiguous_grads`: what has been reduced in the bucket is multiplied into
        a copy, and cast in another."""
        meter, gradient = self._meter, self._settings.gradient
        copy = elements * itemsize if self._settings.world_size > 1 else 0
        cast = elements * gradient if itemsize != gradient else 0
        meter.take(REDUCE_SCATTER_BUFFER, copy, cast)
        meter.give(REDUCE_SCATTER_BUFFER, copy if cast else 0)
        if self._settings.offloads:
            meter.share(GRADIENT_NORM, largest * gradient, largest * FP64_BYTES * self._is_boundary)
        meter.give(REDUCE_SCATTER_BUFFER, cast or copy)

    def _scatter(self, numels: Sequence[int], unsent: int, itemsize: int) -> None:
        """`__avg_scatter_grads` and `reduce_scatter_coalesced`. `unsent`: bytes of gradients that
        are cast before they are put together."""
        meter, world, gradient = self._meter, self._settings.world_size, self._settings.gradient
        in_place = len(numels) == 1 and numels[0] % world == 0
        flat = 0 if in_place else sum(round_up(numel, world) for numel in numels) * itemsize
        padding = 0 if in_place else sum(padding_bytes(numel, world, itemsize, meter.block) for numel in numels)
        meter.take(REDUCE_SCATTER_BUFFER, unsent, padding, flat)
        meter.give(REDUCE_SCATTER_BUFFER, padding)
        if self._settings.copies:
            meter.touch(REDUCE_SCATTER_BUFFER, flat or sum(numels) * itemsize)
        cast = sum(numels) * gradient if itemsize != gradient else 0
        meter.share(REDUCE_SCATTER_BUFFER, cast)
        meter.give(REDUCE_SCATTER_BUFFER, unsent, flat if cast else 0)
        if self._settings.offloads:
            meter.share(GRADIENT_NORM, cast, max(numels) * gradient, max(numels) * FP64_BYTES * self._is_boundary)
        meter.give(REDUCE_SCATTER_BUFFER, 0 if cast else flat)


def padding_bytes(numel: int, world: int, itemsize: int, block: int) -> int:
    """What stands in for the pieces of a gradient that ranks lack, one tensor each, in whole blocks
    (`reduce_scatter_coalesced`)."""
    piece = ceil_div(numel, world)
    count, rest = divmod(piece * world - numel, piece)
    return count * round_up(piece * itemsize, block) + round_up(rest * itemsize, block)
