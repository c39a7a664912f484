"""What a GPU is asked to show: single kernels and whole jobs, each predicted and measured in the
same way."""
