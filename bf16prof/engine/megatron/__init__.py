"""megatron-core as an engine beside DeepSpeed: what it is asked for, and how it is built and
driven."""
