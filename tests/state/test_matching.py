"""State that finds its parameters by name, groups that keep what is theirs, files that lost what is ours."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    counters,
    make,
    make_params,
    make_stock,
    scheduled,
    set_grads,
    silent,
    step,
    steps,
    through_a_file,
    torchs_part,
    two_groups,
)
from snapshots import bits, params_of, snapshot, unchanged
from torch import nn

import fusedlr

NAMES = ("a", "b", "c", "d")


def named(names: str = "abcd", shapes: tuple[tuple[int, ...], ...] = ((4, 3), (5,), (2,), (3,))) -> list[Any]:
    """Named parameters; a name has the shape of its place in the alphabet."""
    return [(name, make_params(shapes=shapes)["abcd".index(name)]) for name in names]


def state_of(optimizer: torch.optim.Optimizer, name: str) -> Any:
    """The bits of the state of a named parameter."""
    for group in optimizer.param_groups:
        for p, own in zip(group["params"], group["param_names"], strict=True):
            if own == name:
                return bits(dict(optimizer.state.get(p, {})))
    raise KeyError(name)


def ks(optimizer: fusedlr.FusedAdamW) -> list[int]:
    """The step of every group's schedule."""
    return [group["k"] for group in optimizer.param_groups]


# strict=False


def test_parameters_are_found_by_name_in_whatever_order_and_group():
    source = scheduled([{"params": named("ab")}, {"params": named("cd")}])
    steps(source, 0, 4)
    optimizer = scheduled([{"params": named("dca"), "weight_decay": 0.3}, {"params": named("b")}])
    result = optimizer.load_state_dict(through_a_file(source.state_dict()), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    for name in NAMES:
        assert state_of(optimizer, name) == state_of(source, name)
    assert ks(optimizer) == [4, 4]
    # groups keep their options
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(4, PEAK)


def test_what_is_missing_and_what_is_not_used_is_returned_by_name():
    source = scheduled(named("abc"))
    steps(source, 0, 3)
    optimizer = scheduled(named("bcd"))
    steps(optimizer, 0, 1)
    before = state_of(optimizer, "d")
    missing, unexpected = optimizer.load_state_dict(source.state_dict(), strict=False)
    assert (missing, unexpected) == (["d"], ["a"])
    assert state_of(optimizer, "b") == state_of(source, "b")
    # what the file does not have stays as it was
    assert state_of(optimizer, "d") == before
    step(optimizer, 3)
    assert optimizer.metrics()["step"].tolist() == [4]


def test_state_of_another_shape_is_missing_and_not_used():
    source = scheduled(named("ab"))
    steps(source, 0, 3)
    optimizer = scheduled(named("ab", shapes=((4, 3), (7,))))
    result = optimizer.load_state_dict(source.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["b"], ["b"])
    assert params_of(optimizer)[1] not in optimizer.state


def test_an_entry_without_anything_is_missing():
    source, optimizer = scheduled(named("ab")), scheduled(named("ab"))
    for each in (source, optimizer):
        steps(each, 0, 3)
    state, before = source.state_dict(), state_of(optimizer, "b")
    state["state"][1] = {}
    assert optimizer.load_state_dict(state, strict=False) == (["b"], ["b"])
    assert state_of(optimizer, "b") == before


def test_nothing_that_fits_leaves_the_run_where_it_is():
    source = scheduled(named("ab"))
    steps(source, 0, 3)
    optimizer = scheduled(named("cd"))
    steps(optimizer, 0, 5)
    # what loading shows too
    optimizer.scheduler.step()
    with unchanged(optimizer):
        assert optimizer.load_state_dict(source.state_dict(), strict=False) == (["c", "d"], ["a", "b"])


def test_independent_groups_go_on_at_the_k_of_the_groups_that_they_match():
    def build(*groups: str) -> fusedlr.FusedAdamW:
        return scheduled([{"params": named(names)} for names in groups], groups="independent")

    source = build("ab", "cd")
    steps(source, 0, 5, missing=lambda k, i: i > 1 and k % 2 == 0)
    assert ks(source) == [5, 2]
    optimizer = build("d", "a", "bc")
    optimizer.load_state_dict(through_a_file(source.state_dict()), strict=False)
    # the last group has parameters of both
    assert ks(optimizer) == [2, 5, 5]
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [SCHEDULE.lr_at(k, PEAK) for k in (2, 5, 5)]


def test_joint_groups_that_began_later_go_on_at_their_own_k():
    source = scheduled(named("ab"))
    steps(source, 0, 3)
    source.add_param_group({"params": named("c")})
    steps(source, 3, 5)
    optimizer = scheduled([{"params": named(names)} for names in "cad"])
    result = optimizer.load_state_dict(source.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == (["d"], ["b"])
    # what the file does not know joins the run
    assert ks(optimizer) == [2, 5, 5]


def test_a_file_of_stock_adamw_is_matched_by_name_and_its_steps():
    stock = make_stock(named("abcd"))
    steps(stock, 0, 3)
    optimizer = scheduled(named("cab"))
    result = optimizer.load_state_dict(stock.state_dict(), strict=False)
    assert (result.missing_keys, result.unexpected_keys) == ([], ["d"])
    assert ks(optimizer) == [3]
    assert state_of(optimizer, "a") == state_of(stock, "a")


@pytest.mark.parametrize("here", [False, True])
def test_parameters_without_names_are_refused_in_words(here):
    unnamed, other = scheduled(make_params()), scheduled(named())
    for optimizer in (unnamed, other):
        steps(optimizer, 0, 2)
    optimizer, file = (unnamed, other) if here else (other, unnamed)
    where = "group 0 of this optimizer" if here else "group 0 of the loaded state dict"
    message = f"strict=False finds parameters by name, and {where} has no param_names: build both optimizers"
    with unchanged(optimizer), pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(file.state_dict(), strict=False)


def test_a_parameter_that_came_after_the_names_has_none():
    optimizer = scheduled(named())
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    with pytest.raises(ValueError, match="group 0 of this optimizer has no param_names"):
        optimizer.load_state_dict(scheduled(named()).state_dict(), strict=False)


def test_strict_is_the_default_and_returns_nothing():
    source = scheduled(named())
    steps(source, 0, 2)
    assert scheduled(named()).load_state_dict(state_dict=source.state_dict(), strict=True) is None
    with pytest.raises(ValueError, match="has 4 parameters, this optimizer's has 3"):
        scheduled(named("abc")).load_state_dict(source.state_dict())


# groups and their k


def test_a_group_may_join_a_run_or_begin_its_own():
    optimizer = scheduled(make_params())
    steps(optimizer, 0, 4)
    late, early = make_params(shapes=((2,), (3,)))
    optimizer.add_param_group({"params": [late], "join": True})
    optimizer.add_param_group({"params": [early]})
    assert ks(optimizer) == [4, 4, 0]
    assert [group["lr"] for group in optimizer.param_groups[1:]] == [SCHEDULE.lr_at(k, PEAK) for k in (4, 0)]
    assert all("join" not in group for group in optimizer.param_groups)
    steps(optimizer, 4, 6)
    assert ks(optimizer) == [6, 6, 2]
    # bias correction counts the updates of a tensor
    assert [int(optimizer.state[p]["step"]) for p in (late, early)] == [2, 2]
    with (
        unchanged(optimizer),
        pytest.raises(ValueError, match="join='yes' is unknown, expected one of True, False"),
    ):
        optimizer.add_param_group({"params": make_params(shapes=((2,),)), "join": "yes"})


@pytest.mark.parametrize("join", [False, True])
def test_a_wrapper_may_write_the_rate_of_an_added_group_back(join):
    optimizer = scheduled(make_params())
    steps(optimizer, 0, 4)
    optimizer.add_param_group({"params": make_params(shapes=((2,),)), "join": join})
    with silent():
        for k in range(4, 7):
            for group in optimizer.param_groups:
                group["lr"] = group["lr"]
            step(optimizer, k)
    assert optimizer.param_groups[1]["lr"] == SCHEDULE.lr_at(6 if join else 2, PEAK)


def test_a_group_that_joins_is_told_of_skipped_steps():
    optimizer = scheduled(make_params(), max_grad_norm=1.0)
    for k in range(4):
        set_grads(optimizer, k)
        if k == 2:
            params_of(optimizer)[0].grad.fill_(torch.inf)
        optimizer.step()
    optimizer.add_param_group({"params": make_params(shapes=((2,),)), "join": True})
    assert ks(optimizer) == [3, 3]


@pytest.mark.parametrize("groups", ["joint", "independent"])
def test_groups_keep_their_k_wherever_they_stand(groups):
    a, b, c = make_params(shapes=((2,), (3,), (4,)))
    optimizer = scheduled([{"params": [a]}, {"params": [b]}], groups=groups)
    steps(optimizer, 0, 2)
    optimizer.add_param_group({"params": [c]})
    steps(optimizer, 2, 5)
    assert ks(optimizer) == [5, 5, 3]
    optimizer.param_groups.reverse()
    assert ks(optimizer) == [3, 5, 5]
    step(optimizer, 5)
    assert ks(optimizer) == [4, 6, 6]
    assert optimizer.param_groups[0]["lr"] == SCHEDULE.lr_at(3, PEAK)
    taken = optimizer.param_groups.pop(0)
    step(optimizer, 6)
    assert ks(optimizer) == [7, 7]
    assert taken["k"] == 4
    optimizer.param_groups = [*optimizer.param_groups, taken]
    assert ks(optimizer) == [7, 7, 4]
    step(optimizer, 7)
    assert ks(optimizer) == [8, 8, 5]
    assert optimizer.metrics()["step"].tolist() == [8, 8, 5]


@pytest.mark.parametrize("schedule", [None, SCHEDULE])
def test_a_group_that_is_gone_may_be_told_where_to_go_on(schedule):
    a, b, _, _ = make_params()
    optimizer = make([{"params": [a]}, {"params": [b]}], schedule=schedule)
    steps(optimizer, 0, 2)
    taken = optimizer.param_groups.pop()
    step(optimizer, 2)
    taken["k"] = 5
    assert taken["lr"] == (PEAK if schedule is None else schedule.lr_at(5, PEAK))
    assert ks(optimizer) == [3]
    optimizer.param_groups.append(taken)
    step(optimizer, 3)
    assert ks(optimizer) == [4, 6]


def test_a_group_outlives_its_optimizer():
    optimizer = two_groups()
    steps(optimizer, 0, 2)
    taken = optimizer.param_groups.pop()
    step(optimizer, 2)
    (group,) = optimizer.param_groups
    del optimizer
    gc.collect()
    assert "k" in taken and taken["k"] == 2
    assert "k" not in group and group.get("k") is None
    for use in (lambda: group["k"], lambda: group.update(k=3)):
        with pytest.raises(KeyError, match="k"):
            use()


def test_groups_handed_over_one_at_a_time_make_one_update_each():
    """As wrappers do that step every group by itself."""
    whole, parts = two_groups(), two_groups()
    for k in range(4):
        step(whole, k)
        set_grads(parts, k)
        groups = parts.param_groups
        for group in groups:
            parts.param_groups = [group]
            parts.step()
        parts.param_groups = groups
    assert ks(parts) == ks(whole) == [4, 4]
    assert bits(params_of(parts)) == bits(params_of(whole))
    assert [g["lr"] for g in parts.param_groups] == [g["lr"] for g in whole.param_groups]


def test_a_plain_dict_in_a_groups_place_takes_over_what_it_had():
    optimizer, twin = (two_groups(groups="independent") for _ in range(2))
    for each in (optimizer, twin):
        each.param_groups[1]["max_grad_norm"] = 0.5
        steps(each, 0, 3)
    optimizer.param_groups[1] = dict(optimizer.param_groups[1])
    optimizer.param_groups = [dict(group) for group in optimizer.param_groups]
    with silent():
        for each in (optimizer, twin):
            steps(each, 3, 5)
    assert snapshot(optimizer) == snapshot(twin)


def test_plain_dicts_handed_over_one_at_a_time_make_one_update_each():
    whole, parts = two_groups(), two_groups()
    groups = [dict(group) for group in parts.param_groups]
    for k in range(4):
        step(whole, k)
        parts.param_groups = [dict(group) for group in groups]
        set_grads(parts, k)
        with silent():
            for group in groups:
                parts.param_groups = [dict(group)]
                parts.step()
                group["lr"] = parts.param_groups[0]["lr"]
    parts.param_groups = groups
    parts.scheduler.step(), whole.scheduler.step()
    assert ks(parts) == ks(whole) == [4, 4]
    assert bits(params_of(parts)) == bits(params_of(whole))
    assert [g["schedule"] for g in parts.param_groups] == [g["schedule"] for g in whole.param_groups]


def test_every_part_of_a_group_goes_on_where_the_group_was():
    optimizer = scheduled(groups="independent")
    steps(optimizer, 0, 3)
    (group,) = optimizer.param_groups
    params = group["params"]
    optimizer.param_groups = [{**group, "params": part} for part in (params[:2], params[2:])]
    with silent():
        step(optimizer, 3)
    assert ks(optimizer) == [4, 4]
    assert optimizer.metrics()["lr"].tolist() == [SCHEDULE.lr_at(3, PEAK)] * 2


def test_the_count_of_a_group_that_is_gone_is_not_moved_on_by_a_graph_captured_before():
    optimizer = two_groups()
    steps(optimizer, 0, 2)
    captured, group = counters(optimizer), optimizer.param_groups.pop()
    step(optimizer, 2)
    # what a replay does
    captured.k += 1
    assert group["k"] == 2


def test_groups_that_are_gone_are_not_kept_alive():
    a, b = make_params(shapes=((2,), (3,)))
    optimizer = scheduled([{"params": [a]}, {"params": [b]}])
    steps(optimizer, 0, 2)
    optimizer.param_groups.pop()
    optimizer.state.pop(b)
    step(optimizer, 2)
    kept = weakref.ref(b)
    del b
    gc.collect()
    assert kept() is None


def test_a_schedulers_state_decides_for_the_groups_that_there_were():
    optimizer = scheduled(make_params(shapes=((2,),)))
    steps(optimizer, 0, 2)
    optimizer.scheduler.load_state_dict(optimizer.scheduler.state_dict() | {"last_epoch": 7, "k_at_epoch": 2})
    optimizer.add_param_group({"params": make_params(shapes=((3,),))})
    file = optimizer.state_dict()
    assert ks(optimizer) == [7, 0]
    optimizer.load_state_dict(file)
    assert ks(optimizer) == [7, 0]


def test_a_plain_dict_may_say_another_k_and_schedule():
    optimizer = two_groups()
    steps(optimizer, 0, 3)
    longer = fusedlr.linear(total_steps=70)
    own = {key: optimizer.param_groups[1][key] for key in ("params", "betas", "eps", "weight_decay")}
    rest = {key: value for key, value in optimizer.param_groups[1].items() if key not in own}
    optimizer.param_groups[1] = {**rest, **own, "schedule": longer, "k": 20, "lr": longer.lr_at(2, 0.2)}
    step(optimizer, 3)
    assert ks(optimizer) == [4, 21]
    assert set(optimizer.param_groups[1]) == set(optimizer.param_groups[0])
    assert (
        optimizer.state_dict()["param_groups"][1].keys() == optimizer.state_dict()["param_groups"][0].keys()
    )


def test_a_k_that_is_no_count_in_a_plain_dict_is_refused():
    optimizer = two_groups()
    steps(optimizer, 0, 3)
    optimizer.param_groups[1] = {**optimizer.param_groups[1], "k": -3}
    with unchanged(optimizer), pytest.raises(ValueError, match="k=-3 must be at least 0"):
        optimizer.step()


def test_k_is_read_and_assigned():
    optimizer = two_groups()
    steps(optimizer, 0, 3)
    first, second = optimizer.param_groups
    assert (first["k"], second.get("k"), "k" in first) == (3, 3, True)
    assert "k" not in list(first) and "k" not in dict(first)
    second["k"] = 5
    assert ks(optimizer) == [3, 5]
    assert second["lr"] == fusedlr.linear(total_steps=7).lr_at(5, 0.2)
    second |= {"k": 6}
    step(optimizer, 3)
    assert ks(optimizer) == [4, 7]
    assert second["lr"] == fusedlr.linear(total_steps=7).lr_at(6, 0.2)
    for value, message in (
        (-1, "k=-1 must be at least 0"),
        ("x", "k='x' is not an integer"),
        (True, "k=True is"),
    ):
        with unchanged(optimizer), pytest.raises(ValueError, match=message):
            second["k"] = value


def test_an_assigned_k_wins_over_a_scheduler_that_was_loaded_before():
    optimizer = scheduled()
    steps(optimizer, 0, 3)
    optimizer.scheduler.load_state_dict({"last_epoch": 7})
    optimizer.param_groups[0]["k"] = 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert ks(optimizer) == [2]


def test_a_schedulers_state_is_that_of_the_groups_there_are():
    optimizer = two_groups()
    steps(optimizer, 0, 2)
    optimizer.param_groups.pop(0)
    state = optimizer.scheduler.state_dict()
    assert (state["k"], len(state["fusedlr"]["groups"])) == ([2], 1)
    optimizer.add_param_group({"params": make_params(shapes=((2,),))})
    optimizer.param_groups.reverse()
    assert optimizer.scheduler.state_dict()["k"] == [0, 2]


# files of old, and of others


def test_files_of_the_first_format_load_bit_for_bit():
    def build() -> fusedlr.FusedAdamW:
        optimizer = two_groups(groups="independent", max_grad_norm=1.0)
        optimizer.param_groups[1]["max_grad_norm"] = 0.5
        return optimizer

    source = build()
    steps(source, 0, 4, missing=lambda k, i: i > 1 and k == 1)
    old = through_a_file(source.state_dict())
    for group, own in zip(old["param_groups"], old.pop("fusedlr")["groups"], strict=True):
        group.update({key: own[key] for key in ("schedule", "k", "k_at_step")}, initial_lr=own["peak"])
        if "max_grad_norm" in own:
            group["max_grad_norm"] = own["max_grad_norm"]
    optimizer = build()
    for p, q in zip(params_of(optimizer), params_of(source), strict=True):
        p.data.copy_(q)
    with silent():
        optimizer.load_state_dict(old)
    for each in (source, optimizer):
        steps(each, 4, 6)
    assert snapshot(optimizer) == snapshot(source)
    # and are written in the format of now
    assert set(optimizer.state_dict()["param_groups"][0]) == set(make_stock().state_dict()["param_groups"][0])


def test_a_schedule_of_the_first_format_is_no_schedule_of_an_optimizer_without_one():
    source = scheduled()
    steps(source, 0, 4)
    old = through_a_file(source.state_dict())
    own = old.pop("fusedlr")["groups"][0]
    old["param_groups"][0].update({key: own[key] for key in ("schedule", "k", "k_at_step")})
    optimizer = make()
    with pytest.warns(UserWarning, match="was made with a schedule, this optimizer has none"):
        optimizer.load_state_dict(old)
    assert optimizer.param_groups[0].get("schedule") is None
    step(optimizer, 4)


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_what_a_tool_drops_from_the_file_comes_with_the_schedulers_state(scheduler_first):
    source = two_groups(max_grad_norm=1.0)
    source.param_groups[1]["initial_lr"] = 0.4
    steps(source, 0, 3)
    set_grads(source, 3)
    params_of(source)[0].grad.fill_(torch.nan)
    source.step()
    assert (ks(source), int(source.metrics()["skipped"])) == ([3, 3], 1)
    stock = torch.optim.AdamW([{"params": g["params"]} for g in two_groups().param_groups])
    stock.load_state_dict(torchs_part(source.state_dict()))
    file, scheduler = through_a_file(stock.state_dict()), through_a_file(source.scheduler.state_dict())
    optimizer = two_groups(max_grad_norm=1.0)
    if scheduler_first:
        optimizer.scheduler.load_state_dict(scheduler)
    optimizer.load_state_dict(file)
    if not scheduler_first:
        optimizer.scheduler.load_state_dict(scheduler)
    assert ks(optimizer) == [3, 3]
    assert [group["initial_lr"] for group in optimizer.param_groups] == [PEAK, 0.4]
    assert int(optimizer.metrics()["skipped"]) == 1
    assert optimizer.param_groups[1]["lr"] == fusedlr.linear(total_steps=7).lr_at(3, 0.4)


def test_a_file_of_torchs_adam_becomes_one_of_adamw():
    adam = torch.optim.Adam(make_params(), lr=PEAK)
    steps(adam, 0, 2)
    optimizer, stock = make(), make_stock()
    for each in (optimizer, stock):
        each.load_state_dict(adam.state_dict())
    assert adam.state_dict()["param_groups"][0]["decoupled_weight_decay"] is False
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
    assert stock.param_groups[0]["decoupled_weight_decay"] is True


# copies


@pytest.mark.parametrize("copied_by", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_keep_schedules_and_note_no_assignment(copied_by):
    optimizer = two_groups(groups="independent")
    optimizer.param_groups[1]["max_grad_norm"] = 0.5
    steps(optimizer, 0, 3)
    other = copied_by(optimizer)
    assert [g["schedule"] for g in other.param_groups] == [g["schedule"] for g in optimizer.param_groups]
    assert (ks(other), other.param_groups[1]["max_grad_norm"]) == ([3, 3], 0.5)
    with silent():
        for each in (optimizer, other):
            steps(each, 3, 5)
    assert snapshot(other) == snapshot(optimizer)


def test_a_copied_group_is_a_plain_dict_that_holds_no_optimizer():
    optimizer = two_groups()
    steps(optimizer, 0, 2)
    group = copy.deepcopy(optimizer.param_groups[1])
    assert type(group) is dict
    assert group.keys() == make_stock().param_groups[0].keys()
    size = len(pickle.dumps({key: value for key, value in group.items() if key != "params"}))
    assert size < 1000
    plain = pickle.loads(pickle.dumps(optimizer.param_groups[1]))
    assert type(plain) is dict
    # it may be the start of another optimizer's group
    other = scheduled([{**plain, "lr": 0.3}])
    assert (other.param_groups[0]["initial_lr"], ks(other)) == (0.3, [0])


def test_a_group_of_one_optimizer_begins_anew_in_another():
    optimizer = two_groups()
    steps(optimizer, 0, 3)
    other = scheduled([nn.Parameter(torch.ones(2))])
    other.add_param_group(optimizer.param_groups[1])
    assert ks(other) == [0, 0]
    assert other.param_groups[1]["schedule"] == fusedlr.linear(total_steps=7)
    assert ks(optimizer) == [3, 3]


def test_adapters_that_call_their_parameters_alike_are_told_apart_by_their_scopes() -> None:
    def adapters(*names: str | None) -> fusedlr.FusedAdamW:
        groups = []
        for name in names:
            scope = {} if name is None else {"scope": name}
            groups.append({"params": [("lora_A", nn.Parameter(torch.ones(2)))], **scope})
        return fusedlr.FusedAdamW(groups, lr=0.1)

    saved = adapters("a", "b")
    for group in saved.param_groups:
        group["params"][0].grad = torch.ones(2)
    for only in ("a", "a", "b"):
        saved.step(only=only)
    file = saved.state_dict()
    # in another order, and with one that the file has not
    loaded = adapters("b", "c", "a")
    missing = loaded.load_state_dict(file, strict=False)
    assert [group["k"] for group in loaded.param_groups] == [1, 0, 2]
    assert missing == (["lora_A"], [])
    # one of two cannot be chosen for a parameter without a scope
    plain = adapters(None)
    assert plain.load_state_dict(file, strict=False) == (["lora_A"], ["lora_A", "lora_A"])
    # but one of one can
    alone = adapters("a")
    alone.param_groups[0]["params"][0].grad = torch.ones(2)
    alone.step()
    assert alone.load_state_dict(file, strict=False) == ([], ["lora_A"])
    assert [group["k"] for group in alone.param_groups] == [2]
    assert plain.load_state_dict(alone.state_dict(), strict=False) == ([], [])
    assert [group["k"] for group in plain.param_groups] == [2]
    assert adapters("b", "c").load_state_dict(alone.state_dict(), strict=False) == (
        ["lora_A"] * 2,
        ["lora_A"],
    )
