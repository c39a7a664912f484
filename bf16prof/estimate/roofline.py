"""What a step has to do, and the time below which no GPU of the chosen kind can do it: a floor, never a prediction.

Each part is divided by the vendor's peak (Williams et al. 2009, the roofline model), which no kernel reaches:

* compute: the operations that are carried out, by the dense peak in the dtype of the matrix products (`gpus.toml`);
* communication: what a rank sends, by one direction of its link (half of the bidirectional figure). What leaves the node is charged at the
  same rate, for the network between nodes is not known and is not faster;
* optimizer: what it has to read and write, by the memory bandwidth. Offloaded, it works at the host's bandwidth, which is not known: 0.

With `overlap_comm` (stages 1 to 3) communication inside forward and backward may hide behind compute, so the longer of both counts; without
it they follow each other. The optimizer comes after both, and what it gathers after it.
"""

from __future__ import annotations

from bf16prof.cases import Job
from bf16prof.engine.config import EngineFacts, Wrapper, deepspeed_config, offloads_optimizer, overlaps_communication
from bf16prof.estimate.steady import Engine
from bf16prof.estimate.traffic import host_link_bytes, optimizer_traffic
from bf16prof.estimate.training import Walked, walked
from bf16prof.estimate.transfers import GPUS_PER_NODE, transfers
from bf16prof.models.autograd.tape import RECOMPUTED
from bf16prof.models.shapes import inventory
from bf16prof.profiles.gpus import Gpu
from bf16prof.records import Device, Phase, StepWork, Transfer

DIRECTIONS = 2
"""A link's figure is that of both directions together."""


def step_work(job: Job, per_node: int = GPUS_PER_NODE) -> StepWork:
    """The work of one rank in one optimizer step of a job that has one (`gap.work_gap`), with its floors on the job's GPU."""
    engine = Engine(deepspeed_config(job), inventory(job.profile.model), job.case.world_size, job.device)
    return engine_work(job, engine, walked(job, engine), per_node)


def engine_work(job: Job, engine: Engine, done: Walked, per_node: int = GPUS_PER_NODE) -> StepWork:
    """The same, of an engine that is laid out already and a step that has been walked through."""
    workload = job.profile.workload
    micro_steps = workload.gradient_accumulation_steps
    forward, backward, recomputed = (micro_steps * done.program.operations(part) for part in (Phase.FORWARD, Phase.BACKWARD, RECOMPUTED))
    moved = transfers(job, engine, done, per_node)
    read, written = optimizer_traffic(engine)
    hidden = engine.facts.wrapper in (Wrapper.ZERO12, Wrapper.ZERO3) and overlaps_communication(engine.config)
    busy = 0 if offloads_optimizer(engine.config) else read + written
    return StepWork(
        tokens=micro_steps * workload.micro_batch_size * workload.sequence_length,
        compute_dtype=compute_dtype(engine.facts),
        forward_flops=forward,
        backward_flops=backward,
        recomputed_flops=recomputed,
        transfers=moved,
        optimizer_read_bytes=read,
        optimizer_written_bytes=written,
        host_link_bytes=host_link_bytes(engine, micro_steps) if job.device is Device.GPU else 0,
        floor_s=_floors(job.gpu, compute_dtype(engine.facts), forward + backward + recomputed, moved, busy, hidden=hidden),
    )


def compute_dtype(facts: EngineFacts) -> str:
    """What matrix products run in: autocast's dtype, else the parameters'."""
    return facts.output_dtype


def _floors(
    gpu: Gpu | None, dtype: str, operations: int, moved: tuple[Transfer, ...], optimizer_bytes: int, *, hidden: bool
) -> dict[str, float]:
    """Seconds of each part, which add up to the floor of the step."""
    peak = gpu.peak_flops(dtype) if gpu else None
    if gpu is None or peak is None or not gpu.link_gb_per_s or not gpu.hbm_gb_per_s:
        return {}
    link = 1e9 * gpu.link_gb_per_s / DIRECTIONS
    compute = operations / peak
    inside = sum(t.sent_bytes for t in moved if t.phase is not Phase.STEP) / link
    after = sum(t.sent_bytes for t in moved if t.phase is Phase.STEP) / link
    exposed = max(0.0, inside - compute) if hidden else inside
    return {"compute": compute, "communication": exposed + after, "optimizer": optimizer_bytes / (1e9 * gpu.hbm_gb_per_s)}
