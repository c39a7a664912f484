"""What a step has to do, and the time below which no GPU of the chosen kind can do it: a floor,
never a prediction.

Each part is divided by the vendor's peak (Williams et al. 2009, the roofline model), which no
kernel reaches:

* compute: the operations that are carried out, by the dense peak in the dtype of the matrix
  products (`gpus.toml`);
* communication: what a rank sends, by one direction of its link (half of the bidirectional figure);
  what leaves the node leaves the GPU by its host link as well, and the slower of both counts. The
  network cards behind it are not known, and are not faster;
* host link: what offloading moves, by one direction of it;
* optimizer: what it has to read and write, by the memory bandwidth. Offloaded, it works at the
  host's bandwidth, which is not known: 0.

With `overlap_comm` (stages 1 to 3) communication inside forward and backward may hide behind
compute, so the longer of both counts; without it they follow each other. What is offloaded during
both may hide behind them. The optimizer comes after both, and what it gathers and uploads after it.
"""

from __future__ import annotations

import dataclasses

from bf16prof.cases import Job
from bf16prof.closed_form.engine import Engine
from bf16prof.closed_form.transfers import HostLink, Ranks
from bf16prof.closed_form.walks import Walked
from bf16prof.closed_form.wrappers import wrapper_of
from bf16prof.engine.config import overlaps_communication
from bf16prof.models.autograd.events import RECOMPUTED
from bf16prof.profiles.gpus import GPUS_PER_NODE, Gpu
from bf16prof.step_records import StepWork, Transfer
from bf16prof.vocabulary import Device, Phase

DIRECTIONS = 2
"""A link's figure is that of both directions together."""


def engine_work(job: Job, engine: Engine, done: Walked, per_node: int = GPUS_PER_NODE) -> StepWork:
    """The work of one rank in one optimizer step that has been walked through, of a job that has
    one (`gap.work_gap`), with its floors on the job's GPU."""
    workload = job.profile.workload
    micro_steps = workload.gradient_accumulation_steps
    operations = done.program.operations
    wrapper = wrapper_of(engine)
    read, written = wrapper.optimizer_traffic()
    offloaded = wrapper.host_link(done) if job.device is Device.GPU else HostLink()
    hidden = wrapper.hides_communication and overlaps_communication(engine.config)
    busy = 0 if wrapper.offloads else read + written
    work = StepWork(
        tokens=micro_steps * workload.micro_batch_size * workload.sequence_length,
        micro_steps=micro_steps,
        compute_dtype=engine.facts.output_dtype,
        forward_flops=micro_steps * operations[Phase.FORWARD],
        backward_flops=micro_steps * operations[Phase.BACKWARD],
        recomputed_flops=micro_steps * operations.get(RECOMPUTED, 0),
        transfers=wrapper.transfers(done, Ranks(engine.world_size, per_node)),
        optimizer_read_bytes=read,
        optimizer_written_bytes=written,
        host_link_bytes=sum(offloaded),
    )
    if job.gpu is None:
        return work
    floors, beside = _floors(job.gpu, work, offloaded, busy, hidden=hidden)
    return dataclasses.replace(work, floor_s=floors, hidden_s={part: seconds for part, seconds in beside.items() if seconds > 0})


def tf32_note(job: Job, work: StepWork) -> str | None:
    """What the floor of fp32 matrix products would be where a script allows TF32, which PyTorch
    does not by default; `None` on cards whose tensor cores are no faster at it than their other
    ones."""
    if work.compute_dtype != "fp32" or not work.floor_s or job.gpu is None or job.gpu.tf32_tflops <= job.gpu.fp32_tflops:
        return None
    seconds = work.hardware_flops / (1e12 * job.gpu.tf32_tflops)
    return f"the floor is that of fp32 arithmetic; torch.backends.cuda.matmul.allow_tf32 would lower its compute to {seconds:.3g} s"


def _floors(
    gpu: Gpu, work: StepWork, offloaded: HostLink, optimizer_bytes: int, *, hidden: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of each part, which add up to the floor of the step, and those that hide behind
    computation; none for a GPU whose peaks are not known."""
    peak = gpu.peak_flops(work.compute_dtype)
    if peak is None or not gpu.link_gb_per_s or not gpu.hbm_gb_per_s:
        return {}, {}
    compute = work.hardware_flops / peak
    inside = sum(_sending(gpu, t) for t in work.transfers if t.phase is not Phase.STEP)
    after = sum(_sending(gpu, t) for t in work.transfers if t.phase is Phase.STEP)
    exposed = max(0.0, inside - compute) if hidden else inside
    floors = {"compute": compute, "communication": exposed + after, "optimizer": optimizer_bytes / (1e9 * gpu.hbm_gb_per_s)}
    beside = {"communication": inside - exposed}
    if any(offloaded) and gpu.host_gb_per_s:
        host = 1e9 * gpu.host_gb_per_s / DIRECTIONS
        during = max(offloaded.down, offloaded.up) / host
        waited = max(0.0, during - compute - exposed)
        floors["host link"], beside["host link"] = waited + offloaded.after / host, during - waited
    return floors, beside


def _sending(gpu: Gpu, transfer: Transfer) -> float:
    """Seconds that a transfer takes at least."""
    network = transfer.between_nodes_bytes / gpu.host_gb_per_s if gpu.host_gb_per_s else 0.0
    return DIRECTIONS / 1e9 * max(transfer.sent_bytes / gpu.link_gb_per_s, network)
