"""Plans against the dry run of the real engine: what is said to fit does, and the DeepSpeed JSON
that is written is the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_plans import draw, question

from bf16prof.cases import Selection, expand
from bf16prof.dry_run.runner import Options, simulate
from bf16prof.planning.answer import answer
from bf16prof.planning.judge import Judge
from bf16prof.planning.written import ds_config_text
from bf16prof.profiles.ds_config import read_ds_config
from bf16prof.profiles.load import Override, load_profile
from bf16prof.vocabulary import Device

pytestmark = pytest.mark.timeout(280)


@pytest.mark.parametrize("expandable", [False, True], ids=["default", "expandable segments"])
def test_what_is_said_to_fit_fits(expandable: bool) -> None:
    # GIVEN plans at the largest micro-batch that they say fits; `make plans` draws more
    drawn = draw(1, 6, expandable=expandable)

    # WHEN the real engine runs them dry on a GPU with as much memory
    records = simulate([each.job for each in drawn], options=Options(expandable_segments=expandable))

    # THEN none runs out of it
    for each, dry in zip(drawn, records, strict=True):
        assert each.plan.fits
        assert dry.out_of_memory is None, each.plan
        assert dry.device_bytes is not None
        assert dry.device_bytes <= each.room.memory_bytes


def test_the_written_config_is_the_plan(tmp_path: Path) -> None:
    # GIVEN the first choice, written as a DeepSpeed JSON
    asked = question("llama", "l4-24gb", "model.num_layers=2", "workload.sequence_length=256")
    first = answer(Judge(asked), 4, most=1).first
    assert first is not None
    path = tmp_path / "ds.json"
    path.write_text(ds_config_text(first))

    # WHEN it takes the place of the profile's DeepSpeed settings, and the engine is built from it
    file = read_ds_config(path)
    workload = [
        Override(f"workload.{key}", getattr(first.job.profile.workload, key), "test")
        for key in ("activation_checkpointing", "zero_init", "sequence_length")
    ]
    model = [Override("model", first.job.profile.model.model_dump(), "test")]
    profile = load_profile("cpu-demo", [*file.overrides, *model, *workload]).profile
    jobs = expand(Selection(profile, [file.stage], [4], [file.recipe], Device.GPU, asked.gpu, batch=file.batch))
    written, planned = simulate([jobs[0], first.job])

    # THEN the engine holds the same
    assert jobs[0].case.recipe == first.plan.case.recipe
    assert written.phases == planned.phases
    assert written.allocated_bytes == planned.allocated_bytes
