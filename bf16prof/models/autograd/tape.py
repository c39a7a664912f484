"""A miniature of PyTorch's autograd that allocates nothing: what a model's forward and backward
pass keep, and when they let go.

A model family writes its forward pass with the operators of `operators.py`. Storages end when
nobody holds them any more, exactly as in PyTorch, because Python's own reference counts decide it
here as well; the graph is run backwards in PyTorch's order (`torch/csrc/ autograd/engine.cpp`: the
node that was recorded last goes first). What comes out is a list of events: storages that begin and
end, gradients that are ready, modules that are entered and left, operations that matrix products
take.
"""

from __future__ import annotations

import contextlib
import heapq
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bf16prof.models.autograd.events import BEFORE, GRADIENT, NO_LAYER, RECOMPUTED, Event, ParameterKey, SectionKey
from bf16prof.reductions import USUAL_PROCESSOR, Processor
from bf16prof.vocabulary import Component, Label

LOCAL = 2
"""`sys.getrefcount` of what one variable (or attribute) holds alone: that one and the call's
argument."""
LAST = 1 << 60
"""Gradients of parameters are entered as soon as they are there (`sequence_nr` of `AccumulateGrad`,
accumulate_grad.h)."""


@dataclass(frozen=True)
class Precision:
    """The dtypes of a forward pass: bytes of a parameter, and of autocast's dtype (0: no autocast);
    whether the half precision is fp16.

    `has_fp32_islands`: CUDA's autocast runs norms and softmax in fp32, a CPU's does not.
    """

    parameter: int
    autocast: int = 0
    is_fp16: bool = False
    has_fp32_islands: bool = True


class Storage:
    """Memory of one tensor; its end is an event."""

    __slots__ = ("_events", "bytes", "label")

    def __init__(self, events: list[Event], size: int, label: Label) -> None:
        self._events, self.bytes, self.label = events, size, label
        events.append(Event("memory", label, size))

    def __del__(self) -> None:
        if self.bytes:
            self._events.append(Event("memory", self.label, -self.bytes))


class Pin:
    """A view of a gathered parameter (ZeRO-3): holds the parameter's memory even when DeepSpeed
    lets go of it."""

    __slots__ = ("_events", "_number", "_parameter")
    bytes = 0

    def __init__(self, events: list[Event], number: int, parameter: Parameter) -> None:
        self._events, self._number, self._parameter = events, number, parameter
        events.append(Event("pin", (parameter.key, number), 0))

    def __del__(self) -> None:
        self._events.append(Event("unpin", (self._parameter.key, self._number), 0))


STRIDED, VIEWABLE, CONTIGUOUS = range(3)
"""How the elements lie in memory: a view in another shape has to copy them; it has not, but a
matrix product has; in order."""


class Tensor:
    """A tensor: its storage, elements, bytes per element, the node that made it, and how its
    elements lie in memory.

    `is_view`: not the tensor that the storage was made for. PyTorch's views hold that one, and so a
    second time the storage.
    """

    __slots__ = ("__weakref__", "is_view", "itemsize", "layout", "node", "numel", "slot", "storage")

    def __init__(
        self, storage: Any, numel: int, itemsize: int, node: GraphNode | None = None, slot: int = 0, *, layout: int = CONTIGUOUS
    ) -> None:
        self.storage, self.numel, self.itemsize, self.node, self.slot, self.layout = storage, numel, itemsize, node, slot, layout
        self.is_view = True

    @property
    def bytes(self) -> int:
        """Bytes of its elements."""
        return self.numel * self.itemsize

    def view(self) -> Tensor:
        """The same elements and history."""
        return Tensor(self.storage, self.numel, self.itemsize, self.node, self.slot, layout=self.layout)


class Parameter(Tensor):
    """A parameter of the model; its memory is the engine's business."""

    __slots__ = ("key",)

    def __init__(self, tape: Tape, key: ParameterKey, numel: int, itemsize: int) -> None:
        super().__init__(None, numel, itemsize)
        self.key = key
        self.node = GraphNode(LAST, _accumulate(tape, key), (), (), ((numel, itemsize),))


Run = Callable[["GraphNode", list[Any]], Sequence[Any]]


class GraphNode:
    """A function of the graph: who gets its gradients, in how many elements of what size, what it
    saved, and how it computes them."""

    __slots__ = ("__weakref__", "edges", "run", "saved", "sequence", "sizes")

    def __init__(
        self,
        sequence: int,
        run: Run,
        saved: tuple[Any, ...],
        edges: tuple[tuple[GraphNode, int] | None, ...],
        sizes: tuple[tuple[int, int], ...],
    ) -> None:
        self.sequence, self.run, self.saved, self.edges, self.sizes = sequence, run, saved, edges, sizes

    def unpack(self) -> list[Any]:
        """What was saved, recomputed where checkpointing dropped it."""
        return [each.unpack() if isinstance(each, RecomputedTensor) else each for each in self.saved]


def _accumulate(tape: Tape, key: ParameterKey) -> Run:
    def run(_: GraphNode, grads: list[Any]) -> Sequence[Any]:
        grad: Tensor = grads[0]
        tape.hand_over(grad, key)
        return ()

    return run


class StopRecomputation(Exception):
    """Everything that backward needs of a checkpointed layer has been recomputed
    (`torch.utils.checkpoint`, early stop)."""


class RecomputedTensor:
    """Stands for a saved tensor of a checkpointed layer (`_Holder`)."""

    __slots__ = ("__weakref__", "frame", "value")

    def __init__(self, frame: Frame) -> None:
        self.frame = frame
        self.value: Tensor | None = None

    def unpack(self) -> Tensor:
        """The tensor, which is handed out once."""
        if not self.frame.is_recomputed:
            self.frame.recompute()
        value, self.value = self.value, None
        assert value is not None, "unpacked twice"
        return value


class Frame:
    """A checkpointed layer: its function and its input, and what its recomputation saved
    (`checkpoint.py`, _CheckpointFrame)."""

    def __init__(self, tape: Tape, function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
        self._tape, self._function, self._inputs = tape, function, inputs
        self._held: list[weakref.ref[RecomputedTensor]] = []
        self._seen = 0
        self.is_recomputed = False

    def pack(self, _: Tensor) -> RecomputedTensor:
        """Forward: drop the tensor."""
        held = RecomputedTensor(self)
        self._held.append(weakref.ref(held))
        return held

    def _repack(self, tensor: Tensor) -> None:
        """Recomputation: give the tensor to whoever stands for it."""
        held = self._held[self._seen]()
        self._seen += 1
        if held is not None:
            held.value = self._tape.detached(tensor)
        if self._seen == len(self._held):
            raise StopRecomputation

    def recompute(self) -> None:
        """Run the layer again, up to the last tensor that was saved."""
        self.is_recomputed = True
        hooks, cache, outer = self._tape.pack, self._tape.casts, self._tape.is_recomputing
        self._tape.pack, self._tape.casts, self._tape.is_recomputing = self._repack, {}, True
        with contextlib.suppress(StopRecomputation):
            self._function(*self._inputs)
        self._tape.pack, self._tape.casts, self._tape.is_recomputing = hooks, cache, outer


class Tape:
    """Records a forward pass and runs it backwards."""

    def __init__(
        self,
        precision: Precision,
        *,
        zero3: bool = False,
        memory_efficient_linear: bool = True,
        processor: Processor = USUAL_PROCESSOR,
    ) -> None:
        self.processor = processor
        self.precision = precision
        self.zero3 = zero3
        """Whether modules have ZeRO-3's hooks."""
        self.zero3_linear = zero3 and memory_efficient_linear
        """Whether linear layers are DeepSpeed's (`zero/linear.py`)."""
        self.events: list[Event] = []
        self.phase = "forward"
        self.pack: Callable[[Tensor], Any] | None = None
        self.casts: dict[ParameterKey, Tensor] = {}
        """Autocast's cache of weights."""
        self.layer = NO_LAYER
        self.is_recomputing = False
        self._kept: list[Tensor] = []
        self._section: int | str = BEFORE
        self._sequence = self._pins = 0
        self._labels: dict[tuple[str, str], Label] = {}
        self._parameters: dict[ParameterKey, Parameter] = {}
        self._waiting: dict[ParameterKey, int] = {}

    def new(self, numel: int, itemsize: int, operator: str, node: GraphNode | None = None, layout: int = CONTIGUOUS) -> Tensor:
        """A new tensor that `operator` makes."""
        made = Tensor(Storage(self.events, numel * itemsize, self._label(operator)), numel, itemsize, node, layout=layout)
        made.is_view = False
        return made

    def touch(self, size: int, operator: str) -> None:
        """Scratch memory of a kernel."""
        if size:
            label = (Component.WORKSPACE, f"scratch of {operator}")
            self.events += (Event("memory", label, size), Event("memory", label, -size))

    def compute(self, operations: int) -> None:
        """A matrix product runs; a multiplication and an addition are two operations."""
        self.events.append(Event("compute", RECOMPUTED if self.is_recomputing else self.phase, operations))

    def parameter(self, name: str, numel: int) -> Parameter:
        """A parameter of the layer that is running."""
        key = ParameterKey(self.layer, name)
        if key not in self._parameters:
            self._parameters[key] = Parameter(self, key, numel, self.precision.parameter)
        return self._parameters[key]

    def detached(self, tensor: Tensor) -> Tensor:
        """The same memory without history."""
        storage = self._pin(tensor) if isinstance(tensor, Parameter) else tensor.storage
        return Tensor(storage, tensor.numel, tensor.itemsize, layout=tensor.layout)

    def _pin(self, tensor: Tensor) -> Any:
        if not isinstance(tensor, Parameter) or not self.zero3:
            return tensor.storage
        self._pins += 1
        return Pin(self.events, self._pins, tensor)

    def node(self, inputs: Sequence[Tensor | None], run: Run, *saved: Tensor | None) -> GraphNode | None:
        """The node of an operator, if any input needs a gradient. It saves its inputs before the
        operator runs."""
        if all(each is None or each.node is None for each in inputs):
            return None
        self._sequence += 1
        edges = tuple(None if each is None or each.node is None else (each.node, each.slot) for each in inputs)
        sizes = tuple((each.numel, each.itemsize) if each is not None else (0, 0) for each in inputs)
        node = GraphNode(self._sequence, run, (), edges, sizes)
        self.save(node, *saved)
        return node

    def save(self, node: GraphNode | None, *tensors: Tensor | None) -> None:
        """Save more for the node's backward: what the operator computed."""
        if node is not None and tensors:
            pack = self.pack
            node.saved += tensors if pack is None else tuple(pack(each) if each is not None else None for each in tensors)

    def mark(self, kind: str, subject: Any = None) -> None:
        """An event of the training loop or of a module."""
        self.events.append(Event(kind, subject, 0))

    def keep(self, tensor: Tensor, label: Label) -> None:
        """The training loop holds the tensor from now on, under the label of the variable that
        holds it."""
        self._kept.append(tensor)
        storage: Storage = tensor.storage
        self.events += (Event("memory", storage.label, -storage.bytes), Event("memory", label, storage.bytes))
        storage.label = label

    @contextlib.contextmanager
    def at_layer(self, layer: int) -> Iterator[None]:
        """Inside, modules and parameters are those of a layer."""
        outer, self.layer = self.layer, layer
        try:
            yield
        finally:
            self.layer = outer

    @contextlib.contextmanager
    def without_autocast(self) -> Iterator[None]:
        """Inside, nothing is cast (`ExcludeDispatchKeyGuard`)."""
        outer, self.precision = self.precision, replace(self.precision, autocast=0)
        try:
            yield
        finally:
            self.precision = outer

    def hand_over(self, grad: Tensor, key: ParameterKey) -> None:
        """The gradient of a parameter is there, and belongs to the engine from now on."""
        storage: Storage = grad.storage
        self.events += (Event("memory", storage.label, -storage.bytes), Event("memory", GRADIENT, storage.bytes))
        self.events.append(Event("gradient", key, storage.bytes))
        storage.bytes = 0

    def checkpoint(self, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """`torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`."""
        frame = Frame(self, function, inputs)
        outer, self.pack = self.pack, frame.pack
        try:
            return function(*inputs)
        finally:
            self.pack = outer

    def cut(self, x: Tensor, following: int | str) -> Tensor:
        """A section ends and the `following` one begins; in backward it is the other way round."""
        preceding, self._section = self._section, following
        self.mark("cut", SectionKey("forward", following))
        return self._alias(x, lambda: self.mark("cut", SectionKey("backward", preceding)))

    def module(self, name: str, forward: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        """Call a module: under ZeRO-3 with the hooks that fetch and release its parameters
        (`zero/parameter_offload.py`).

        `inputs` are the positional ones; hooks see no others.
        """
        if not self.zero3:
            return forward(*inputs)
        key = ParameterKey(self.layer, name)
        self.mark("fetch", key)
        self._waiting[key] = 0
        entered = []
        for each in inputs:
            self._waiting[key] += each.node is not None
            entered.append(self._alias(each, lambda: self._leave(key)))
        out = forward(*entered)
        self.mark("release", key)
        return self._alias(out, lambda: self.mark("fetch backward", key))

    def _leave(self, key: ParameterKey) -> None:
        self._waiting[key] -= 1
        if self._waiting[key] == 0:
            self.mark("release backward", key)

    def _alias(self, x: Tensor, when_backward: Callable[[], None]) -> Tensor:
        out = x.view()
        if x.node is None:
            return out

        def run(_: GraphNode, grads: list[Any]) -> Sequence[Any]:
            when_backward()
            return grads

        out.node, out.slot = self.node((x,), run), 0
        return out

    def _label(self, operator: str) -> Label:
        key = (operator, self.phase)
        if key not in self._labels:
            self._labels[key] = (Component.ACTIVATIONS, f"{operator} ({self.phase})")
        return self._labels[key]

    def backward(self, root: Tensor, grad: Tensor) -> None:
        """Run the graph from `root` with its gradient."""
        assert root.node is not None
        start: GraphNode = root.node
        missing = _dependencies(start)
        buffers: dict[GraphNode, list[Any]] = {start: [grad]}
        del grad
        root.node = None
        ready = [(-start.sequence, 0, start)]
        pushed = 0
        del start
        while ready:
            node = heapq.heappop(ready)[2]
            grads = buffers.pop(node)
            outputs = list(node.run(node, grads))
            for index in range(len(outputs)):
                if outputs[index] is not None:
                    outputs[index] = self._validated(outputs[index], *node.sizes[index]) if node.edges[index] else None
            del grads
            node.saved = ()
            for index, edge in enumerate(node.edges):
                if edge is None:
                    continue
                following = edge[0]
                self._receive(buffers.setdefault(following, []), edge[1], outputs, index)
                missing[following] -= 1
                if missing[following] == 0:
                    pushed += 1
                    heapq.heappush(ready, (-following.sequence, pushed, following))

    def _validated(self, grad: Tensor, numel: int, itemsize: int) -> Tensor:
        """`validate_outputs`: a gradient in the shape and dtype of its input. It is summed where
        the input was repeated."""
        if grad.numel != numel:
            grad = self.new(numel, grad.itemsize, "sum")
        return grad if grad.itemsize == itemsize else self.new(numel, itemsize, "_to_copy", None, grad.layout)

    def _receive(self, buffer: list[Any], slot: int, outputs: list[Any], index: int) -> None:
        """`InputBuffer::add`: a second gradient is added to the first; in a new tensor where
        somebody else holds the first."""
        buffer += [None] * (slot + 1 - len(buffer))
        grad, outputs[index] = outputs[index], None
        if grad is None:
            return
        known, buffer[slot] = buffer[slot], None
        if known is None:
            buffer[slot] = grad
        elif not known.is_view and sys.getrefcount(known) <= LOCAL and sys.getrefcount(known.storage) <= LOCAL:
            buffer[slot] = known
        else:
            buffer[slot] = self.new(grad.numel, grad.itemsize, "add", None, known.layout)
            del known  # it goes before the one that was added to it


def _dependencies(start: GraphNode) -> dict[GraphNode, int]:
    """How many gradients each node waits for (`Engine::compute_dependencies`)."""
    missing: dict[GraphNode, int] = {start: 0}
    stack = [start]
    while stack:
        for edge in stack.pop().edges:
            if edge is None:
                continue
            if edge[0] in missing:
                missing[edge[0]] += 1
            else:
                missing[edge[0]] = 1
                stack.append(edge[0])
    return missing
