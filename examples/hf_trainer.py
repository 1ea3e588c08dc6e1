"""The Trainer of transformers: one word changes."""

from tiny import dataset, lora_model
from transformers import TrainingArguments

from fusedlr.hf import FusedLRTrainer

# unchanged: optimizer, schedule and clipping are read from here
args = TrainingArguments(
    output_dir="out",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=2e-3,
    num_train_epochs=2,
    lr_scheduler_type="cosine",
    warmup_steps=3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
)

# stock:
#   trainer = transformers.Trainer(model=lora_model(), args=args, train_dataset=dataset())
trainer = FusedLRTrainer(model=lora_model(), args=args, train_dataset=dataset())
trainer.train()

rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
