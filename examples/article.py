"""The QLoRA script of the article, run today and faster: four of its lines are changed, and marked
below.

    + import halfbyte
    + halfbyte.plan("meta-llama/Llama-2-70b-hf", bnb_config, max_length=512).check()
    + model = halfbyte.optimize(model)
    - max_seq_length=512,
    + max_length=512, use_cpu=not torch.cuda.is_available(),

The first says before the download whether it fits, and what to do if not. The second makes the
model faster where it can, and says what it did. The last is the setting's name today, and what TRL
asks for where there is no GPU. The article leaves ``dataset`` open; here it is train.jsonl in this
directory, rows such as {"text": "..."} or {"messages": [...]}.

    pip install halfbyte bitsandbytes peft trl datasets
    python article.py
"""

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

import halfbyte  # changed

dataset = load_dataset("json", data_files="train.jsonl", split="train")

# 1. Configure 4-bit quantization for the base model
bnb_config = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
halfbyte.plan("meta-llama/Llama-2-70b-hf", bnb_config, max_length=512).check()  # changed

# 2. Load the base model in quantized format
model = AutoModelForCausalLM.from_pretrained(
    "meta-llama/Llama-2-70b-hf",
    quantization_config=bnb_config,
    device_map="auto",
)
tokenizer = AutoTokenizer.from_pretrained("meta-llama/Llama-2-70b-hf")

# 3. Prepare model for k-bit training
model = prepare_model_for_kbit_training(model)

# 4. Configure LoRA adapters
lora_config = LoraConfig(
    r=16,
    lora_alpha=32,
    target_modules="all-linear",
    lora_dropout=0.05,
    bias="none",
    task_type="CAUSAL_LM",
)

# 5. Wrap model with LoRA
model = get_peft_model(model, lora_config)
model = halfbyte.optimize(model)  # changed
model.print_trainable_parameters()

# 6. Train with SFTTrainer
training_args = SFTConfig(
    output_dir="./qlora-output",
    num_train_epochs=1,
    per_device_train_batch_size=1,
    gradient_accumulation_steps=16,
    learning_rate=2e-4,
    bf16=True,
    gradient_checkpointing=True,
    optim="paged_adamw_8bit",
    logging_steps=10,
    save_strategy="steps",
    save_steps=100,
    max_length=512, use_cpu=not torch.cuda.is_available(),  # changed
)  # fmt: skip
trainer = SFTTrainer(
    model=model,
    args=training_args,
    train_dataset=dataset,
    processing_class=tokenizer,
)
trainer.train()

# Save only the LoRA adapter
model.save_pretrained("./qlora-adapter")
