"""How PEFT names the parameters of adapters: for param groups (lora.py) and for reports without torch."""

from __future__ import annotations

# lora_A and lora_B of linear and convolution layers, lora_embedding_A and _B of embeddings
A = ("lora_A", "lora_embedding_A")
B = ("lora_B", "lora_embedding_B")
WHOLE = "modules_to_save"
# adapters of embeddings, rows of embeddings, and DoRA's magnitudes
NO_DECAY = ("lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta", "lora_magnitude_vector")
_ROLES = {*A, *B, *NO_DECAY, WHOLE}


def role(name: str) -> str | None:
    """The part of a parameter's name by which PEFT stores it; the adapter's own name comes after it."""
    return next((part for part in name.split(".") if part in _ROLES), None)


def kind(name: str) -> str:
    """`lora_A` or `lora_B` for a parameter that is such a matrix, else `other`.

    >>> kind("model.layers.0.q_proj.lora_A.default.weight")
    'lora_A'
    """
    found = role(name)
    return "lora_A" if found in A else "lora_B" if found in B else "other"


def adapter_of(name: str) -> str | None:
    """The name of the adapter that a parameter of this name belongs to; None if it belongs to none.

    >>> adapter_of("model.layers.0.q_proj.lora_A.first.weight")
    'first'
    """
    parts = name.split(".")
    at = _place_of_adapter(parts)
    return None if at is None else parts[at]


def without_adapter(name: str, adapter: str | int | None) -> str:
    """A parameter's name without that of its adapter: the same for the same place in every adapter.

    What PEFT did not name loses the first part that is the adapter's name. An adapter that is not called by
    a string is in no name.

    >>> without_adapter("layers.0.q_proj.lora_A.first.weight", "first")
    'layers.0.q_proj.lora_A.weight'
    >>> without_adapter("adapters.first.down", "first")
    'adapters.down'
    """
    parts = name.split(".")
    at = _place_of_adapter(parts)
    if at is None or parts[at] != adapter:
        at = next((i for i, part in enumerate(parts) if part == adapter), None)
    return name if at is None else ".".join(parts[:at] + parts[at + 1 :])


def _place_of_adapter(parts: list[str]) -> int | None:
    return next((i + 1 for i, part in enumerate(parts[:-1]) if part in _ROLES), None)
