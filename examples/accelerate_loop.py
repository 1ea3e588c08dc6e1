"""A loop on accelerate: start it as it is, or with `accelerate launch`."""

import torch
from accelerate import Accelerator
from tiny import dataset, lora_model

import fusedlr

accelerator = Accelerator(gradient_accumulation_steps=2)
model = lora_model()
loader = torch.utils.data.DataLoader(dataset(), batch_size=4)
total = fusedlr.total_steps(96, batch_size=4, accumulation=2, world_size=accelerator.num_processes)

# stock, where accelerate steps a scheduler once per process:
#   optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
#   scheduler = transformers.get_cosine_schedule_with_warmup(
#       optimizer, 3 * accelerator.num_processes, total * accelerator.num_processes)
optimizer = fusedlr.FusedAdamW(
    model.parameters(),
    lr=2e-3,
    max_grad_norm=1.0,
    schedule=fusedlr.cosine(warmup_steps=3, total_steps=total),
)
scheduler = optimizer.scheduler
model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

model.train()
rates = []
for batch in loader:
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        # stock:
        #   if accelerator.sync_gradients:
        #       accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if accelerator.sync_gradients:
            rates += scheduler.get_last_lr()
        # counts nothing, so it may stay; save_state and load_state keep it
        scheduler.step()
        optimizer.zero_grad()

accelerator.print(f"{total} updates, the last at a rate of {rates[-1]:.2g}")
