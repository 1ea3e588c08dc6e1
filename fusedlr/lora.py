"""Param groups for a PEFT model: LoRA+ rates, and weight decay where it belongs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fusedlr import arguments, peft_names


def param_groups(
    model: nn.Module, *, lr: float, b_lr_ratio: float = 1.0, weight_decay: float | None = None
) -> list[dict[str, Any]]:
    """Param groups of everything trainable in a PEFT model, for `FusedAdamW` or any torch optimizer.

    LoRA+ (Hayou et al. 2024, arXiv:2402.12354): the B matrices learn at `b_lr_ratio * lr`, all else at `lr`.
    Decay is applied to matrices only: not to tensors of fewer than two dimensions (biases, norms), not to
    embeddings, not to DoRA magnitudes. Whole layers trained through `modules_to_save` are handled by the same
    rules at rate `lr`.

    Args:
        model: a model with trainable LoRA adapters; frozen parameters are left out.
        lr: learning rate, >= 0; the peak when a schedule is used.
        b_lr_ratio: rate of the B matrices over that of the others, > 0; LoRA+ suggests up to 16.
        weight_decay: decoupled decay of the groups that have any, >= 0; None leaves it to the optimizer's
            own `weight_decay`, which a number here would overrule.

    Returns:
        Non-empty dicts with `params`, `lr`, `weight_decay` where it is given or 0, and a `name`: `lora_A`,
        `lora_B` or `other`, with `_no_decay` behind it where decay is off.

    Raises:
        ValueError: an argument is out of range, nothing is trainable, or no trainable LoRA matrix was found.

    >>> from collections import OrderedDict
    >>> layer = nn.ModuleDict({"lora_A": nn.Linear(8, 2, bias=False), "lora_B": nn.Linear(2, 8, bias=False)})
    >>> [(g["name"], g["lr"]) for g in param_groups(layer, lr=1e-4, b_lr_ratio=16)]
    [('lora_A', 0.0001), ('lora_B', 0.0016)]
    """
    arguments.plain_number("lr", lr)
    if weight_decay is not None:
        arguments.plain_number("weight_decay", weight_decay)
    arguments.plain_number("b_lr_ratio", b_lr_ratio, above_zero=True)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    looked_for = f"looked for trainable parameters named {', '.join((*peft_names.A, *peft_names.B))}"
    if not trainable:
        total = sum(1 for _ in model.parameters())
        raise ValueError(f"all {total} parameters of {type(model).__name__} are frozen; {looked_for}")
    groups: dict[str, dict[str, Any]] = {}
    for name, p in trainable.items():
        kind = peft_names.kind(name)
        decays = _decays(model, name, p)
        decay = weight_decay if decays else 0.0
        key = kind if decays else f"{kind}_no_decay"
        group = groups.setdefault(
            key,
            {
                "params": [],
                "lr": lr * b_lr_ratio if kind == "lora_B" else lr,
                **({"weight_decay": decay} if decay is not None else {}),
                "name": key,
            },
        )
        group["params"].append(p)
    if not any(name.startswith("lora_") for name in groups):
        some = ", ".join(list(trainable)[:3])
        raise ValueError(
            f"{type(model).__name__} has {len(trainable)} trainable parameters ({some}, ...) "
            f"but no LoRA matrix; {looked_for}"
        )
    return [groups[key] for key in sorted(groups)]


def _decays(model: nn.Module, name: str, p: Tensor) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return (
        p.dim() >= 2
        and not isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
        and peft_names.role(name) not in peft_names.NO_DECAY
    )


__all__ = ["param_groups"]
