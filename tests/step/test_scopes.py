"""Scopes: which groups belong together, what each is told, and what a step leaves alone.

That adapters in one optimizer equal optimizers of their own is tests/state/test_scope_machine.py's.
"""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch
from kit import SCHEDULE, make, make_params, quiet, recorded, set_grads, silent
from snapshots import changes, snapshot, unchanged
from torch import Tensor, nn

import fusedlr
from fusedlr import scope_state

DTYPES = (torch.float32, torch.bfloat16)


def adapters(
    *names: str, device: str = "cpu", backend: str = "auto", limit: float | None = 1.0, **options: Any
) -> fusedlr.FusedAdamW:
    """An optimizer with two groups per scope of these names, all with gradients."""
    groups = []
    for name in names:
        params = make_params(DTYPES, device=device)
        shared = {"scope": name, "max_grad_norm": limit}
        groups += [{"params": params[:3], **shared}, {"params": params[3:], "lr": 0.2, **shared}]
    optimizer = fusedlr.FusedAdamW(groups, lr=0.05, backend=backend, **{"schedule": SCHEDULE, **options})
    set_grads(optimizer, 0)
    return optimizer


def params_of(optimizer: Any, name: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups if group.get("scope") == name for p in group["params"]]


def values(optimizer: Any, name: Any) -> list[Tensor]:
    """All that a step could move of a scope."""
    found = []
    for p in params_of(optimizer, name):
        found += [p.detach().clone(), *(x.clone() for x in (optimizer.state.get(p) or {}).values())]
    k = [group["k"] for group in optimizer.param_groups if group.get("scope") == name]
    return [*found, torch.tensor(k)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# which scopes there are


def test_scopes_are_in_the_order_of_their_first_groups():
    p = [nn.Parameter(torch.ones(2)) for _ in range(5)]
    names = ("b", None, "a", "b", None)
    groups = [{"params": [x], "scope": name} for x, name in zip(p, names, strict=True)]
    assert fusedlr.FusedAdamW(groups).scopes == ("b", None, "a")
    assert fusedlr.FusedAdamW(groups, groups="independent").scopes == ("b", 1, "a", 4)
    assert fusedlr.FusedAdamW([{"params": p, "scope": "b"}]).scopes == ("b",)
    assert fusedlr.FusedAdamW(p).scopes == (None,)


def test_metrics_are_per_scope_in_that_order(device, backend):
    optimizer = adapters("b", "a", device=device, backend=backend)
    params_of(optimizer, "a")[0].grad.view(-1)[0] = math.inf
    optimizer.step()
    metrics = optimizer.last_metrics()
    assert metrics["scopes"] == ("b", "a") and metrics["skipped"] == [0, 1]
    assert math.isfinite(metrics["grad_norm"][0]) and not math.isfinite(metrics["grad_norm"][1])
    assert len(metrics["lr"]) == len(metrics["step"]) == 4
    assert optimizer.metrics()["coef"].shape == optimizer.grad_norm().shape == (2,)


def test_one_named_scope_has_metrics_with_one_entry():
    optimizer = adapters("a")
    optimizer.step()
    assert optimizer.metrics()["grad_norm"].shape == (1,) and optimizer.last_metrics()["skipped"] == [0]


@pytest.mark.parametrize("name", ["", 1, ("a",), True])
def test_a_scope_that_is_no_name_is_refused(name):
    with pytest.raises(ValueError, match="must be a name, a string that is not empty"):
        fusedlr.FusedAdamW([{"params": [nn.Parameter(torch.ones(2))], "scope": name}])


@pytest.mark.parametrize(
    ("option", "one", "other"), [("max_grad_norm", 1.0, None), ("nonfinite", "skip", None)]
)
def test_groups_of_a_scope_that_disagree_are_refused(option, one, other):
    p, q, r = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = fusedlr.FusedAdamW(
        [{"params": [p], "scope": "a", option: one}, {"params": [r], "scope": "a"}]
    )
    with unchanged(optimizer), pytest.raises(ValueError, match=f"scope 'a' has {option}="):
        optimizer.add_param_group({"params": [q], "scope": "a", option: other})
    assert len(optimizer.param_groups) == 2
    # and where one is assigned later
    optimizer.param_groups[1][option] = other
    set_grads(optimizer, 0)
    with pytest.raises(ValueError, match=f"scope 'a' has {option}="):
        optimizer.step()


@pytest.mark.parametrize("option", ["max_grad_norm", "nonfinite"])
def test_a_joint_group_has_no_limit_of_its_own(option):
    given = {"params": [nn.Parameter(torch.ones(2))], option: 1.0 if option == "max_grad_norm" else "skip"}
    with pytest.raises(ValueError, match="needs groups='independent' or a scope of the group's own"):
        fusedlr.FusedAdamW([given])
    assert fusedlr.FusedAdamW([given], groups="independent").scopes == (0,)
    # nor is one assigned later
    optimizer = fusedlr.FusedAdamW(given["params"])
    optimizer.param_groups[0][option] = given[option]
    set_grads(optimizer)
    with unchanged(optimizer), pytest.raises(ValueError, match=r"group 0: .* joint groups share one norm"):
        optimizer.step()


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("max_grad_norm", 0.0, "group 1: max_grad_norm=0.0 must be a number above 0"),
        ("nonfinite", "halt", "group 1: nonfinite='halt' is unknown"),
        ("scope", "", "group 1: scope='' must be a name"),
    ],
)
def test_what_is_assigned_to_a_group_of_a_scope_is_held_to_what_may_be_given(option, value, message):
    optimizer = adapters("a")
    optimizer.param_groups[1][option] = value
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.step()


def test_groups_whose_scope_is_none_have_limits_of_their_own():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    groups = [{"params": [x], "scope": None, "max_grad_norm": n} for x, n in ((p, 1), (q, 2))]
    optimizer = fusedlr.FusedAdamW(groups, groups="independent")
    limits = [group["max_grad_norm"] for group in optimizer.param_groups]
    assert limits == [1.0, 2.0] and {type(limit) for limit in limits} == {float}


def test_what_a_scope_does_not_say_is_the_optimizers(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend, limit=None, max_grad_norm=1e-3)
    for group in optimizer.param_groups[2:]:
        # None is a value, and no value is the optimizer's
        del group["max_grad_norm"]
    optimizer.step()
    assert optimizer.metrics()["coef"][0] == 1 and optimizer.metrics()["coef"][1] < 1


def test_the_repr_shows_scopes():
    text = repr(adapters("first", "second", schedule=None))
    assert "group 0: scope 'first'" in text and "group 3: scope 'second'" in text


# which of them step


@pytest.mark.parametrize("told", ["names", "one name", "a tensor", "the attribute"])
def test_nothing_of_the_other_scopes_moves(device, backend, told):
    optimizer = adapters("a", "b", "c", device=device, backend=backend)
    with quiet():
        optimizer.step()
    before = {name: values(optimizer, name) for name in "abc"}
    versions = {name: [p._version for p in params_of(optimizer, name)] for name in "ac"}
    metrics = optimizer.metrics()
    # no gradient of another scope is looked at
    for name in "ac":
        params_of(optimizer, name)[0].grad.fill_(math.nan)
    only = {
        "names": ["b"],
        "one name": "b",
        "a tensor": torch.tensor([False, True, False], device=device),
        "the attribute": None,
    }[told]
    if told == "the attribute":
        optimizer.only = ("b",)
    optimizer.step(only=only)
    assert same(values(optimizer, "a"), before["a"]) and same(values(optimizer, "c"), before["c"])
    assert not same(values(optimizer, "b"), before["b"])
    now = optimizer.metrics()
    for key in ("grad_norm", "coef", "skipped"):
        assert torch.equal(now[key][::2], metrics[key][::2])
    assert now["step"].tolist() == [1, 1, 2, 2, 1, 1]
    if told != "a tensor":
        # a backward through the others is not stale
        assert versions == {name: [p._version for p in params_of(optimizer, name)] for name in "ac"}
        assert [group["lr"] for group in optimizer.param_groups[:2]] == [0.0, 0.0]


def test_an_empty_choice_steps_nothing(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    before = snapshot(optimizer)
    optimizer.step(only=())
    assert changes(before, snapshot(optimizer)) in ([], ["state"])
    assert optimizer.metrics()["step"].tolist() == [0] * 4


def test_the_joint_scope_is_none_and_an_independent_one_an_index(device, backend):
    joint = adapters("a", device=device, backend=backend)
    joint.add_param_group({"params": make_params((torch.float32,), device=device)})
    set_grads(joint, 0)
    joint.step(only=[None])
    assert joint.metrics()["step"].tolist() == [0, 0, 1]
    joint.step(only=["a"])
    assert joint.metrics()["step"].tolist() == [1, 1, 1]
    params = make_params(DTYPES, device=device)
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    independent = fusedlr.FusedAdamW(groups, lr=0.1, groups="independent", backend=backend)
    set_grads(independent, 0)
    independent.step(only=[1])
    assert independent.metrics()["step"].tolist() == [0, 1]


def test_all_groups_of_a_scope_are_counted_with_one_gradient(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    for p in params_of(optimizer, "a")[:-2] + params_of(optimizer, "b"):
        p.grad = None
    optimizer.step()
    # of a named scope without any gradient nothing is counted
    assert optimizer.metrics()["step"].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("only", "error", "message"),
    [
        (["frist"], ValueError, "only='frist' is no scope .* 'first', 'second'; did you mean 'first'"),
        ([0], ValueError, "only=0 is no scope"),
        ([None], ValueError, "only=None is no scope"),
        (3, TypeError, "only=3 must be scopes or a tensor"),
        (torch.tensor([True]), ValueError, r"only is a tensor of torch.bool and shape \(1,\).*\(2,\)"),
        (torch.tensor([1, 0]), ValueError, "only is a tensor of torch.int64"),
    ],
)
def test_scopes_that_there_are_not_are_refused(only, error, message):
    optimizer = adapters("first", "second")
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.step(only=only)
    with pytest.raises(error, match=message):
        optimizer.only = only
    assert optimizer.only is None
    if not isinstance(only, Tensor):
        with unchanged(optimizer), pytest.raises(error, match=message):
            optimizer.zero_grad(only=only)
    for method in (optimizer.scope_state_dict, optimizer.reset_scope, optimizer.remove_scope):
        with unchanged(optimizer), pytest.raises(ValueError, match="name='other' is no scope"):
            method("other")


def test_scopes_that_are_called_by_an_index_are_no_names():
    optimizer = fusedlr.FusedAdamW([{"params": [p]} for p in make_params()[:2]], groups="independent")
    for only in ("first", True):
        with pytest.raises(
            ValueError, match=rf"only={only!r} is no scope of this optimizer, which has 0, 1$"
        ):
            optimizer.step(only=[only])
    optimizer.param_groups.clear()
    assert optimizer.scopes == ()
    with pytest.raises(ValueError, match=r"only=0 is no scope of this optimizer, which has none$"):
        optimizer.step(only=[0])


def test_zero_grad_of_some_scopes():
    optimizer = adapters("a", "b")
    optimizer.zero_grad(only=["b"])
    assert all(p.grad is not None for p in params_of(optimizer, "a"))
    assert all(p.grad is None for p in params_of(optimizer, "b"))
    optimizer.only = "a"
    set_grads(optimizer, 0)
    optimizer.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in params_of(optimizer, "a"))
    assert any(p.grad.any() for p in params_of(optimizer, "b"))
    with pytest.raises(ValueError, match="takes the names of scopes, not a tensor"):
        optimizer.zero_grad(only=torch.tensor([True, False]))


def test_hooks_see_and_change_which_scopes_step():
    optimizer = adapters("a", "b")
    seen = []
    optimizer.register_step_pre_hook(lambda _, args, kwargs: seen.append(kwargs) or (args, {"only": "b"}))
    optimizer.step(only="a")
    assert seen == [{"only": "a"}] and optimizer.metrics()["step"].tolist() == [0, 0, 1, 1]


def test_an_assigned_rate_waits_for_its_scope():
    optimizer = adapters("a", "b")
    optimizer.param_groups[0]["lr"] = 0.125
    with recorded() as caught:
        optimizer.step(only="b")
        assert not caught and optimizer.param_groups[0]["lr"] == 0.125
        optimizer.step(only="a")
    assert ["was assigned to group 0" in str(w.message) for w in caught] == [True]
    assert optimizer.last_metrics()["lr"][0] == 0.125


def test_an_assigned_rate_waits_for_a_gradient_of_its_scope(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    optimizer.step()
    for p in params_of(optimizer, "a"):
        p.grad = None
    optimizer.param_groups[0]["lr"] = 0.125
    optimizer.step()
    assert optimizer.param_groups[0]["lr"] == 0.125
    set_grads(optimizer, 1)
    with quiet():
        optimizer.step()
    assert optimizer.last_metrics()["lr"][0] == 0.125
    optimizer.step()
    assert optimizer.last_metrics()["lr"][0] == pytest.approx(SCHEDULE.lr_at(2, 0.05))


@pytest.mark.parametrize("only", ["a", "b"])
def test_a_plain_dict_in_a_groups_place_keeps_its_scope(only):
    optimizer = adapters("a", "b")
    optimizer.step()
    # as wrappers put them, of which only the group that was there knows the scope
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    optimizer.step(only=only)
    assert optimizer.scopes == ("a", "b")
    assert optimizer.metrics()["step"].tolist() == ([2, 2, 1, 1] if only == "a" else [1, 1, 2, 2])
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])
    optimizer.zero_grad(only="a")
    assert all(p.grad is None for p in params_of(optimizer, "a"))
    assert all(p.grad is not None for p in params_of(optimizer, "b"))


def test_a_norm_of_other_scopes_is_not_taken_over(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    optimizer.step()
    optimizer.grad_norm()
    for group in optimizer.param_groups:
        group["scope"] = "both"
    optimizer.step()
    assert torch.equal(optimizer.metrics()["grad_norm"], optimizer.grad_norm())


# what decides whether a scope skips


def test_a_scalers_flag_does_not_hold_up_scopes_that_have_a_norm(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    optimizer.add_param_group({"params": make_params((torch.float32,), device=device), "scope": "unnormed"})
    set_grads(optimizer, 0)
    params_of(optimizer, "b")[0].grad.view(-1)[0] = math.nan
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    # one without a norm has nothing else to go by
    assert optimizer.metrics()["skipped"].tolist() == [0, 1, 1]
    assert optimizer.metrics()["step"].tolist() == [1, 1, 0, 0, 0]


def test_a_scalers_flag_does_not_hold_up_scopes_that_skip_without_a_limit(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend, limit=None, nonfinite="skip")
    params_of(optimizer, "b")[0].grad.view(-1)[0] = math.nan
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert optimizer.metrics()["skipped"].tolist() == [0, 1]


@pytest.mark.parametrize("found", [0.0, 1.0])
def test_a_scope_that_propagates_skips_what_the_scaler_found_in_it(device, backend, found):
    optimizer = adapters("a", "b", device=device, backend=backend, nonfinite="propagate")
    params_of(optimizer, "b")[0].grad.view(-1)[0] = math.inf
    optimizer.grad_scale = torch.tensor(2.0, device=device)
    optimizer.found_inf = torch.tensor(found, device=device)
    optimizer.step()
    assert optimizer.metrics()["skipped"].tolist() == [0, int(found)]


def test_ten_skips_in_a_row_are_told_of_each_scope():
    optimizer = adapters("good", "bad", "worse")
    for name in ("bad", "worse"):
        params_of(optimizer, name)[0].grad.fill_(math.nan)
    for _ in range(9):
        optimizer.step()
    with pytest.warns(UserWarning, match="10 optimizer steps in a row were skipped") as caught:
        optimizer.step()
    assert ["of scope 'bad'" in str(w.message) for w in caught] == [True, False]
    assert ["of scope 'worse'" in str(w.message) for w in caught] == [False, True]
    # not the largest norm of any scope
    assert all("last gradient norm nan" in str(w.message) for w in caught)
    for _ in range(3):
        optimizer.step()
    # another tenant in the same place
    optimizer.reset_scope("bad")
    with pytest.warns(UserWarning, match="gradients of scope 'bad' are inf or nan") as caught:
        for _ in range(10):
            optimizer.step()
    assert len(caught) == 1


# what is done to one scope


def test_reset_and_load_write_over_the_tensors_that_are_there(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    for _ in range(3):
        optimizer.step()
    file, addresses = optimizer.scope_state_dict("a"), all_addresses(optimizer)
    other, ks = values(optimizer, "b"), optimizer._counts.counters.k.clone()
    optimizer.reset_scope("a", lr=0.1)
    assert all_addresses(optimizer) == addresses and same(values(optimizer, "b"), other)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.4, 0.05, 0.2]
    # the rate of the coming update of the one, and the one that the other has used
    assert [group["lr"] for group in optimizer.param_groups[:2]] == [0.0, 0.0]
    assert optimizer.param_groups[2]["lr"] == SCHEDULE.lr_at(2, 0.05)
    assert not any(x.any() for p in params_of(optimizer, "a") for x in optimizer.state[p].values())
    optimizer.load_scope_state_dict("a", file)
    assert all_addresses(optimizer) == addresses and same(values(optimizer, "b"), other)
    assert torch.equal(optimizer._counts.counters.k, ks)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.05, 0.2, 0.05, 0.2]


def all_addresses(optimizer: Any) -> list[int]:
    return [x.data_ptr() for entry in optimizer.state.values() for x in entry.values()]


def test_a_reset_keeps_other_scopes_runs_of_skips(device, backend):
    optimizer = adapters("a", "b", device=device, backend=backend)
    for p in params_of(optimizer, "b"):
        p.grad.fill_(math.nan) if p.grad is not None else None
    optimizer.step()
    optimizer.reset_scope("a")
    assert optimizer._counts.counters.skips_in_row.tolist() == [0, 0, 1, 1]
    assert optimizer.metrics()["skipped"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr=-1.0"),
        ({"lr": torch.tensor(1.0)}, ValueError, "is a tensor"),
        ({"schedule": 3}, TypeError, "schedule"),
        ({"lr": 1e-3, "schedule": fusedlr.cosine(total_steps=9, min_lr=0.5)}, ValueError, "min_lr"),
    ],
)
def test_a_reset_with_bad_arguments_changes_nothing(arguments, error, message):
    optimizer = adapters("a", "b")
    optimizer.step()
    with unchanged(optimizer), pytest.raises(error, match=message):
        optimizer.reset_scope("a", **arguments)


def test_a_reset_gives_a_rate_then_a_schedule():
    optimizer = adapters("a", schedule=None)
    optimizer.step()
    optimizer.reset_scope("a", lr=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.4]
    assert not any("initial_lr" in group for group in optimizer.param_groups)
    optimizer.reset_scope("a", schedule=SCHEDULE)
    assert [group["schedule"] for group in optimizer.param_groups] == [SCHEDULE] * 2
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.4]


def test_a_schedule_is_not_given_to_a_tensor_rate():
    optimizer = make([{"params": make_params((torch.float32,)), "scope": "a", "lr": torch.tensor(0.1)}])
    with pytest.raises(ValueError, match="is a tensor, which a schedule cannot drive"):
        optimizer.reset_scope("a", schedule=SCHEDULE)
    optimizer.reset_scope("a")


def test_a_peak_of_0_cannot_be_scaled():
    optimizer = adapters("a")
    optimizer.param_groups[0]["initial_lr"] = 0.0
    with pytest.raises(ValueError, match=r"lr=0.1 cannot scale the peaks of this scope"):
        optimizer.reset_scope("a", lr=0.1)


def test_a_scopes_file_loads_into_stock_adamw():
    groups = [{"params": [p], "scope": name} for name in "aabb" for p in make_params((torch.float32,))[:1]]
    optimizer = fusedlr.FusedAdamW(groups, lr=0.05)
    set_grads(optimizer, 0)
    for _ in range(3):
        optimizer.step(only="b")
    file = optimizer.scope_state_dict("b")
    file.pop("fusedlr")
    params = [nn.Parameter(p.detach().clone()) for p in params_of(optimizer, "b")]
    stock = torch.optim.AdamW([{"params": params[:1]}, {"params": params[1:]}])
    stock.load_state_dict(file)
    for mine, theirs in zip(params_of(optimizer, "b"), params, strict=True):
        theirs.grad = mine.grad.clone()
    stock.step()
    optimizer.step(only="b")
    for mine, theirs in zip(params_of(optimizer, "b"), params, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_a_scopes_file_holds_copies():
    optimizer = adapters("a")
    optimizer.step()
    file = optimizer.scope_state_dict("a")
    kept = file["state"][0]["exp_avg"].clone()
    optimizer.reset_scope("a")
    assert torch.equal(file["state"][0]["exp_avg"], kept) and kept.any()


def named(name: str) -> list[dict[str, Any]]:
    """An adapter's groups, with PEFT's names of their parameters."""
    a, b = (nn.Parameter(torch.full((2, 2), float(i))) for i in (1, 2))
    place = "base_model.model.layers.0.q_proj"
    pairs = [(f"{place}.lora_A.{name}.weight", a), (f"{place}.lora_B.{name}.weight", b)]
    return [{"params": pairs, "scope": name}]


def test_names_are_free_of_the_slot_and_match_in_any_order():
    optimizer = fusedlr.FusedAdamW(named("tenant-1"), lr=0.1)
    set_grads(optimizer, 0)
    optimizer.step()
    file = optimizer.scope_state_dict("tenant-1")
    place = "base_model.model.layers.0.q_proj"
    assert file["param_groups"][0]["param_names"] == [f"{place}.lora_A.weight", f"{place}.lora_B.weight"]
    group = named("slot 7")[0]
    other = fusedlr.FusedAdamW([{**group, "params": group["params"][::-1]}], lr=0.1)
    other.load_scope_state_dict("slot 7", file)
    b, a = other.param_groups[0]["params"]
    mine = optimizer.param_groups[0]["params"]
    for p, q in ((a, mine[0]), (b, mine[1])):
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])
    # a whole file of an optimizer of that adapter alone, with the name that it has there
    other.load_scope_state_dict("slot 7", optimizer.state_dict())
    assert torch.equal(other.state[a]["exp_avg"], optimizer.state[mine[0]]["exp_avg"])


def test_a_whole_file_has_the_slots_name_where_peft_names_nothing():
    pairs = [(f"adapters.{place}.down", nn.Parameter(torch.ones(2))) for place in ("first", "first.up")]
    optimizer = fusedlr.FusedAdamW([{"params": pairs, "scope": "first"}], lr=0.1)
    set_grads(optimizer, 0)
    optimizer.step()
    other = fusedlr.FusedAdamW([{"params": pairs[::-1], "scope": "first"}], lr=0.1)
    other.load_scope_state_dict("first", optimizer.state_dict())
    for _, p in pairs:
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[p]["exp_avg"])


def test_parameters_without_names_are_matched_by_their_places():
    optimizer, other = (fusedlr.FusedAdamW(named("a"), lr=0.1) for _ in range(2))
    set_grads(optimizer, 0)
    optimizer.step()
    del other.param_groups[0]["param_names"]
    other.load_scope_state_dict("a", optimizer.scope_state_dict("a"))
    for p, q in zip(params_of(other, "a"), params_of(optimizer, "a"), strict=True):
        assert torch.equal(other.state[p]["exp_avg"], optimizer.state[q]["exp_avg"])


def test_a_scope_goes_on_with_its_schedule_from_a_file_of_stock_adamw():
    optimizer = adapters("a")
    params = params_of(optimizer, "a")
    stock = torch.optim.AdamW([{"params": params[:3]}, {"params": params[3:]}], lr=0.5)
    stock.step(), stock.step()
    optimizer.load_scope_state_dict("a", stock.state_dict())
    assert [group["schedule"] for group in optimizer.param_groups] == [SCHEDULE] * 2
    assert [group["k"] for group in optimizer.param_groups] == [2, 2]


def test_a_file_of_two_adapters_is_none_of_one():
    both = [*named("first")[0]["params"], *named("second")[0]["params"]]
    optimizer = fusedlr.FusedAdamW(both, lr=0.1)
    set_grads(optimizer, 0)
    optimizer.step()
    other = fusedlr.FusedAdamW(named("first"), lr=0.1)
    with unchanged(other), pytest.raises(ValueError, match=r"has 4 parameters, this optimizer's has 2"):
        other.load_scope_state_dict("first", optimizer.state_dict())


def test_a_file_may_hold_the_tensors_that_are_there():
    optimizer = adapters("a")
    optimizer.step()
    before = values(optimizer, "a")
    optimizer.load_scope_state_dict("a", optimizer.state_dict())
    assert same(values(optimizer, "a"), before)


@pytest.mark.parametrize("here", [None, SCHEDULE])
@pytest.mark.parametrize("there", [None, fusedlr.cosine(total_steps=9)])
def test_a_scope_takes_its_options_and_its_schedule_along(there, here):
    # of which neither is the default here
    nonfinite = "propagate" if here is None else "skip"
    options = {"weight_decay": 0.25, "betas": (0.8, 0.9), "amsgrad": True, "nonfinite": nonfinite}
    optimizer = adapters("a", schedule=there, limit=3.0, **options)
    optimizer.step()
    other = adapters("b", schedule=here, limit=2.0 if here is None else None)
    other.load_scope_state_dict("b", optimizer.scope_state_dict("a"))
    mine, theirs = ([*optimizer.param_groups], [*other.param_groups])
    for name in ("weight_decay", "betas", "amsgrad", "max_grad_norm", "schedule", "initial_lr", "k"):
        assert [group.get(name) for group in theirs] == [group.get(name) for group in mine], name
    assert {group["scope"] for group in theirs} == {"b"}
    assert {group["nonfinite"] for group in theirs} == {nonfinite}
    optimizer.step(), other.step()
    assert [group["lr"] for group in theirs] == [group["lr"] for group in mine]


def test_a_reset_leaves_what_no_step_knows():
    optimizer = adapters("a")
    optimizer.step()
    optimizer.state[params_of(optimizer, "a")[0]]["note"] = "of a tool"
    optimizer.reset_scope("a")
    assert optimizer.state[params_of(optimizer, "a")[0]]["note"] == "of a tool"


def test_a_scope_that_has_made_no_step_has_no_state_to_save():
    optimizer = adapters("a", "b")
    with unchanged(optimizer):
        file = optimizer.scope_state_dict("a")
    assert file["state"] == {} == optimizer.state
    optimizer.reset_scope("a")
    assert optimizer.state == {}


def test_a_file_of_other_parameters_is_refused():
    optimizer = fusedlr.FusedAdamW(named("a"), lr=0.1)
    set_grads(optimizer, 0)
    optimizer.step()
    file = optimizer.scope_state_dict("a")
    file["param_groups"][0]["param_names"][1] = "elsewhere.lora_B.weight"
    with unchanged(optimizer), pytest.raises(ValueError, match=r"has no parameter .*lora_B.weight"):
        optimizer.load_scope_state_dict("a", file)


@pytest.mark.parametrize("spoil", ["shape", "k", "limit", "groups", "no dict"])
def test_a_bad_file_changes_nothing(spoil):
    optimizer = adapters("a", "b")
    optimizer.step()
    file = optimizer.scope_state_dict("a")
    if spoil == "shape":
        file["state"][0]["exp_avg"] = torch.zeros(7)
    elif spoil == "k":
        file["fusedlr"]["groups"][1]["k"] = -1
    elif spoil == "limit":
        file["fusedlr"]["groups"][1]["max_grad_norm"] = 7.0
    elif spoil == "groups":
        file["param_groups"].pop()
    else:
        file = None
    with unchanged(optimizer), pytest.raises(ValueError):
        optimizer.load_scope_state_dict("a", file)


def test_a_file_whose_scopes_are_in_another_order_is_refused():
    optimizer = adapters("a", "b")
    other = adapters("b", "a")
    with unchanged(other), pytest.raises(ValueError, match="is of scope 'a', this optimizer's is of 'b'"):
        other.load_state_dict(optimizer.state_dict())


def test_a_group_joins_its_scope_where_that_is():
    optimizer = adapters("a", "b")
    for _ in range(3):
        optimizer.step(only="b")
    optimizer.step(only="a")
    for scope, k in (("a", 1), ("b", 3)):
        new = {"params": make_params((torch.float32,)), "scope": scope, "max_grad_norm": 1.0}
        optimizer.add_param_group({**new, "join": True})
        assert optimizer.param_groups[-1]["k"] == k


def test_a_removed_scope_comes_back_as_new():
    optimizer = adapters("a", "b")
    optimizer.only = ("a", "b")
    optimizer.step()
    params = params_of(optimizer, "a")
    optimizer.remove_scope("a")
    assert optimizer.scopes == ("b",) == optimizer.only and not any(p in optimizer.state for p in params)
    # also in the shape in which tools put groups
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": params})
    optimizer.only = None
    optimizer.step()
    assert optimizer.param_groups[-1]["k"] == 1


def test_what_may_step_follows_a_removal():
    optimizer = adapters("a", "b")
    optimizer.only = "a"
    optimizer.remove_scope("a")
    assert optimizer.only == ()
    params = [nn.Parameter(torch.ones(2)) for _ in range(4)]
    independent = fusedlr.FusedAdamW([{"params": [p]} for p in params], groups="independent")
    independent.only = (0, 2)
    independent.remove_scope(0)
    # the scope that was called 2 is called 1 now
    assert independent.only == (1,)
    set_grads(independent, 0)
    independent.step()
    assert [bool((p != 1).all()) for p in params] == [False, False, True, False]


def test_a_removal_in_another_thread_waits_for_a_load(monkeypatch):
    optimizer = adapters("a", "b")
    for _ in range(3):
        optimizer.step(only="b")
    file, read = optimizer.scope_state_dict("b"), scope_state.read
    optimizer.step()
    removal = threading.Thread(target=optimizer.remove_scope, args=["a"])

    def while_another_removes(*given: Any) -> Any:
        removal.start()
        removal.join(0.2)
        return read(*given)

    monkeypatch.setattr(scope_state, "read", while_another_removes)
    optimizer.load_scope_state_dict("b", file)
    removal.join()
    assert optimizer.scopes == ("b",) and [group["k"] for group in optimizer.param_groups] == [3, 3]


def test_a_file_holds_a_copy_of_a_rate():
    lr = torch.tensor(0.5)
    optimizer = fusedlr.FusedAdamW([{"params": [nn.Parameter(torch.ones(2))], "scope": "a"}], lr=lr)
    file = optimizer.scope_state_dict("a")
    lr.fill_(0.25)
    assert file["param_groups"][0]["lr"] == 0.5


def test_an_extended_schedule_shows_every_scopes_own_rate():
    schedule = fusedlr.linear(total_steps=10)
    optimizer = adapters("a", "b", schedule=schedule)
    optimizer.step(only="a")
    optimizer.scheduler.step()
    optimizer.step(only="b")
    optimizer.extend_schedule(20)
    rates = [group["lr"] / group["initial_lr"] for group in optimizer.param_groups]
    # the coming one of a, and the one that b has used
    assert rates == pytest.approx([1 - 1 / 20, 1 - 1 / 20, 1, 1])


def test_the_rate_on_show_is_the_one_that_each_scope_has_used():
    optimizer = adapters("a", "b", schedule=fusedlr.linear(total_steps=10))
    optimizer.step()
    optimizer.step(only="a")
    # a plain dict does not tell that its rate is ours
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with silent():
        optimizer.step(only="a")
    optimizer.extend_schedule(20)
    rates = [group["lr"] / group["initial_lr"] for group in optimizer.param_groups]
    assert rates == pytest.approx([0.8, 0.8, 1, 1])
    with silent():
        optimizer.step(only="b")
    assert optimizer.param_groups[2]["lr"] == pytest.approx(0.05 * (1 - 1 / 20))


def test_a_schedulers_state_whose_scopes_are_in_another_order_is_refused():
    optimizer, other = adapters("a", "b"), adapters("b", "a")
    optimizer.step(only="a")
    state = optimizer.scheduler.state_dict()
    with unchanged(other), pytest.raises(ValueError, match="is of scope 'a', this optimizer's is of 'b'"):
        other.scheduler.load_state_dict(state)
    again = adapters("a", "b")
    again.scheduler.load_state_dict(state)
    assert [group["k"] for group in again.param_groups] == [1, 1, 0, 0]
