"""Signatures: what the code of a model does with memory in one forward and backward pass, recorded
once and replayed without torch.

`signature` is the data, `inquiry` what it is the answer to, `store` where answers are kept.
`bf16prof.tracing` records them.
"""
