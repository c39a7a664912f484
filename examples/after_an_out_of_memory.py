"""A job ran out of memory: what was predicted for it, where the bytes were, and which knob gives
enough back.

A script in cells (`# %%`). It needs no GPU and no torch. The job here: Llama 3.1 8B, ZeRO-2 on four
H100, sequences of 8,192 tokens.
"""

# %% The job as it was
import bf16prof

JOB = {"gpus": 4, "gpu": "h100", "zero": 2, "recipe": "bf16-fp32-master", "sequence_length": 8192, "micro_batch_size": 1}
before = bf16prof.estimate("llama3.1-8b", **JOB).records[0]
print(f"peak {before.peak_allocated_bytes / 2**30:.1f} GiB in {before.peak_phase}: {before.verdict}")

# %% What holds the memory at the peak, largest first
for component, size in sorted(before.peak_components.items(), key=lambda item: -item[1])[:4]:
    print(f"{component:20} {size / 2**30:6.1f} GiB")

# %% One knob at a time
KNOBS = {
    "activation checkpointing": {"activation_checkpointing": True},
    "ZeRO-3": {"zero": 3},
    "optimizer in host memory": {"offload": "optimizer"},
    "half the sequence": {"sequence_length": 4096},
}
for name, change in KNOBS.items():
    after = bf16prof.estimate("llama3.1-8b", **(JOB | change)).records[0]
    saved = before.peak_allocated_bytes - after.peak_allocated_bytes
    print(f"{name:26} {saved / 2**30:+7.1f} GiB back: {after.verdict}")

# %% All of them together, ranked: the first choice keeps the sequence and the GPUs
plans = bf16prof.plan("llama3.1-8b", gpus=4, gpu="h100", sequence_length=8192, recipe="bf16-fp32-master", no_verify=True)
print(plans.to_dataframe()[["zero_stage", "offload", "micro_batch_size", "activation_checkpointing", "peak_bytes"]].head(3))
