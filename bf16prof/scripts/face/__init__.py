"""`torch.cuda` as a script sees it on a machine without a GPU: every CUDA device is the one that
stands for it."""
