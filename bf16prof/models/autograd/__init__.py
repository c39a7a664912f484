"""A miniature of PyTorch's autograd, without torch: which storages a forward and backward pass
keeps, and when it lets go of them."""
