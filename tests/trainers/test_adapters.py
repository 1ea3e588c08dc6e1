"""Several adapters of one PEFT model in one optimizer, each as if it were trained by itself.

The second half has, one test each, what services that train many adapters have got wrong: moments of one
tenant used by the next, a non-finite gradient that stays, the wrong adapter stepped, progress inherited,
files that load nothing.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from kit import quiet, through_a_file
from trainer_kit import tiny_llama

import fusedlr
from fusedlr.lora import adapter_groups
from fusedlr.peft_names import adapter_of

peft = pytest.importorskip("peft")

COSINE = fusedlr.cosine(warmup_steps=2, total_steps=12)
OPTIONS: dict[str, dict[str, Any]] = {
    "mild": {"lr": 1e-3, "schedule": COSINE, "max_grad_norm": 1.0},
    "bold": {"lr": 1e-2, "b_lr_ratio": 4.0, "weight_decay": 0.1, "max_grad_norm": 0.5},
    "steady": {"lr": 3e-3, "schedule": fusedlr.linear(total_steps=9, min_lr=1e-4), "betas": (0.8, 0.9)},
}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "whole layers": {"modules_to_save": ["lm_head"]},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "rows of embeddings": {"trainable_token_indices": {"embed_tokens": [1, 2, 3]}},
}


def config(**options: Any) -> Any:
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options}
    return peft.LoraConfig(**settings)


def add(model: Any, name: str, seed: int, **options: Any) -> None:
    torch.manual_seed(seed)
    model.add_adapter(name, config(**options))
    with torch.no_grad():
        # B starts at 0, and A then has no gradient
        for key, p in model.named_parameters():
            if adapter_of(key) == name and "lora_B" in key:
                p.normal_(std=0.1)


def adapted(*names: str, **options: Any) -> Any:
    """A model with these adapters; each has the same values whatever others there are."""
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), config(**options), adapter_name="unused")
    for name in names:
        add(model, name, seed=sum(map(ord, name)), **options)
    return model


def batch(seed: int) -> torch.Tensor:
    return torch.randint(1, 48, (2, 8), generator=torch.Generator().manual_seed(seed))


def backward(model: Any, name: str, seed: int, scale: float = 1.0) -> None:
    """Gradients of one adapter, as training code makes them: it is switched on, and requires gradients."""
    model.set_adapter(name)
    ids = batch(seed)
    (model(input_ids=ids, labels=ids).loss * scale).backward()


def tensors(model: Any, name: str) -> dict[str, torch.Tensor]:
    return {key: p for key, p in model.named_parameters() if adapter_of(key) == name}


def optimizer_of(model: Any, *names: str, **options: Any) -> fusedlr.FusedAdamW:
    groups = adapter_groups(model, {name: OPTIONS[name] for name in names})
    return fusedlr.FusedAdamW(groups, lr=1e-3, **options)


def alone(name: str, seeds: list[int], **options: Any) -> dict[str, torch.Tensor]:
    """The adapter trained by itself, on a model of its own."""
    model = adapted(name, **options)
    optimizer = optimizer_of(model, name)
    for seed in seeds:
        backward(model, name, seed)
        optimizer.step()
        optimizer.zero_grad()
    return {key: p.detach() for key, p in tensors(model, name).items()}


def assert_same(model: Any, name: str, expected: dict[str, torch.Tensor]) -> None:
    found = tensors(model, name)
    assert found.keys() == expected.keys() and len(found) > 1
    for key, p in found.items():
        assert torch.equal(p, expected[key]), key


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_turns_are_as_alone(kind):
    names, options = list(OPTIONS), KINDS[kind]
    model = adapted(*names, **options)
    optimizer = optimizer_of(model, *names)
    assert optimizer.scopes == tuple(names)
    for seed in range(4):
        for name in names[: 1 + seed]:
            backward(model, name, seed)
        # all that have gradients, at once
        optimizer.step()
        optimizer.zero_grad()
    for i, name in enumerate(names):
        assert_same(model, name, alone(name, list(range(i, 4)), **options))
    assert len(optimizer.param_groups) == len({(g["scope"], g["name"]) for g in optimizer.param_groups})


def test_an_adapter_deleted_and_another_in_its_place():
    model = adapted("mild", "bold")
    optimizer = optimizer_of(model, "mild", "bold")
    for seed in range(2):
        for name in ("mild", "bold"):
            backward(model, name, seed)
        optimizer.step()
        optimizer.zero_grad()
    model.delete_adapter("mild")
    optimizer.remove_scope("mild")
    add(model, "mild", seed=sum(map(ord, "mild")))
    for group in adapter_groups(model, {"mild": OPTIONS["mild"]}):
        optimizer.add_param_group(group)
    assert optimizer.scopes == ("bold", "mild")
    for seed in range(2, 4):
        for name in ("mild", "bold"):
            backward(model, name, seed)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(model, "mild", alone("mild", [2, 3]))
    assert_same(model, "bold", alone("bold", [0, 1, 2, 3]))


def test_groups_have_the_options_of_their_adapter():
    model = adapted(*OPTIONS, modules_to_save=["lm_head"])
    groups = adapter_groups(model, OPTIONS)
    by_name = {(group["scope"], group["name"]): group for group in groups}
    assert by_name["bold", "lora_B"]["lr"] == 4e-2 and by_name["bold", "lora_A"]["lr"] == 1e-2
    assert by_name["bold", "lora_A"]["weight_decay"] == 0.1 and by_name["steady", "other"]["betas"] == (
        0.8,
        0.9,
    )
    assert by_name["mild", "lora_A"]["max_grad_norm"] == 1.0
    # an absolute floor is that of the adapter's own rate, whatever the optimizer's is
    assert math.isclose(by_name["steady", "lora_A"]["schedule"].lr_at(9, 3e-3), 1e-4)
    names = [name for group in groups for name, _ in group["params"]]
    assert len(names) == len(set(names)) == sum(len(tensors(model, name)) for name in OPTIONS)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"moderate": {"lr": 1e-3}},
            "adapter 'moderate' is not in PeftModelForCausalLM, which has mild, unused",
        ),
        ({"mild": {}}, "adapter 'mild' has no lr"),
        ({"mild": {"lr": -1.0}}, "adapter 'mild': lr=-1.0"),
        ({"mild": {"lr": 1.0, "b_lr_ratio": 0.0}}, "adapter 'mild': b_lr_ratio=0.0"),
        (
            {"mild": {"lr": 1.0, "warmup": 3}},
            "adapter 'mild' has warmup=3, which is none of b_lr_ratio, betas",
        ),
    ],
)
def test_bad_options_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        adapter_groups(adapted("mild"), given)


# what has gone wrong elsewhere


def trained(steps: int = 3) -> tuple[Any, fusedlr.FusedAdamW]:
    """Two adapters after some steps."""
    model = adapted("mild", "bold")
    optimizer = optimizer_of(model, "mild", "bold")
    for seed in range(steps):
        for name in ("mild", "bold"):
            backward(model, name, seed)
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def as_new(model: Any, name: str) -> None:
    """Give an adapter the values that `adapted` gives it."""
    with torch.no_grad():
        for key, value in tensors(adapted(name), name).items():
            tensors(model, name)[key].copy_(value)


def test_the_next_tenant_does_not_meet_the_moments_of_the_last():
    model, optimizer = trained()
    optimizer.reset_scope("bold")
    as_new(model, "bold")
    backward(model, "bold", 7)
    optimizer.step()
    assert_same(model, "bold", alone("bold", [7]))


def test_progress_of_a_schedule_is_not_inherited():
    model, optimizer = trained()
    optimizer.reset_scope("mild", lr=2e-3, schedule=fusedlr.linear(warmup_steps=4, total_steps=8))
    assert [g["k"] for g in optimizer.param_groups if g["scope"] == "mild"] == [0, 0]
    rates = []
    for seed in range(3):
        backward(model, "mild", seed)
        optimizer.step(only="mild")
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.0, 5e-4, 1e-3]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_stays_with_its_adapter_and_does_not_stay(value):
    model, optimizer = trained(2)
    for name in ("mild", "bold"):
        backward(model, name, 2)
    next(p for p in tensors(model, "bold").values() if p.grad is not None).grad.view(-1)[0] = value
    optimizer.step()
    optimizer.zero_grad()
    assert_same(model, "mild", alone("mild", [0, 1, 2]))
    backward(model, "bold", 3)
    optimizer.step()
    # as if that step had never been
    assert_same(model, "bold", alone("bold", [0, 1, 3]))


def test_the_adapter_that_is_named_is_stepped_whatever_is_switched_on():
    model, optimizer = trained(1)
    for name in ("mild", "bold"):
        backward(model, name, 1)
    model.set_adapter("bold")
    before = {key: p.detach().clone() for key, p in tensors(model, "bold").items()}
    optimizer.step(only="mild")
    assert_same(model, "bold", before)
    assert_same(model, "mild", alone("mild", [0, 1]))


def test_an_adapter_is_clipped_by_its_own_norm():
    model, optimizer = trained(1)
    backward(model, "mild", 1)
    backward(model, "bold", 1, scale=1e6)
    optimizer.step()
    assert_same(model, "mild", alone("mild", [0, 1]))


def test_a_file_of_one_slot_loads_into_another():
    model, optimizer = trained()
    file = through_a_file(optimizer.scope_state_dict("bold"))
    weights = peft.get_peft_model_state_dict(model, adapter_name="bold")
    other = adapted("mild", "steady")
    with quiet():
        slots = optimizer_of(other, "mild", "steady")
    backward(other, "mild", 0)
    slots.step(only="mild")
    slots.zero_grad()
    # the slot has another number of groups: those of the tenant take their place
    slots.remove_scope("steady")
    for group in adapter_groups(other, {"steady": OPTIONS["bold"]}):
        slots.add_param_group(group)
    peft.set_peft_model_state_dict(other, weights, adapter_name="steady")
    slots.load_scope_state_dict("steady", file)
    backward(other, "steady", 3)
    slots.step(only="steady")
    expected = alone("bold", [0, 1, 2, 3])
    for key, p in tensors(other, "steady").items():
        assert torch.equal(p, expected[key.replace(".steady.", ".bold.")])
    assert_same(other, "mild", alone("mild", [0]))


def test_restoring_one_adapter_leaves_all_numbers_of_the_others():
    model, optimizer = trained()
    file = optimizer.scope_state_dict("bold")
    others = [p for p in tensors(model, "mild").values()]
    before = [copy.deepcopy(optimizer.state[p]) for p in others]
    optimizer.load_scope_state_dict("bold", file)
    for p, entry in zip(others, before, strict=True):
        assert all(torch.equal(optimizer.state[p][key], value) for key, value in entry.items())


def test_weights_that_are_restored_are_what_the_next_step_starts_from():
    model, optimizer = trained()
    file = optimizer.scope_state_dict("bold")
    kept = {key: p.detach().clone() for key, p in tensors(model, "bold").items()}
    for _ in range(2):
        backward(model, "bold", 9)
        optimizer.step(only="bold")
        optimizer.zero_grad()
    with torch.no_grad():
        for key, p in tensors(model, "bold").items():
            p.copy_(kept[key])
    optimizer.load_scope_state_dict("bold", file)
    backward(model, "bold", 3)
    optimizer.step(only="bold")
    assert_same(model, "bold", alone("bold", [0, 1, 2, 3]))


def test_an_adapter_of_zeros_is_counted_but_does_not_move_what_has_no_gradient():
    """A slot whose A and B are both 0 has gradients of 0: it is told by a norm of 0."""
    model, optimizer = trained(1)
    optimizer.reset_scope("bold")
    with torch.no_grad():
        for p in tensors(model, "bold").values():
            p.zero_()
    backward(model, "bold", 0)
    optimizer.step(only="bold")
    assert optimizer.last_metrics()["grad_norm"][1] == 0
