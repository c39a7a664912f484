"""The hardware that a dry run pretends to have: a GPU (allocator, autocast, operators), or CPUs
with the scratch of their kernels."""
