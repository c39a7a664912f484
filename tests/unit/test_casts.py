"""What lower precisions cannot hold: counted by hand at the ends of bf16's and fp16's ranges, added
up over ranks, and shown."""

from __future__ import annotations

import dataclasses
import math

import torch
from report_fixtures import bare_record, watched

from bf16prof.measuring.record import job_quality
from bf16prof.measuring.results import RankQuality, RankResult
from bf16prof.quality.casts import Casts, counted
from bf16prof.reports.casts_table import casts_table
from bf16prof.runs import Status
from bf16prof.vocabulary import Device

SMALLEST = {"bf16": 2.0**-133, "fp16": 2.0**-24}
"""The smallest numbers above zero: 2^-126 and 2^-14, with 7 and 10 bits below (IEEE 754)."""
LARGEST = {"bf16": (2 - 2.0**-7) * 2.0**127, "fp16": 65504.0}


def test_values_at_the_ends_of_the_ranges() -> None:
    """Half of the smallest number is a tie, which goes to zero; half of a step above the largest
    goes to infinity."""
    values = [0.0, 1.0, SMALLEST["fp16"], SMALLEST["fp16"] / 2, SMALLEST["bf16"] / 2, LARGEST["fp16"], 65520.0, math.inf, math.nan]
    found = counted(torch.tensor(values, dtype=torch.float64))

    assert found.values == 7, "those that are not finite were so before"
    assert found.zero == {"bf16": 1, "fp16": 2}
    assert found.infinite == {"bf16": 0, "fp16": 1}


def test_counts_add_up_over_ranks_and_become_shares() -> None:
    one = RankQuality(7, 1.0, {}, {"gradients": Casts(4, {"bf16": 0, "fp16": 2}, {"bf16": 0, "fp16": 0})})
    other = RankQuality(7, 1.0, {}, {"gradients": Casts(6, {"bf16": 1, "fp16": 3}, {"bf16": 0, "fp16": 1}), "weights": Casts()})

    ranks = [RankResult(number, 1, Status.FINISHED, Device.CPU, "cpu", quality=(each,)) for number, each in enumerate((one, other))]
    (step,) = job_quality(ranks)

    assert set(step.casts) == {"gradients"}, "of no values there are no shares"
    assert step.casts["gradients"].values == 10
    assert step.casts["gradients"].zero == {"bf16": 0.1, "fp16": 0.5}
    assert step.casts["gradients"].infinite == {"bf16": 0.0, "fp16": 0.1}


def test_the_table_has_a_row_for_each_kind_of_value() -> None:
    shares = Casts(8, {"bf16": 0, "fp16": 2}, {"bf16": 0, "fp16": 1}).shares
    assert shares is not None
    record = bare_record()
    seen = dataclasses.replace(record, quality=(dataclasses.replace(watched(), casts={"updates": shares}),))

    assert casts_table(record) is None
    assert casts_table(dataclasses.replace(record, quality=(watched(),))) is None
    found = casts_table(seen)
    assert found is not None
    assert found.headers[2:] == ("zero in bf16", "infinite in bf16", "zero in fp16", "infinite in fp16")
    assert [cell.text for cell in found.rows[0]] == ["updates", "8", "0.0000 %", "0.0000 %", "25.0000 %", "12.5000 %"]
