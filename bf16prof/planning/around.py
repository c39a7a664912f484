"""The first choice at other micro-batches and sequence lengths: how far each can be taken before
the GPU is full."""

from __future__ import annotations

from bf16prof.closed_form.anatomy import is_written
from bf16prof.planning.answer import Answer
from bf16prof.planning.limits import LONGEST_SEQUENCE, free_judge
from bf16prof.planning.question import powers_of_two
from bf16prof.plans import Plan

_SHORTER, _LONGER = 2, 4
"""Doublings of the sequence to both sides of what is planned."""

_LARGEST = 32
"""Sequences of the largest micro-batch."""


def around(answer: Answer) -> tuple[Plan, ...]:
    """The first choice with and without activation checkpointing, at each micro-batch and length,
    as far as the model allows.

    What does not fit is judged by its peak alone. None where nothing fits, or where every length
    would be a pass of the model's own code to record.
    """
    first = answer.first
    if first is None or not is_written(first.job.profile):
        return ()
    limit = first.job.profile.model.longest_sequence
    longest, start = limit[1] if limit else LONGEST_SEQUENCE, first.setting
    halves = [start.sequence_length >> power for power in range(_SHORTER, 0, -1)]
    lengths = [n for n in (*halves, *(start.sequence_length << power for power in range(_LONGER + 1))) if 0 < n <= longest]
    free = free_judge(answer.judge, first)
    settings = [
        start.but(sequence_length=length, micro_batch_size=size, checkpointing=checkpointing)
        for checkpointing in (False, True)
        for length in lengths
        for size in powers_of_two(max(_LARGEST, start.micro_batch_size))
    ]
    judged = (free(setting) if free.may_fit(setting) else free.roughly(setting) for setting in settings)
    return tuple(found.plan for found in judged if found is not None)
