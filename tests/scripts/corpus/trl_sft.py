"""TRL's supervised fine-tuning, ZeRO-3, with an adapter of peft's."""

import tempfile

from hf import ds_config, llama_config, make_tokenizer, texts
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

arguments = SFTConfig(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, max_steps=8, bf16=True, optim="adamw_torch", logging_steps=1,
    save_strategy="no", report_to=[], deepspeed=ds_config(3), max_length=16, gradient_checkpointing=False, dataset_num_proc=None,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(llama_config())
SFTTrainer(
    model=model, args=arguments, train_dataset=texts(), processing_class=make_tokenizer(), peft_config=LoraConfig(target_modules=["q_proj"])
).train()
