"""All that speaks DeepSpeed: its configuration and constraints (no torch), the training step, and
the attribution of live tensors."""
