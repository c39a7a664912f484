"""Models: the exact list of parameters (`shapes`), the torch modules that have them (`modules`),
and what a forward and a backward pass allocate (`tapes`), operator by operator of PyTorch's
(`autograd`). Only `modules`, and `foreign` for models of others, need torch.

A family of our own is one file in each of the first three packages, of the same name; there is no
list to extend.
"""
