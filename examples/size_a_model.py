"""Size a model: how many GPUs does full fine-tuning of Llama 3.1 8B need, and what changes with
longer sequences?

A script in cells (`# %%`), which Jupyter, VS Code and PyCharm run one by one. It needs no GPU and
no torch.
"""

# %% What fits eight H100, best first
import bf16prof

plans = bf16prof.plan("llama3.1-8b", gpus=8, gpu="h100", recipe="bf16-fp32-master", no_verify=True)
print(plans.to_dataframe()[["zero_stage", "recipe", "micro_batch_size", "peak_bytes", "verdict"]].head(5))

# %% The first choice as a DeepSpeed JSON
print(plans.deepspeed_json())

# %% The same job with longer sequences: peak of one GPU, and whether it fits
for tokens in (2048, 4096, 8192, 16384):
    outcome = bf16prof.estimate(
        "llama3.1-8b", gpus=8, gpu="h100", zero=3, recipe="bf16-fp32-master", sequence_length=tokens, activation_checkpointing=True,
    )  # fmt: skip
    record = outcome.records[0]
    print(f"{tokens:6} tokens: {record.peak_allocated_bytes / 2**30:6.1f} GiB, {record.verdict}")

# %% Where the bytes are at the peak, as a figure (in a notebook it is shown)
figure = outcome.figure("memory")
