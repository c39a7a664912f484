"""Memory that CUDA's reductions (sums, means, norms) ask for: where few outputs are reduced from
much input, several blocks of threads work on one output, and leave their parts in global memory.

The launch configuration is that of `aten/src/ATen/native/cuda/Reduce.cuh` (`setReduceConfig`,
`global_memory_size`, `semaphore_size`, `AccumulationBuffer`) in PyTorch 2.13, which ships it as a
header. A bias' gradient is such a sum over all tokens: from 1,024 tokens on tens of MiB for a
moment. Sizes are in elements and bytes; nothing here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bf16prof.profiles.gpus import DEFAULT_MULTIPROCESSORS, Gpu
from bf16prof.rounding import ceil_div

WARP = 32
THREADS = 512
"""`MAX_NUM_THREADS` of a block."""
MIN_VALUES, MAX_VALUES = 16, 256
"""`min_values_per_thread`, `max_values_per_thread`."""
LONGEST_VECTOR = 4
LONGEST_32_BIT = 2**31 - 1


@dataclass(frozen=True)
class Processor:
    """A GPU as a reduction sees it: its multiprocessors, and how many threads each holds."""

    multiprocessors: int
    threads: int


def threads_per_multiprocessor(capability: tuple[int, int]) -> int:
    """`maxThreadsPerMultiProcessor` (CUDA C++ Programming Guide, technical specifications per
    compute capability)."""
    return {(7, 5): 1024, (8, 6): 1536, (8, 7): 1536, (8, 9): 1536, (12, 0): 1536, (12, 1): 1536}.get(capability, 2048)


USUAL_PROCESSOR = Processor(DEFAULT_MULTIPROCESSORS, 2048)
"""Where no GPU is named, or nothing but its memory is known."""


def processor_of(gpu: Gpu | None) -> Processor:
    """A GPU as a reduction sees it."""
    if gpu is None:
        return USUAL_PROCESSOR
    return Processor(gpu.multiprocessors or DEFAULT_MULTIPROCESSORS, threads_per_multiprocessor(gpu.compute_capability))


@dataclass(frozen=True)
class Reduction:
    """A reduction: extents and strides (in elements) of its input, which of them are reduced, and
    bytes per element.

    `accumulator`: bytes in which it is computed. `vector`: elements that a thread loads at once
    along the input. `accumulates_in_output`: whether parts of a long input may be added in the
    output itself; half precision may not.
    """

    shape: Sequence[int]
    strides: Sequence[int]
    reduced: Sequence[int]
    itemsize: int
    accumulator: int
    vector: int = 4
    accumulates_in_output: bool = True


def global_memory(reduction: Reduction, processor: Processor) -> tuple[int, ...]:
    """Bytes of the buffers that the reduction asks for at one time; none where a block computes an
    output alone."""
    if 0 in reduction.shape:
        return ()
    dims = _ordered(reduction)
    outputs = math.prod(size for size, _, is_reduced in dims if not is_reduced)
    if not _needs_splitting(dims, reduction.itemsize):
        return _parts(dims, reduction, processor)
    whole = () if reduction.accumulates_in_output else (outputs * reduction.accumulator,)
    while _needs_splitting(dims, reduction.itemsize):
        longest = max(range(len(dims)), key=lambda i: (dims[i][0] - 1) * dims[i][1])
        size, stride, is_reduced = dims[longest]
        dims[longest] = (size - size // 2, stride, is_reduced)
    return whole + _parts(dims, reduction, processor)


Dimension = tuple[int, int, bool]


def _ordered(reduction: Reduction) -> list[Dimension]:
    """`TensorIterator`: reduced dimensions first, each kind by stride; neighbours that are one in
    memory are joined."""
    dims = [
        (size, stride, index in reduction.reduced)
        for index, (size, stride) in enumerate(zip(reduction.shape, reduction.strides, strict=True))
        if size != 1
    ]
    joined: list[Dimension] = []
    for size, stride, is_reduced in sorted(dims, key=lambda each: (not each[2], each[1])):
        if joined and joined[-1][2] == is_reduced and joined[-1][0] * joined[-1][1] == stride:
            joined[-1] = (joined[-1][0] * size, joined[-1][1], is_reduced)
        else:
            joined.append((size, stride, is_reduced))
    return joined


def _needs_splitting(dims: Sequence[Dimension], itemsize: int) -> bool:
    """Not `can_use_32bit_indexing`."""
    extent = 1 + sum((size - 1) * stride * itemsize for size, stride, _ in dims)
    return max(extent, math.prod(size for size, _, _ in dims)) > LONGEST_32_BIT


def _parts(dims: Sequence[Dimension], reduction: Reduction, processor: Processor) -> tuple[int, ...]:
    """`setReduceConfig`: the buffer of the blocks' parts, and a counter for each output's
    blocks."""
    inner = [dim for dim in dims if dim[2]]
    outer = [dim for dim in dims if not dim[2]]
    inputs, outputs = math.prod(dim[0] for dim in inner), math.prod(dim[0] for dim in outer)
    along_input = not outer or (bool(inner) and inner[0][1] < outer[0][1])
    width, height = (inputs, outputs) if along_input else (outputs, inputs)
    lowest = (inner if along_input else outer)[0][1] if dims else 1
    vector = 1
    if lowest == 1 and along_input and width >= 128 and len(inner) == 1:
        width //= reduction.vector
    elif lowest == 1 and not along_input:
        vector = _output_vector(dims, outer[0])
        width //= vector
    block_x, block_y = _block(width, height, THREADS // vector)
    step_input, step_output = (block_x, 1) if along_input else (1, block_x)
    splits = ceil_div(inputs, step_input) >= min(block_y * MIN_VALUES, MAX_VALUES)
    step_input, step_output = (step_input * block_y, step_output) if splits else (step_input, step_output * block_y)
    grid = ceil_div(outputs // vector, step_output)
    target = processor.multiprocessors * (processor.threads // (block_x * block_y))
    values = ceil_div(inputs, step_input)
    if not splits or values < MAX_VALUES or grid > target:
        return ()
    blocks = max(min(ceil_div(target, grid), ceil_div(values, MIN_VALUES)), ceil_div(values, MAX_VALUES))
    if blocks == 1:
        return ()
    size = reduction.accumulator * outputs * blocks
    return (size if along_input else size * block_x * vector, 4 * grid)


def _output_vector(dims: Sequence[Dimension], first: Dimension) -> int:
    """`get_output_vec_size`; tensors begin at multiples of it."""
    vector = LONGEST_VECTOR
    for number in (first[0], *(stride for size, stride, kind in dims if (size, stride, kind) != first)):
        while number % vector:
            vector //= 2
    return vector


def _block(width: int, height: int, most: int) -> tuple[int, int]:
    """`set_block_dimension`."""
    x, y = (min(1 << (max(extent, 1).bit_length() - 1), _power_below(most)) for extent in (width, height))
    block_y = min(y, most // min(x, WARP))
    return min(x, most // block_y), block_y


def _power_below(number: int) -> int:
    return 1 << (number.bit_length() - 1)
