"""Formulas where they change: a bucket that is just full, a partition with padding, weight decay
that is coupled, updates of nothing.

Each number follows from DeepSpeed's or PyTorch's own code, or is what that code does here.
"""

from __future__ import annotations

import weakref
from itertools import accumulate, groupby, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jobs import job, profile
from torch.utils._python_dispatch import TorchDispatchMode

from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.gather_settings import GatherSettings
from bf16prof.closed_form.gathers import Gathers
from bf16prof.closed_form.gradients import (
    CAST,
    AccumulatedGradients,
    Accumulation,
    Flush,
    GradientReduction,
    Gradients,
    PartitionedGradients,
    Share,
)
from bf16prof.closed_form.optimizer import update
from bf16prof.closed_form.passes import Meter
from bf16prof.closed_form.training import step
from bf16prof.closed_form.wrappers import wrapper_of
from bf16prof.closed_form.wrappers.zero12 import Zero12Optimizer
from bf16prof.engine.labels import ALL_REDUCE_BUFFER, OPTIMIZER_TEMPORARIES, STEP_GRADIENTS
from bf16prof.models.autograd.events import GRADIENT, ParameterKey
from bf16prof.models.autograd.operators import embedding
from bf16prof.models.autograd.tape import Precision, Tape
from bf16prof.quality.update import measured_sums
from bf16prof.vocabulary import Component, Device, Phase

A, B, C = (ParameterKey(0, name) for name in "abc")


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_what_nobody_wanted_to_change_is_not_lost() -> None:
    """Of three values that stay as they are, one was to change."""
    sums = measured_sums(f64(3, 0, 0), f64(1, 1, 1), f64(1, 1, 1))

    assert (sums.intended, sums.lost, sums.lost_updates) == (1, 1, 1.0)


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of storages that operators make, and the highest of them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.highest = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id_ for id_, reference in self._seen.items() if reference() is not None}
        known |= {each.untyped_storage()._cdata for each in args if isinstance(each, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (storage := out.untyped_storage())._cdata not in known:
            self.live += storage.nbytes()
            self.highest = max(self.highest, self.live)
            self._seen[storage._cdata] = weakref.ref(storage)
            weakref.finalize(storage, self._gone, storage.nbytes())
        return out

    def _gone(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("decoupled", [False, True])
def test_temporaries_of_adam_are_those_of_pytorchs(decay: float, *, decoupled: bool) -> None:
    """The second step (moments exist), one parameter after the other (`foreach=False`)."""
    sizes = (4000, 9000, 6000)
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in sizes]
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    optimizer = kind(parameters, lr=1e-3, weight_decay=decay, foreach=False)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with Counting() as counting:
        optimizer.step()

    params = {"lr": 1e-3, "weight_decay": decay, "torch_adam": True, "foreach": False, "adam_w_mode": decoupled}
    block = {"type": "AdamW" if decoupled else "Adam", "params": params}
    engine = Engine.of(job(profile("cpu-demo", deepspeed__more={"optimizer": block}), 0, 1, "fp32", device=Device.CPU))
    meter = Meter(1)
    meter.begin(Phase.STEP)
    update(engine, meter, [4 * size for size in sizes])

    scalars = 64  # bias corrections are tensors of one element in some versions
    assert 0 <= counting.highest - meter.peaks[Phase.STEP].level <= scalars
    assert meter.held[OPTIMIZER_TEMPORARIES] == 0


@pytest.mark.parametrize(("rank", "flat"), [(0, False), (1, True)])
def test_a_partition_with_padding_is_copied_flat(rank: int, *, flat: bool) -> None:
    """zero/stage_1_and_2.py, get_flat_partition: one gradient that fills its partition is handed on
    as it is; one with padding is flattened with it. One parameter of 150 elements in two partitions
    of 100, in fp32 throughout."""
    engine = Engine.of(job(profile("cpu-demo", deepspeed__zero_optimization__compute_grad_norm=False), 1, 2, "fp32", device=Device.CPU))
    meter = Meter(1)

    meter.begin(Phase.STEP)

    Zero12Optimizer(engine).step_of(Share({A: (0, 150)}, 100, rank), meter)

    held = meter.peaks[Phase.STEP].held.get(STEP_GRADIENTS, 0)
    assert held == (4 * 100 if flat else 0)


def logged(bucket_size: int) -> list[tuple[Any, ...]]:
    """The buckets that three gradients of 60, 40 and 1 elements are reduced in."""
    numels = {A: 60, B: 40, C: 1}
    meter = Meter(1)
    meter.log = []
    how = GradientReduction(bucket_size, 1, True, 2, early=True, always=True)
    gradients = PartitionedGradients(meter, numels, dict.fromkeys(numels, 2), how)
    gradients.start(is_boundary=True)
    meter.begin(Phase.BACKWARD)
    for key, numel in numels.items():
        gradients.ready(key, 2 * numel)
    gradients.finish()
    return [moment.keys for moment in meter.log if isinstance(moment, Flush)]


@pytest.mark.parametrize(("size", "buckets"), [(101, [(A, B, C)]), (100, [(A, B), (C,)]), (99, [(A,), (B, C)])])
def test_a_bucket_may_be_just_full(size: int, buckets: list[tuple[Any, ...]]) -> None:
    """zero/stage_1_and_2.py, reduce_independent_p_g_buckets_and_remove_grads: `elements + numel >
    reduce_bucket_size` reduces first."""
    assert logged(size) == buckets


def test_pieces_of_a_large_gradient_are_reduced_when_they_are_more_than_a_bucket() -> None:
    """zero/stage_1_and_2.py, allreduce_and_scatter: `numel > numel_per_bucket`. Three pieces of 50
    elements, a bucket of 50."""
    assert list(Share({A: (0, 150)}, 50).chunks([A], 50)) == [(100, 2), (50, 1)]
    assert list(Share({A: (0, 150)}, 50).chunks([A], 49)) == [(50, 1), (50, 1), (50, 1)]
    assert list(Share({A: (0, 50), B: (50, 100)}, 50).chunks([B], 50)) == [(50, 1)], "of the second rank alone"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 12), st.integers(0, 3), st.integers(1, 20))
def test_partitions_and_chunks_hold_the_elements_that_lie_in_them(numels: list[int], partition: int, rank: int, bucket: int) -> None:
    """Element by element: the rank that owns it, and a slice for every run of elements of one
    rank."""
    spans = {ParameterKey(0, str(index)): span for index, span in enumerate(pairwise(accumulate(numels, initial=0)))}
    owners = {key: [element // partition for element in range(*span)] for key, span in spans.items()}
    share = Share(spans, partition, rank)

    assert share.parts == {key: ranks.count(rank) for key, ranks in owners.items() if rank in ranks}
    assert all(set(share.ranks(key)) == set(ranks) for key, ranks in owners.items())
    chunks, numel, slices = [], 0, 0
    for _, run in groupby(owner for ranks in owners.values() for owner in ranks):
        if numel > bucket:
            chunks.append((numel, slices))
            numel = slices = 0
        numel, slices = numel + len(list(run)), slices + 1
    assert list(share.chunks(list(spans), bucket)) == [*chunks, (numel, slices)]


@pytest.mark.parametrize(
    ("size", "buckets", "copied"), [(100, [(A, B)], 200), (99, [(A,), (B,)], 200), (60, [(A,), (B,)], 200), (59, [(A,), (B,)], 80)]
)
def test_stage_3s_bucket_may_be_just_full(size: int, buckets: list[tuple[Any, ...]], copied: int) -> None:
    """zero/stage3.py: `elements + ds_numel > reduce_bucket_size` reduces first, and `elements +
    numel <= reduce_bucket_size` is copied into the bucket, so that the gradient itself is gone."""
    numels = {A: 60, B: 40}
    two = dict.fromkeys(numels, 2)
    how = GatherSettings(2, 0, 10**9, 10**9, size, contiguous=True, itemsize=2, gradient=2, persistent=frozenset())
    meter = Meter(1)
    meter.begin(Phase.BACKWARD)
    gathers = Gathers(meter, numels, itemsizes=two, communication=two, owned={}, trace=[], order=list(numels), settings=how)
    for key, numel in numels.items():
        meter.take(GRADIENT, 2 * numel)
        gathers.ready(key, 2 * numel)

    assert sum(2 * numel for numel in numels.values()) - meter.held[GRADIENT] - _reduced(gathers, numels, size) == copied
    gathers.finish()
    assert gathers.launched.reduced == buckets
    assert meter.held[GRADIENT] == 0


def _reduced(gathers: Gathers, numels: dict[Any, int], size: int) -> int:
    """Bytes of gradients that were too large for the bucket and went when it was reduced."""
    return sum(2 * numels[key] for keys in gathers.launched.reduced for key in keys if numels[key] > size)


@pytest.mark.parametrize(("second", "launched"), [(2, [(A, B, C)]), (3, [(A, B), (C,)])])
def test_stage_0_reduces_when_it_has_more_than_so_many_elements(second: int, launched: list[tuple[Any, ...]]) -> None:
    """engine.py, allreduce_no_retain: `numel > MEMORY_OPT_ALLREDUCE_SIZE`, 500,000,000, looked at
    after each gradient."""
    numels = {A: 499_999_998, B: second, C: 1}
    gradients = Gradients(Meter(1), numels)
    gradients.start(is_boundary=True)
    gradients.meter.begin(Phase.BACKWARD)
    for key, numel in numels.items():
        gradients.ready(key, 2 * numel)
    gradients.finish()

    assert gradients.launched.reduced == launched
    assert gradients.meter.held[ALL_REDUCE_BUFFER] == 0


@pytest.mark.parametrize(
    ("immediate", "communication", "is_boundary", "highest", "left"),
    [
        (False, 4, True, 240 + 4 * 50, 240),
        (False, 2, True, 240 + 2 * 120, 240),
        (False, 2, False, 240 + 4 * 50, 240),
        (True, 2, True, 2 * 50 + 4 * 50, 0),
        (True, 4, True, 2 * 50 + 4 * 50, 0),
        (True, 3, True, 3 * 120, 0),
        (True, 3, False, 2 * 50 + 4 * 50, 0),
    ],
)
def test_bf16_optimizer_casts_each_gradient_to_add_it(
    *, immediate: bool, communication: int, is_boundary: bool, highest: int, left: int
) -> None:
    """bf16_optimizer.py, update_hp_grads, or accumulate_hp_grads_and_remove_lp as soon as it is
    there: `lp.grad.to(fp32)`; then engine.py, allreduce_bucket: the whole flat gradient in the
    communication dtype where that is not fp32, in the last micro-step.

    Three gradients of 50, 40 and 30 elements in bf16.
    """
    numels = {A: 50, B: 40, C: 30}
    meter = Meter(1)
    gradients = AccumulatedGradients(meter, numels, Accumulation(communication, immediate))
    gradients.start(is_boundary=is_boundary)
    meter.begin(Phase.BACKWARD)
    for key, numel in numels.items():
        meter.take(GRADIENT, 2 * numel)
        gradients.ready(key, 2 * numel)
    gradients.finish()

    peak = meter.peaks[Phase.BACKWARD]
    assert peak.level == highest
    assert {name: size for name, size in peak.held.items() if size and name != GRADIENT} in (
        {CAST: 4 * 50},
        {ALL_REDUCE_BUFFER: communication * 120},
    )
    assert meter.level == meter.held[GRADIENT] == left


def test_bf16_optimizer_updates_a_partition_in_fp32_and_lets_go_of_gradients() -> None:
    """bf16_optimizer.py, step, on two ranks: one tensor, half of the parameters in fp32, padded to
    two elements a rank; PyTorch's `foreach` makes denominators of its size (torch/optim/adam.py).
    `clear_lp_grads` lets go of the gradients in bf16."""
    more = {
        "deepspeed__data_types__grad_accum_dtype": "fp32",
        "optimizer__torch_adam": True,
        "optimizer__foreach": True,
        "optimizer__fused": False,
    }
    engine = Engine.of(job(profile("cpu-demo", **more), 1, 2, "bf16-fp32-master", device=Device.CPU))
    meter = Meter(1)
    gradients = AccumulatedGradients(meter, {A: 5, B: 10}, Accumulation(4, immediate=False))
    for key, size in ((A, 10), (B, 20)):
        meter.take(GRADIENT, size)
        gradients.ready(key, size)

    step(wrapper_of(engine), meter, gradients)

    padded = sum(spec.numel for spec in engine.parameters) + 3 & ~3
    assert meter.peaks[Phase.STEP].held == {GRADIENT: 30, OPTIMIZER_TEMPORARIES: 4 * padded // 2}
    assert repr((meter.ends[Phase.STEP], meter.held[GRADIENT])) == "(0, 0)"


def test_the_unfused_step_leaves_nothing() -> None:
    """fp16/unfused_optimizer.py, step: the copies in fp32 go after the update, and so do the
    gradients."""
    engine = Engine.of(job(profile("cpu-demo", optimizer__torch_adam=True), 0, 1, "bf16-fp32-master", device=Device.CPU))
    meter = Meter(1)
    gradients = Gradients(meter, {A: 5, B: 10})
    for key, size in ((A, 10), (B, 20)):
        meter.take(GRADIENT, size)
        gradients.ready(key, size)

    step(wrapper_of(engine), meter, gradients)

    assert meter.held[GRADIENT] == meter.held[STEP_GRADIENTS] == meter.level == 0


IN_PIECES = (*[8 * 4000] * 5, 8 * 4400, 8, 8, 4 * 8 * 4400)


@pytest.mark.parametrize(("rows", "scratch"), [(3072, 0), (4000, sum(-(-size // 512) * 512 for size in IN_PIECES))])
def test_the_gradient_of_a_table_is_summed_in_pieces_of_ten_rows(rows: int, scratch: int) -> None:
    """cuda/EmbeddingBackwardKernel.cu, embedding_backward_cuda_kernel: `NROWS_PER_THREAD` is 10.

    4000 indices into a table of 50,257 rows of 8: three lists of indices as they are sorted, the
    segments' starts and their numbers (4000 each at most), the starts of 4000 / 10 + 4000 partial
    segments, and how many there are of both, all int64; the partial sums of these in fp32. Each is
    a block of the allocator's, of 512 bytes or a multiple.
    """
    tape = Tape(Precision(2))
    out = embedding(tape, tape.parameter("weight", 50_257 * 8), rows, 8)
    tape.backward(out, tape.new(rows * 8, 2, "ones_like"))

    label = (Component.WORKSPACE, "scratch of embedding_dense_backward")
    assert max((event.bytes for event in tape.events if event.subject == label), default=0) == scratch
