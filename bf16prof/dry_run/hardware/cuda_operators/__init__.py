"""What CUDA's operators keep and allocate, on a simulated GPU that is a CPU to PyTorch.

Composite operators ask for the device and choose other operators below on a GPU than on a CPU, with
other saved tensors; some kernels give other types; and kernels allocate scratch that fake tensors
do not show. `docs/cuda-operators.md` lists each difference with its source in PyTorch.
"""

from bf16prof.dry_run.hardware.cuda_operators.optimizers import cuda_optimizers
from bf16prof.dry_run.hardware.cuda_operators.registration import register_cuda_operators
from bf16prof.dry_run.hardware.cuda_operators.scratch import cuda_scratch

__all__ = ["cuda_optimizers", "cuda_scratch", "register_cuda_operators"]
