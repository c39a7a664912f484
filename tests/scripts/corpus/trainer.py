"""The Trainer of transformers."""

import tempfile

from hf import ds_config, llama_config, make_tokenizer, texts
from transformers import AutoModelForCausalLM, DataCollatorForLanguageModeling, Trainer, TrainingArguments

arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=8, bf16=True,
    optim="adamw_torch", logging_steps=1, save_strategy="no", report_to=[], deepspeed=ds_config(2), remove_unused_columns=False,
)  # fmt: skip
tokenizer = make_tokenizer()
data = texts().map(lambda row: {"input_ids": tokenizer(row["text"])["input_ids"]}, remove_columns=["text"])
model = AutoModelForCausalLM.from_config(llama_config())
Trainer(model=model, args=arguments, train_dataset=data, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)).train()
