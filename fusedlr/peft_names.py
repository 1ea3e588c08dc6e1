"""How PEFT names the parameters of adapters: for param groups (lora.py) and for reports without torch."""

from __future__ import annotations

# lora_A and lora_B of linear and convolution layers, lora_embedding_A and _B of embeddings
A = ("lora_A", "lora_embedding_A")
B = ("lora_B", "lora_embedding_B")
WHOLE = "modules_to_save"
# adapters of embeddings, rows of embeddings, and DoRA's magnitudes
NO_DECAY = ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta", "lora_magnitude_vector")


def role(name: str) -> str | None:
    """The part of a parameter's name by which PEFT stores it; the adapter's own name comes after it."""
    return next((part for part in name.split(".") if part in (*A, *B, *NO_DECAY, WHOLE)), None)


def kind(name: str) -> str:
    """`lora_A` or `lora_B` for a parameter that is such a matrix, else `other`.

    >>> kind("model.layers.0.q_proj.lora_A.default.weight")
    'lora_A'
    """
    found = role(name)
    return "lora_A" if found in A else "lora_B" if found in B else "other"
