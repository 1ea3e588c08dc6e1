"""Lightning: the optimizer's own view goes where the scheduler went."""

import lightning
import torch
from tiny import dataset, lora_model

import fusedlr


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = lora_model()
        self.rates = []

    def training_step(self, batch, batch_idx):
        self.rates.append(self.optimizers().param_groups[0]["lr"])
        return self.model(**batch).loss

    def configure_optimizers(self):
        total = self.trainer.estimated_stepping_batches
        # stock:
        #   optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        #   scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 3, total)
        optimizer = fusedlr.FusedAdamW(
            self.parameters(),
            lr=2e-3,
            max_grad_norm=1.0,
            schedule=fusedlr.cosine(warmup_steps=3, total_steps=total),
        )
        scheduler = optimizer.scheduler
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


module = Module()
# stock: gradient_clip_val=1.0 here; the optimizer clips now
trainer = lightning.Trainer(
    max_epochs=1, accelerator="auto", devices=1, logger=False, enable_checkpointing=False
)
trainer.fit(module, torch.utils.data.DataLoader(dataset(), batch_size=4))

rates = module.rates
