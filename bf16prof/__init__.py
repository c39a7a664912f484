"""bf16prof: predict, measure and reconcile the memory of DeepSpeed training."""

__version__ = "0.1.0"
