"""Lines in the forms in which people paste them: facts made up, forms those of DeepSpeed, torch,
transformers and nvidia-smi."""

from __future__ import annotations

THROUGHPUT = """\
[2025-05-06 10:00:00,131] [INFO] [logging.py:96:log_dist] [Rank 0] step=10, skipped=0, lr=[2e-05], mom=[(0.9, 0.999)]
[2025-05-06 10:00:00,133] [INFO] [timer.py:264:stop] epoch=0/micro_step=20/global_step=10, RunningAvgSamplesPerSec=31.6, \
CurrSamplesPerSec=32.0, MemAllocated=7.5GB, MaxMemAllocated=18.25GB
[2025-05-06 10:00:20,133] [INFO] [timer.py:264:stop] epoch=0/micro_step=40/global_step=20, RunningAvgSamplesPerSec=31.9, \
CurrSamplesPerSec=16.0, MemAllocated=7.51GB, MaxMemAllocated=18.3GB
"""

OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 23.50 GiB of which 1.50 GiB is "
    "free. Including non-PyTorch memory, this process has 22.00 GiB memory in use. Of the allocated memory 19.00 GiB is allocated by "
    "PyTorch, and 2.25 GiB is reserved by PyTorch but unallocated. If reserved but unallocated memory is large try setting "
    "PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation."
)

BACKWARD = """\
Traceback (most recent call last):
  File "/home/me/train.py", line 80, in <module>
    main()
  File "/home/me/train.py", line 61, in main
    engine.backward(loss)
  File "/opt/venv/lib/python3.11/site-packages/deepspeed/runtime/engine.py", line 2053, in backward
    self.optimizer.backward(loss, retain_graph=retain_graph)
  File "/opt/venv/lib/python3.11/site-packages/torch/utils/checkpoint.py", line 1129, in unpack_hook
    frame.recompute_fn(*args)
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1532, in _call_impl
    return forward_call(*args, **kwargs)
"""

FORWARD = """\
Traceback (most recent call last):
  File "/home/me/train.py", line 60, in main
    loss = engine(batch, labels=batch).loss
  File "/opt/venv/lib/python3.11/site-packages/torch/nn/modules/module.py", line 1532, in _call_impl
    return forward_call(*args, **kwargs)
  File "/opt/venv/lib/python3.11/site-packages/deepspeed/runtime/engine.py", line 1899, in forward
    loss = self.module(*inputs, **kwargs)
"""

STEP = """\
Traceback (most recent call last):
  File "/opt/venv/lib/python3.11/site-packages/accelerate/utils/deepspeed.py", line 178, in backward_and_step
    self.engine.step()
  File "/opt/venv/lib/python3.11/site-packages/deepspeed/runtime/engine.py", line 2213, in step
    self._take_model_step(lr_kwargs)
  File "/opt/venv/lib/python3.11/site-packages/torch/optim/adamw.py", line 100, in step
    exp_avg_sq = torch.zeros_like(p)
"""

INIT = """\
Traceback (most recent call last):
  File "/home/me/train.py", line 40, in main
    engine, _, _, _ = deepspeed.initialize(model=model, config="ds.json")
  File "/opt/venv/lib/python3.11/site-packages/deepspeed/__init__.py", line 193, in initialize
    engine = DeepSpeedEngine(args=args,
  File "/opt/venv/lib/python3.11/site-packages/deepspeed/runtime/zero/stage_1_and_2.py", line 650, in initialize_optimizer_states
    self.optimizer.step()
"""

LOADING = """\
Traceback (most recent call last):
  File "/home/me/run.py", line 12, in <module>
    model = AutoModelForCausalLM.from_pretrained(name, torch_dtype=torch.bfloat16)
  File "/opt/venv/lib/python3.11/site-packages/transformers/modeling_utils.py", line 4097, in from_pretrained
    ) = cls._load_pretrained_model(
"""

NOTEBOOK = """\
File /home/me/venv/lib/python3.11/site-packages/deepspeed/runtime/engine.py:1184, in DeepSpeedEngine._configure_optimizer(self, optimizer)
   1183 if optimizer_wrapper == ZERO_OPTIMIZATION:
-> 1184     self.optimizer = self._configure_zero_optimizer(basic_optimizer)
"""

OLD_NOTEBOOK = """\
<ipython-input-4-112174da452c> in <module>
     29
---> 30     loss.backward()
     31
~/anaconda3/lib/python3.9/site-packages/torch/_tensor.py in backward(self, gradient)
"""

RICH = """\
│ /opt/conda/lib/python3.8/site-packages/torch/optim/adamw.py:171 in step                          │
│                                                                                                  │
│   170 │   │   │   │   state = self.state[p]                                                        │
│ ❱ 171 │   │   │   │   state["exp_avg"] = torch.zeros_like(p)                                       │
"""

TRAINER = """\
***** Running training *****
  Num examples = 6,400
  Num Epochs = 1
  Instantaneous batch size per device = 4
  Total train batch size (w. parallel, distributed & accumulation) = 64
  Gradient Accumulation steps = 2
  Total optimization steps = 100
  Number of trainable parameters = 1,235,814,400
  0%|          | 0/100 [00:00<?, ?it/s]
 10%|#         | 10/100 [00:20<03:00,  2.00s/it]{'loss': '2.25', 'grad_norm': '1.5', 'learning_rate': '1.8e-05', 'epoch': '0.1'}
 20%|##        | 20/100 [00:40<02:40,  2.00s/it]{'loss': 1.75, 'grad_norm': 1.25, 'learning_rate': 1.6e-05, 'epoch': 0.2}
{'train_runtime': 200.0, 'train_samples_per_second': 32.0, 'train_steps_per_second': 0.5, 'train_loss': 1.9, 'epoch': 1.0}
"""

SMI_TABLE = """\
Mon May  5 10:00:00 2025
+-----------------------------------------------------------------------------------------+
| NVIDIA-SMI 560.35.03              Driver Version: 560.35.03      CUDA Version: 12.6     |
|-----------------------------------------+------------------------+----------------------+
| GPU  Name                 Persistence-M | Bus-Id          Disp.A | Volatile Uncorr. ECC |
| Fan  Temp   Perf          Pwr:Usage/Cap |           Memory-Usage | GPU-Util  Compute M. |
|                                         |                        |               MIG M. |
|=========================================+========================+======================|
|   0  NVIDIA A100-SXM4-80GB          On  |   00000000:07:00.0 Off |                    0 |
| N/A   34C    P0            312W /  400W |   40000MiB /  81920MiB |     90%      Default |
|                                         |                        |             Disabled |
+-----------------------------------------+------------------------+----------------------+
|   1  NVIDIA A100-SXM4-80GB          On  |   00000000:0F:00.0 Off |                    0 |
| N/A   36C    P0            320W /  400W |   41000MiB /  81920MiB |    100%      Default |
|                                         |                        |             Disabled |
+-----------------------------------------+------------------------+----------------------+
+-----------------------------------------------------------------------------------------+
| Processes:                                                                              |
|  GPU   GI   CI        PID   Type   Process name                              GPU Memory |
|        ID   ID                                                               Usage      |
|=========================================================================================|
|    0   N/A  N/A     11111      C   /opt/venv/bin/python                        39990MiB |
|    1   N/A  N/A     11112      C   /opt/venv/bin/python                        40990MiB |
+-----------------------------------------------------------------------------------------+
"""

SMI_OLD_TABLE = """\
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 470.82.01    Driver Version: 470.82.01    CUDA Version: 11.4     |
|-------------------------------+----------------------+----------------------+
| GPU  Name        Persistence-M| Bus-Id        Disp.A | Volatile Uncorr. ECC |
| Fan  Temp  Perf  Pwr:Usage/Cap|         Memory-Usage | GPU-Util  Compute M. |
|===============================+======================+======================|
|   0  Tesla V100-SXM2...  Off  | 00000000:00:1E.0 Off |                    0 |
| N/A   61C    P0   210W / 300W |  15109MiB / 16160MiB |     97%      Default |
+-------------------------------+----------------------+----------------------+
"""

MICRO_STEPS = """\
[2025-05-06 10:00:01,000] [INFO] [logging.py:96:log_dist] [Rank 0] time (ms) | fwd_microstep: 100.00 | bwd_microstep: 200.00 | \
bwd_inner_microstep: 199.00 | bwd_allreduce_microstep: 0.50 | step_microstep: 1.00
rank=0 time (ms) | fwd_microstep: 110.00 | bwd_microstep: 210.00 | bwd_inner_microstep: 205.00 | bwd_allreduce_microstep: 4.00 | \
step_microstep: 29.00
"""

ENDS_IN_INIT = """\
[INFO] [utils.py:781:see_memory_usage] DeepSpeed Engine: Before configure
[INFO] [utils.py:782:see_memory_usage] MA 0.0 GB         Max_MA 6.5 GB         CA 6.75 GB         Max_CA 7 GB
[INFO] [utils.py:789:see_memory_usage] CPU Virtual Memory:  used = 20.0 GB, percent = 2.0%
[INFO] [utils.py:781:see_memory_usage] After initializing optimizer states
[INFO] [utils.py:782:see_memory_usage] MA 0.0 GB         Max_MA 0.0 GB         CA 6.75 GB         Max_CA 7 GB
"""
