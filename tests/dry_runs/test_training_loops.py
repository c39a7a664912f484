"""What a training loop keeps: no item below zero in jobs that are drawn, and a public measurement
of a loop that drops its outputs."""

from __future__ import annotations

import random
import re

import pytest
from drawn_cases import drawn_from

from bf16prof.cases import Job, Selection, expand
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.gap import peaks_gap
from bf16prof.closed_form.peaks import peaks
from bf16prof.closed_form.predict import predict
from bf16prof.closed_form.training import walked
from bf16prof.dry_run.runner import Options, simulate
from bf16prof.profiles.gpus import find_gpu
from bf16prof.profiles.load import Override, load_profile
from bf16prof.vocabulary import TRAINING, Device, Offload

pytestmark = pytest.mark.timeout(280)

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_items_of_every_phase_add_up_and_none_is_below_zero(seed: int) -> None:
    """An item below zero cannot be made (`records.Item`); the closed form once did in one of four
    jobs that accumulate."""
    drawn = drawn_from(random.Random(seed))
    for job in (next(drawn) for _ in range(100)):
        engine, record = Engine.of(job), predict(job)
        if peaks_gap(job, engine):
            continue
        found = peaks(job, engine, walked(job, engine), record.items)
        for phase in TRAINING:
            assert sum(item.bytes for item in found.items(phase)) == found.phases[phase].peak_bytes, job.case.label


def test_dry_runs_that_accumulate_name_all_that_is_alive_and_which_layer_allocated_it() -> None:
    drawn = drawn_from(random.Random(4))
    accumulating = [job for job in (next(drawn) for _ in range(12)) if job.profile.workload.gradient_accumulation_steps > 1][:3]

    for record in simulate(accumulating):
        assert not [note for note in record.notes if "components are not known" in note]
        assert sum(record.peak_components.values()) == record.peak_allocated_bytes
        assert record.timeline is not None
        happened = [(size, record.timeline.names[name]) for size, name in record.timeline.changes]
        in_layers = {name for size, name in happened if size > 0 and re.search(r"forward\), \S+\.\d+\.", name)}
        assert len(in_layers) > 5, "the forward pass allocates in modules of layers"
        assert not [name for _, name in happened if "optimizer state" in name and ", " in name], "the step runs no module"


def public_job(keeps_outputs: bool) -> Job:
    """Llama-3.1-8B, 32,000 tokens, ZeRO-3 on one H100, optimizer and parameters offloaded,
    checkpointing (snowflakedb/ArcticTraining)."""
    values = {
        "model.hf_config": LLAMA_8B, "workload.sequence_length": 32_000, "workload.activation_checkpointing": True,
        "workload.zero_init": True, "workload.keeps_outputs": keeps_outputs,
    }  # fmt: skip
    defaults = {f"deepspeed.zero_optimization.{key}": value for key, value in {
        "reduce_bucket_size": 500_000_000, "stage3_prefetch_bucket_size": 50_000_000, "stage3_param_persistence_threshold": 100_000,
    }.items()}  # fmt: skip
    profile = load_profile("llama3-8b", [Override(key, value, "test") for key, value in {**values, **defaults}.items()]).profile
    offload = Offload.OPTIMIZER_AND_PARAMETERS
    return expand(Selection(profile, [3], [1], ["bf16-fp32-master"], Device.GPU, find_gpu("h100-80gb"), offload))[0]


def test_a_public_loop_that_drops_its_outputs_holds_71_91_gib() -> None:
    """ArcticTraining's baseline at 32,000 tokens, by NVML, with expandable segments; logits in bf16
    are 7.64 GiB."""
    kept, dropped = simulate([public_job(True), public_job(False)], options=Options(expandable_segments=True))

    assert (dropped.device_bytes or 0) / GIB == pytest.approx(71.91, rel=0.02)
    assert (kept.device_bytes or 0) / GIB > 1.08 * 71.91
    assert (kept.peak_allocated_bytes or 0) - (dropped.peak_allocated_bytes or 0) == 2 * 32_000 * 128_256
    for job, record in ((public_job(True), kept), (public_job(False), dropped)):
        assert predict(job).allocated_bytes == pytest.approx(record.allocated_bytes or 0, abs=2**21), "but for unsplit remainders"
