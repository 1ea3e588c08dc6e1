"""A loop of your own."""

import torch
from tiny import dataset, lora_model

import fusedlr

model = lora_model()
loader = torch.utils.data.DataLoader(dataset(), batch_size=4, shuffle=True)
total = len(loader)

# stock:
#   optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
#   scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, 3, total)
optimizer = fusedlr.FusedAdamW(
    model.parameters(),
    lr=2e-3,
    weight_decay=0.01,
    max_grad_norm=1.0,
    schedule=fusedlr.cosine(warmup_steps=3, total_steps=total),
)

model.train()
rates = []
for batch in loader:
    loss = model(**batch).loss
    loss.backward()
    # stock:
    #   torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    #   optimizer.step()
    #   scheduler.step()
    optimizer.step()
    optimizer.zero_grad()
    rates += optimizer.scheduler.get_last_lr()

print(f"loss {loss.item():.3f} after {total} updates; {optimizer.last_metrics()}")
