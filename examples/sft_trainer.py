"""TRL's SFTTrainer, or any other subclass of Trainer: a class of two words."""

from datasets import Dataset
from tiny import adapters, dataset, llama
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from fusedlr.hf import FusedLRTrainerMixin


# stock: SFTTrainer itself
class FusedSFTTrainer(FusedLRTrainerMixin, SFTTrainer):
    pass


args = SFTConfig(
    output_dir="out",
    per_device_train_batch_size=4,
    learning_rate=2e-3,
    max_steps=24,
    lr_scheduler_type="cosine",
    warmup_steps=3,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
)
# the data are token ids already, so this tokenizer only pads
words = models.WordLevel({"<end>": 0, "<pad>": 1}, unk_token="<pad>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>", pad_token="<pad>")

trainer = FusedSFTTrainer(
    model=llama(),
    args=args,
    train_dataset=Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in dataset()]),
    processing_class=tokenizer,
    peft_config=adapters(),
)
trainer.train()

rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
