"""torch's own tests of optimizers, TestOptimRenewed of its test_optim.py, with FusedAdamW for AdamW.

torch ships the inputs (`torch.testing._internal.common_optimizers`), not the tests; each test here has the
name of torch's. Those of step hooks are in test_closures_and_hooks.py. What differs is in `DIFFERS`, and
docs/migrating.md says it.
"""

from __future__ import annotations

import copy
import importlib
import sys
import types
import unittest
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import settings
from kit import CPU_BACKENDS, ROOT, through_a_file
from snapshots import bits, params_of
from torch import Tensor, nn

import fusedlr

# what torch refuses -> what happens here, as docs/migrating.md says it
DIFFERS = {
    "a param group cannot have duplicate parameters": "The same parameter twice in a group is an error",
    "lr as Tensor doesn't work with foreach & not capturable": "A tensor `lr` needs no `capturable`",
    "betas must be either both floats or both Tensors": "`betas` may be a float and a tensor",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": (
        "neither does a tensor in `betas`"
    ),
}
WORDED = "Errors are of torch's types, in other words"


@pytest.fixture(scope="module")
def adamw() -> Iterator[Any]:
    """What torch's tests know of AdamW."""
    profile = settings.get_current_profile_name()
    stand_in = types.ModuleType("expecttest")
    stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
    # torch's kit is imported without what it does to its process: no test of it is run
    missing = {} if importlib.util.find_spec("expecttest") else {"expecttest": stand_in}
    with mock.patch.dict(sys.modules, missing), mock.patch("torch.backends.disable_global_flags"):
        kit = importlib.import_module("torch.testing._internal.common_optimizers")
    settings.load_profile(profile)
    yield next(info for info in kit.optim_db if info.optim_cls is torch.optim.AdamW)


@pytest.fixture(params=CPU_BACKENDS)
def build(request: pytest.FixtureRequest) -> Callable[..., fusedlr.FusedAdamW]:
    return lambda params, **options: fusedlr.FusedAdamW(params, backend=request.param, **options)


def inputs(adamw: Any, dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """The arguments that torch tries."""
    return [one.kwargs for one in adamw.optim_inputs_func(device="cpu", dtype=dtype)]


def layer(dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, nn.Parameter]:
    """torch's weight and bias."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((2, 3), (2,))
    )


def trained(optimizer: torch.optim.Optimizer, steps: int = 5, by_closure: bool = True) -> None:
    """torch's small regression."""
    weight, bias = params_of(optimizer)
    x = torch.linspace(-1, 1, 3, dtype=weight.dtype)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (weight @ x + bias).pow(2).sum()
        loss.backward()
        return loss

    for _ in range(steps):
        if by_closure:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()


def assert_equal(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    for p, q in zip(params_of(a), params_of(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        assert a.state[p].keys() == b.state[q].keys()
        for key, value in a.state[p].items():
            torch.testing.assert_close(value, b.state[q][key], rtol=1e-12, atol=1e-14)


def test_every_difference_is_in_the_docs():
    page = " ".join((ROOT / "docs" / "migrating.md").read_text().split())
    assert all(words in page for words in (*DIFFERS.values(), WORDED))


def test_errors(adamw):
    differed = set()
    for error in adamw.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given, refused = error.optimizer_error_input, error.error_type
        params = given.params if given.params is not None else [nn.Parameter(torch.ones(2))]
        if given.desc in DIFFERS:
            differed.add(given.desc)
            if refused is not UserWarning:
                fusedlr.FusedAdamW(params, **given.kwargs)
                continue
            refused = ValueError
        with pytest.raises(refused):
            fusedlr.FusedAdamW(params, **given.kwargs)
    assert differed == set(DIFFERS), "torch refuses something else now"


def test_foreach_and_fused_match_forloop(adamw, build):
    for kwargs in inputs(adamw):
        stock = torch.optim.AdamW(layer(), **{**kwargs, "foreach": False})
        for flags in ({}, {"foreach": True}, {"fused": True}, {"capturable": True}):
            ours = build(layer(), **{**kwargs, **flags})
            trained(ours, 7)
            if not flags:
                trained(stock, 7)
            assert_equal(ours, stock)


@pytest.mark.parametrize("with_lr_scheduler", [False, True])
def test_forloop_goes_right_direction(adamw, build, with_lr_scheduler):
    for makers in adamw.scheduler_inputs if with_lr_scheduler else [[]]:
        for kwargs in inputs(adamw):
            results = []
            for make in (build, torch.optim.AdamW):
                weight, bias = layer()
                optimizer = make(
                    [{"params": [weight]}, {"params": [bias], "lr": 0.01}], **{"lr": 0.01, **kwargs}
                )
                schedulers = [maker(optimizer) for maker in makers]
                losses = []
                for _ in range(15):
                    loss = (weight.sum(dim=1) + bias).pow(2).sum()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    for scheduler in schedulers:
                        plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                        scheduler.step(loss.detach()) if plateau else scheduler.step()
                    losses.append(loss.item())
                results.append(losses)
            ours, stock = results
            assert ours == pytest.approx(stock, rel=1e-12)
            assert ours[-1] > ours[0] if kwargs.get("maximize") else ours[-1] < ours[0]


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_tensor_lr(adamw, build, shape):
    for kwargs in inputs(adamw):
        lr = kwargs.get("lr", 1e-3)
        ours = build(layer(), **{**kwargs, "lr": torch.full(shape, lr, dtype=torch.float64)})
        stock = torch.optim.AdamW(layer(), **kwargs)
        trained(ours), trained(stock)
        assert_equal(ours, stock)
        # it may be changed in place
        ours.param_groups[0]["lr"].mul_(0.5)
        stock.param_groups[0]["lr"] = lr * 0.5
        trained(ours), trained(stock)
        assert_equal(ours, stock)


def test_param_groups_weight_decay(adamw, build):
    for kwargs in inputs(adamw):
        weight, bias = layer()
        other_weight, other_bias = layer()
        ours = build(
            [{"params": [weight], "weight_decay": 0.3}, {"params": [bias]}], **{**kwargs, "weight_decay": 0}
        )
        stock = torch.optim.AdamW(
            [{"params": [other_weight], "weight_decay": 0.3}, {"params": [other_bias]}],
            **{**kwargs, "weight_decay": 0},
        )
        trained(ours), trained(stock)
        assert_equal(ours, stock)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_step_is_noop_when_params_have_no_grad(adamw, build, amsgrad):
    for kwargs in inputs(adamw):
        optimizer = build(layer(), **{**kwargs, "amsgrad": amsgrad})
        before = bits([*params_of(optimizer)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer.step()
        assert bits([*params_of(optimizer)]) == before
        assert not optimizer.state


def test_step_is_noop_for_zero_grads(adamw, build):
    for kwargs in inputs(adamw):
        optimizer = build(layer(), **{**kwargs, "weight_decay": 0})
        before = bits([*params_of(optimizer)])
        for p in params_of(optimizer):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert bits([*params_of(optimizer)]) == before


def test_step_is_noop_for_empty_tensors_and_gradients(adamw, build):
    for kwargs in inputs(adamw):
        optimizer = build([nn.Parameter(torch.empty(0, dtype=torch.float64))], **kwargs)
        optimizer.param_groups[0]["params"][0].grad = torch.empty(0, dtype=torch.float64)
        optimizer.step()


def test_optimizer_can_be_printed(adamw, build):
    for kwargs in inputs(adamw):
        optimizer = build(layer(), **kwargs)
        assert repr(optimizer).startswith("FusedAdamW (\nParameter Group 0\n    amsgrad: ")


@pytest.mark.parametrize("is_named", [False, True])
def test_state_dict_deterministic(adamw, build, is_named):
    for kwargs in inputs(adamw):
        params = layer()
        optimizer = build([("w", params[0]), ("b", params[1])] if is_named else params, **kwargs)
        trained(optimizer, 10)
        clones = [nn.Parameter(p.detach().clone()) for p in params]
        other = build([("w", clones[0]), ("b", clones[1])] if is_named else clones, **kwargs)
        other.load_state_dict(optimizer.state_dict())
        for _ in range(10):
            trained(optimizer, 1), trained(other, 1)
            assert bits(params_of(optimizer)) == bits(params_of(other))
        # gradients and state of the two are equal, and so is what they save
        assert bits(torchs(optimizer)) == bits(torchs(other))


def torchs(optimizer: torch.optim.Optimizer) -> Any:
    state = optimizer.state_dict()
    return [state["state"], [list(group.items()) for group in state["param_groups"]]]


def test_can_load_older_state_dict(adamw, build):
    newer = [
        "maximize",
        "foreach",
        "fused",
        "differentiable",
        "capturable",
        "decoupled_weight_decay",
        "amsgrad",
    ]
    for kwargs in inputs(adamw):
        optimizer = build(layer(), **kwargs)
        trained(optimizer)
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for key in newer:
                del group[key]
        # what the file does not say is as the constructor says
        other = build([nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], **kwargs)
        other.load_state_dict(state)
        trained(other), trained(optimizer)
        assert bits(params_of(optimizer)) == bits(params_of(other))
        assert other.param_groups[0].keys() == optimizer.param_groups[0].keys()


def test_save_load_equality_with_weights_only(adamw, build):
    for kwargs in inputs(adamw):
        optimizer = build(layer(), **kwargs)
        trained(optimizer)
        state = optimizer.state_dict()
        assert bits(through_a_file(state)) == bits(state)


def test_load_nontensor_step(adamw, build):
    for kwargs in inputs(adamw):
        optimizer, stock = build(layer(), **kwargs), torch.optim.AdamW(layer(), **kwargs)
        trained(optimizer), trained(stock)
        state = copy.deepcopy(optimizer.state_dict())
        for entry in state["state"].values():
            entry["step"] = entry["step"].item()
        optimizer.load_state_dict(state)
        trained(optimizer), trained(stock)
        assert_equal(optimizer, stock)


def test_can_load_from_to_named_state_dict(adamw, build):
    for kwargs in inputs(adamw):
        weight, bias = layer()
        named = build([("w", weight), ("b", bias)], **kwargs)
        trained(named)
        unnamed = build([nn.Parameter(p.detach().clone()) for p in (weight, bias)], **kwargs)
        unnamed.load_state_dict(named.state_dict())
        back = build(
            [("w", nn.Parameter(weight.detach().clone())), ("b", nn.Parameter(bias.detach().clone()))],
            **kwargs,
        )
        back.load_state_dict(unnamed.state_dict())
        for optimizer in (named, unnamed, back):
            trained(optimizer)
        assert bits(params_of(named)) == bits(params_of(unnamed)) == bits(params_of(back))
        assert back.param_groups[0]["param_names"] == ["w", "b"]


def test_deepcopy_copies_all_public_attrs(adamw, build):
    def public(optimizer: Any) -> set[str]:
        return {name for name in optimizer.__dict__ if not name.startswith("_")}

    for kwargs in inputs(adamw):
        optimizer = build(layer(), **kwargs)
        trained(optimizer)
        other = copy.deepcopy(optimizer)
        assert public(optimizer) == public(other)
        trained(optimizer), trained(other)
        assert bits(params_of(optimizer)) == bits(params_of(other))


def test_non_empty_state(adamw, build):
    for kwargs in inputs(adamw):
        optimizer, stock = build(layer(), **kwargs), torch.optim.AdamW(layer(), **kwargs)
        trained(optimizer), trained(stock)
        for p, q in zip(params_of(optimizer), params_of(stock), strict=True):
            assert optimizer.state[p].keys() == stock.state[q].keys()


def test_state_dict_hooks(build):
    optimizer = build(layer())
    trained(optimizer)
    order: list[str] = []

    def post(self: Any, state: dict[str, Any]) -> dict[str, Any]:
        order.append("post")
        assert "fusedlr" in state
        return {**state, "mine": 3}

    optimizer.register_state_dict_pre_hook(lambda self: order.append("pre"))
    optimizer.register_state_dict_pre_hook(lambda self: order.append("first"), prepend=True)
    optimizer.register_state_dict_post_hook(post)
    optimizer.register_state_dict_post_hook(lambda self, state: order.append("early"), prepend=True)
    state = optimizer.state_dict()
    assert order == ["first", "pre", "early", "post"]
    assert state["mine"] == 3

    other = build(layer())
    order.clear()

    def pre(self: Any, state: dict[str, Any]) -> dict[str, Any]:
        order.append("pre")
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] = 0.002
        return state

    other.register_load_state_dict_pre_hook(pre)
    other.register_load_state_dict_pre_hook(lambda self, state: order.append("first"), prepend=True)
    other.register_load_state_dict_post_hook(lambda self: order.append("post"))
    other.register_load_state_dict_post_hook(lambda self: order.append("early"), prepend=True)
    other.load_state_dict(state)
    assert order == ["first", "pre", "early", "post"]
    assert other.param_groups[0]["lr"] == 0.002
    assert state["param_groups"][0]["lr"] == optimizer.param_groups[0]["lr"]


def test_fused_does_not_step_if_foundinf(adamw, build):
    for kwargs in inputs(adamw):
        optimizer = build(layer(), **kwargs)
        before = bits(params_of(optimizer))
        optimizer.grad_scale, optimizer.found_inf = None, torch.tensor(1.0)
        trained(optimizer, 3)
        assert bits(params_of(optimizer)) == before
        assert all(entry["step"] == 0 for entry in optimizer.state.values())


@pytest.mark.parametrize("default", [torch.float64, torch.float32, torch.bfloat16])
def test_set_default_dtype_works(adamw, build, default):
    torch.set_default_dtype(default)
    try:
        for kwargs in inputs(adamw, torch.float32):
            optimizer, stock = (
                make(layer(torch.float32), **kwargs)
                for make in (build, lambda *a, **k: torch.optim.AdamW(*a, **k))
            )
            trained(optimizer), trained(stock)
            for p, q in zip(params_of(optimizer), params_of(stock), strict=True):
                torch.testing.assert_close(p, q)
                assert optimizer.state[p]["step"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)
