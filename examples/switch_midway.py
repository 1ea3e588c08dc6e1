"""A run begun with stock AdamW moves over in the middle, and back: the checkpoints are the same.

Ten updates each with stock, with fusedlr and with stock again, against thirty with stock.
"""

import tempfile

import torch
from tiny import dataset, lora_model
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from fusedlr.hf import FusedLRTrainer

UPDATES = 30


class StopAt(TrainerCallback):
    """What a crash or a job's time limit would do."""

    def __init__(self, update):
        self.update = update

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.update


def train(trainer_class, folder, stop_at=UPDATES, resume_from=None):
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=4,
        learning_rate=2e-3,
        max_steps=UPDATES,
        lr_scheduler_type="cosine",
        warmup_steps=3,
        logging_steps=1,
        save_steps=10,
        report_to="none",
        disable_tqdm=True,
    )
    set_seed(0)
    model = lora_model()
    trainer = trainer_class(model=model, args=args, train_dataset=dataset(), callbacks=[StopAt(stop_at)])
    set_seed(0)
    trainer.train(resume_from_checkpoint=resume_from)
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return weights, [entry["learning_rate"] for entry in logs]


with tempfile.TemporaryDirectory() as folder:
    stock_weights, stock_rates = train(Trainer, f"{folder}/stock")

    moving = f"{folder}/moving"
    train(Trainer, moving, stop_at=10)
    train(FusedLRTrainer, moving, stop_at=20, resume_from=f"{moving}/checkpoint-10")
    weights, rates = train(Trainer, moving, resume_from=f"{moving}/checkpoint-20")

difference = (weights - stock_weights).abs().mean().item()
print(f"mean difference of a weight from the run that stayed: {difference:.1e}")
print(f"the same {len(rates)} rates in the logs: {torch.allclose(*map(torch.tensor, (rates, stock_rates)))}")
