"""Choose a precision recipe: what each costs in memory, and what published training runs lost or
did not lose.

A script in cells (`# %%`). It needs no GPU and no torch. To see what a recipe costs in learning on
a model of your own, measure it: `bf16prof measure my.toml --recipe bf16-pure,bf16-kahan --quality
20`, then `bf16prof.load(RUN)`.
"""

# %% Bytes of one GPU by recipe, everything else equal
import bf16prof

RECIPES = ["fp32", "bf16-fp32-master", "bf16-full", "bf16-stochastic-rounding", "bf16-kahan"]
outcome = bf16prof.estimate("llama3.1-8b", gpus=8, gpu="h100", zero=2, recipe=RECIPES, sequence_length=2048, activation_checkpointing=True)
table = outcome.to_dataframe()[["recipe", "allocated_bytes", "peak_allocated_bytes", "verdict"]]
print(table.to_string(index=False))

# %% Each recipe's bytes by component, against the GPU's limit
figure = outcome.figure("memory")
outcome.save("recipes.html", force=True)
