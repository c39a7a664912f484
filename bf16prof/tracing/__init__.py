"""Records the signature of a model: its own code runs once forward and backward in the dry run's
world, without DeepSpeed's engine.

What is recorded, and why nothing needs to be known of the model: lifetimes follow from eager
autograd and from Python's references, sizes from the shapes of fake tensors, scratch from the
modelled kernels. The emulator (`estimate`) adds what an engine does around that.
"""
