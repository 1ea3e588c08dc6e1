"""Param groups for a PEFT model: LoRA+ rates, weight decay where it belongs, several adapters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fusedlr import arguments, peft_names
from fusedlr.schedule import check_schedule


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
    _check_rates(lr, b_lr_ratio, weight_decay)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    looked_for = f"looked for trainable parameters named {', '.join((*peft_names.A, *peft_names.B))}"
    if not trainable:
        total = sum(1 for _ in model.parameters())
        raise ValueError(f"all {total} parameters of {type(model).__name__} are frozen; {looked_for}")
    groups = _grouped(model, trainable, lr, b_lr_ratio, weight_decay)
    if not any(group["name"].startswith("lora_") for group in groups):
        some = ", ".join(list(trainable)[:3])
        raise ValueError(
            f"{type(model).__name__} has {len(trainable)} trainable parameters ({some}, ...) "
            f"but no LoRA matrix; {looked_for}"
        )
    return [{**group, "params": [p for _, p in group["params"]]} for group in groups]


def adapter_groups(model: nn.Module, adapters: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Param groups of several adapters of a PEFT model, each a scope of its own under the adapter's name.

    In one `FusedAdamW` each adapter is trained as by an optimizer of its own, bit for bit: it is normed,
    clipped, skipped, counted and scheduled by itself. All of an adapter's tensors are taken, DoRA's
    magnitudes and its copies of `modules_to_save` too, whether they require gradients now or not, because
    `set_adapter` turns that on for one adapter at a time.

    Args:
        model: a PEFT model that has the adapters.
        adapters: name of an adapter -> its options: `lr` (the peak, >= 0, required), `b_lr_ratio` (rate of
            the B matrices over that of the others, > 0, by default 1) and `weight_decay` as of
            `param_groups`, `schedule`, `max_grad_norm`, `nonfinite`, `betas`, `eps`. What is left out is the
            optimizer's. Absolute levels of a schedule, as `min_lr`, are relative to the adapter's `lr`.

    Returns:
        Non-empty dicts with `params` as pairs of name and parameter, `scope`, a `name` as of `param_groups`,
        and the options.

    Raises:
        ValueError: the model has no adapter of a name, an option is out of range or unknown, or `lr` is
            missing.

    >>> matrices = lambda: nn.ModuleDict({name: nn.Linear(8, 2, bias=False) for name in ("mild", "bold")})
    >>> layer = nn.ModuleDict({"lora_A": matrices(), "lora_B": matrices()})
    >>> groups = adapter_groups(layer, {"mild": {"lr": 1e-4}, "bold": {"lr": 1e-3, "b_lr_ratio": 4}})
    >>> [(group["scope"], group["name"], group["lr"]) for group in groups][2:]
    [('bold', 'lora_A', 0.001), ('bold', 'lora_B', 0.004)]
    """
    of_adapters: dict[str, dict[str, Tensor]] = {}
    for name, p in model.named_parameters():
        found = peft_names.adapter_of(name)
        # of a layer that is trained whole, the frozen original is no adapter
        if found is not None:
            of_adapters.setdefault(found, {})[name] = p
    groups = []
    for adapter, options in adapters.items():
        where, known = f"adapter {adapter!r}", ", ".join(sorted(of_adapters)) or "none"
        if adapter not in of_adapters:
            raise ValueError(f"{where} is not in {type(model).__name__}, which has {known}")
        if "lr" not in options:
            raise ValueError(f"{where} has no lr")
        unknown = sorted(set(options) - _OPTIONS)
        if unknown:
            raise ValueError(
                f"{where} has {unknown[0]}={options[unknown[0]]!r}, which is none of "
                f"{', '.join(sorted(_OPTIONS))}"
            )
        rest = {key: value for key, value in options.items() if key not in _OF_GROUPS}
        if rest.get("schedule") is not None:
            check_schedule(rest["schedule"])
            rest["schedule"] = rest["schedule"].resolve(options["lr"])
        rates = options["lr"], options.get("b_lr_ratio", 1.0), options.get("weight_decay")
        try:
            _check_rates(*rates)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        groups += [
            {**group, **rest, "scope": adapter} for group in _grouped(model, of_adapters[adapter], *rates)
        ]
    return groups


# what decides the rates and decays of an adapter's groups, and what all of them are given
_OF_GROUPS = {"lr", "b_lr_ratio", "weight_decay"}
_OPTIONS = _OF_GROUPS | {"schedule", "max_grad_norm", "nonfinite", "betas", "eps"}


def _check_rates(lr: Any, b_lr_ratio: Any, weight_decay: Any) -> None:
    arguments.plain_number("lr", lr)
    if weight_decay is not None:
        arguments.plain_number("weight_decay", weight_decay)
    arguments.plain_number("b_lr_ratio", b_lr_ratio, above_zero=True)


def _grouped(
    model: nn.Module, params: Mapping[str, Tensor], lr: float, b_lr_ratio: float, weight_decay: float | None
) -> list[dict[str, Any]]:
    """Groups by rate and decay; their `params` are pairs of name and parameter."""
    groups: dict[str, dict[str, Any]] = {}
    for name, p in params.items():
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
        group["params"].append((name, p))
    return [groups[key] for key in sorted(groups)]


def _decays(model: nn.Module, name: str, p: Tensor) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    return (
        p.dim() >= 2
        and not isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
        and peft_names.role(name) not in peft_names.NO_DECAY
    )


__all__ = ["adapter_groups", "param_groups"]
