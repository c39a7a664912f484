"""How much of a GPU's arithmetic a measured step used."""

from __future__ import annotations

from bf16prof.profiles.gpus import Gpu, gpu_named
from bf16prof.step_records import StepWork


def utilisation(work: StepWork | None, gpu: Gpu | None, step_time_s: float | None) -> tuple[float | None, float | None]:
    """Model and hardware FLOPs utilisation of one GPU: operations per second over its peak (PaLM,
    appendix B; Korthikanti et al. 2022, arXiv 2205.05198, section 6.3, who count recomputation in
    the second). `None` where the work, the peak or the time is not known."""
    peak = gpu.peak_flops(work.compute_dtype) if gpu and work else None
    if work is None or not peak or not step_time_s:
        return None, None
    return work.model_flops / step_time_s / peak, work.hardware_flops / step_time_s / peak


def peak_note(work: StepWork | None, gpu: Gpu | None) -> tuple[str, ...]:
    """Which peak the utilisation is measured against, where there is one."""
    row = gpu_named(gpu.id) if gpu else None
    peak = row.peak_flops(work.compute_dtype) if row and work else None
    if row is None or work is None or not peak:
        return ()
    return (f"MFU and HFU are shares of {peak / 1e12:g} TFLOP/s, the dense {work.compute_dtype} peak of {row.id}",)
