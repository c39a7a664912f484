"""The dry run: the real DeepSpeed engine on fake tensors, as one rank of a job of any size, with no
GPU and no memory."""
