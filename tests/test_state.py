"""State and checkpoints: torch AdamW's layout, detours through it, and loading that checks first."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from snapshots import bits, changes, params_of, snapshot
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.optim.lr_scheduler import LambdaLR

import fusedlr

PEAK = 0.05
SCHEDULE = fusedlr.cosine(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)
SHAPES = ((4, 3), (5,), (), (0,))


def make_params(
    dtypes: tuple[torch.dtype, ...] = (torch.float64,), shapes: tuple = SHAPES
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for dtype in dtypes
        for shape in shapes
    ]


def make(params: Any = None, **options: Any) -> fusedlr.FusedAdamW:
    params = make_params() if params is None else params
    return fusedlr.FusedAdamW(params, **{"lr": PEAK, "schedule": SCHEDULE, **options})


def make_stock(params: Any = None, **options: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(make_params() if params is None else params, **{"lr": PEAK, **options})


def set_grads(
    optimizer: torch.optim.Optimizer, k: int, missing: Callable[[int, int], bool] | None = None
) -> None:
    generator = torch.Generator().manual_seed(100 + k)
    for i, p in enumerate(params_of(optimizer)):
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = None if missing and missing(k, i) else grad


def steps(optimizer: torch.optim.Optimizer, begin: int, end: int, **options: Any) -> None:
    for k in range(begin, end):
        set_grads(optimizer, k, **options)
        optimizer.step()


def assert_close(ours: torch.optim.Optimizer, stock: torch.optim.Optimizer) -> None:
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        entry, other = ours.state.get(p, {}), stock.state.get(q, {})
        assert entry.keys() == other.keys()
        for key in entry:
            torch.testing.assert_close(entry[key], other[key], rtol=1e-12, atol=1e-14)


def through_a_file(state_dict: Any) -> Any:
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def copied(params: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in params]


# --- torch AdamW's layout

OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "all": {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.3},
    "amsgrad": {"amsgrad": True},
    "maximize": {"maximize": True},
    "foreach": {"foreach": True},
    "not foreach": {"foreach": False},
    "fused": {"fused": True},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("stepped", [False, True])
def test_without_a_schedule_the_state_dict_is_adamws_key_for_key(name, stepped):
    ours = fusedlr.FusedAdamW(make_params(), **OPTIONS[name])
    stock = torch.optim.AdamW(make_params(), **OPTIONS[name])
    if stepped:
        for optimizer in (ours, stock):
            steps(optimizer, 0, 2)
    mine, theirs = ours.state_dict(), stock.state_dict()
    assert mine["param_groups"] == theirs["param_groups"]
    assert list(mine["param_groups"][0]) == list(theirs["param_groups"][0])
    assert mine["state"].keys() == theirs["state"].keys()
    for i, entry in theirs["state"].items():
        assert mine["state"][i].keys() == entry.keys()
        for key, value in entry.items():
            got = mine["state"][i][key]
            assert type(got) is type(value)
            assert (got.dtype, got.shape, got.device) == (value.dtype, value.shape, value.device)


def test_a_group_keeps_what_torch_would_keep():
    a, b, c, _ = make_params()
    groups = [
        {"params": [a], "lr": 0.3, "note": "mine"},
        {"params": [b, c], "betas": (0.5, 0.6), "eps": 1e-3},
    ]
    ours = fusedlr.FusedAdamW([dict(group) for group in groups])
    stock = torch.optim.AdamW([dict(group) for group in groups])
    assert ours.state_dict() == stock.state_dict()


def test_a_schedule_adds_plain_numbers_alone():
    ours, stock = make(), make_stock()
    packed = ours.state_dict()["param_groups"][0]
    added = packed.keys() - stock.state_dict()["param_groups"][0].keys()
    assert added == {"schedule", "initial_lr", "k", "k_at_step"}
    assert packed["schedule"] == SCHEDULE.to_numbers()
    assert all(type(number) in (int, float) for number in packed["schedule"])
    assert (packed["k"], packed["k_at_step"], packed["initial_lr"], packed["lr"]) == (0, 0, PEAK, 0.0)


def test_a_state_dict_holds_only_what_weights_only_loads():
    optimizer = make(make_params((torch.float32, torch.bfloat16)), amsgrad=True, max_grad_norm=1.0)
    steps(optimizer, 0, 2)
    loaded = through_a_file(optimizer.state_dict())
    assert bits(loaded) == bits(optimizer.state_dict())
    # a string here breaks torch.distributed.checkpoint
    assert all(type(key) is int for key in loaded["state"])


def test_saving_twice_gives_the_same():
    optimizer = make()
    steps(optimizer, 0, 3)
    before = snapshot(optimizer)
    assert bits(optimizer.state_dict()) == bits(optimizer.state_dict())
    assert not changes(before, snapshot(optimizer))


def assert_steps_share_one_tensor(optimizer: fusedlr.FusedAdamW) -> None:
    views = [optimizer.state[p]["step"] for p in params_of(optimizer) if "step" in optimizer.state.get(p, {})]
    assert all(view.shape == () and view.dtype == torch.float32 for view in views)
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    # a view each: a scalar for all would be counted once per parameter by torch
    assert len({view.data_ptr() for view in views}) == len(views)


def test_every_step_is_a_view_into_one_tensor():
    params = make_params((torch.float64, torch.bfloat16))
    optimizer = make(params)
    steps(optimizer, 0, 2, missing=lambda k, i: i % 2 == k)
    assert_steps_share_one_tensor(optimizer)
    optimizer.add_param_group({"params": make_params()})
    # also those that have no gradient when all views are made anew
    steps(optimizer, 2, 3, missing=lambda k, i: i in (1, 4))
    assert_steps_share_one_tensor(optimizer)
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    steps(optimizer, 3, 4)
    assert_steps_share_one_tensor(optimizer)
    optimizer.state[params[0]]["step"] = torch.tensor(9.0)
    steps(optimizer, 4, 5)
    assert_steps_share_one_tensor(optimizer)
    assert optimizer.state[params[0]]["step"] == 10


def test_a_parameter_without_a_gradient_has_no_state_and_stays():
    optimizer, stock = make(schedule=None), make_stock()
    for each in (optimizer, stock):
        steps(each, 0, 5, missing=lambda k, i: i == 1 or (k + i) % 3 == 0)
    assert params_of(optimizer)[1] not in optimizer.state
    assert optimizer.state_dict()["state"].keys() == stock.state_dict()["state"].keys()
    assert_close(optimizer, stock)


# --- there and back


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True, "weight_decay": 0.0}], ids=str)
def test_a_run_may_change_to_torch_and_back(options):
    whole = make_stock(**options)
    steps(whole, 0, 9)
    ours = make(schedule=None, **options)
    steps(ours, 0, 3)
    stock = make_stock(copied(params_of(ours)), **options)
    stock.load_state_dict(through_a_file(ours.state_dict()))
    steps(stock, 3, 6)
    again = make(copied(params_of(stock)), schedule=None, **options)
    again.load_state_dict(through_a_file(stock.state_dict()))
    steps(again, 6, 9)
    assert_close(again, whole)
    assert again.metrics()["step"].tolist() == [9]


@pytest.mark.parametrize("keys_survive", [True, False])
def test_a_scheduled_run_may_change_to_torch_and_back(keys_survive):
    whole = make()
    steps(whole, 0, 9)
    ours = make()
    steps(ours, 0, 3)
    ours.scheduler.step()

    stock = make_stock(copied(params_of(ours)))
    foreign = LambdaLR(stock, lambda k: SCHEDULE.lr_at(k))
    stock.load_state_dict(through_a_file(ours.state_dict()))
    foreign.load_state_dict(through_a_file(ours.scheduler.state_dict()))
    for k in range(3, 6):
        set_grads(stock, k)
        stock.step()
        foreign.step()

    state = through_a_file(stock.state_dict())
    if not keys_survive:
        for group in state["param_groups"]:
            for key in ("schedule", "k", "k_at_step"):
                del group[key]
    again = make(copied(params_of(stock)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.load_state_dict(state)
    assert again.metrics()["step"].tolist() == [6]
    assert again.scheduler.get_last_lr() == [SCHEDULE.lr_at(6, PEAK)]
    again.scheduler.load_state_dict(through_a_file(foreign.state_dict()))
    assert again.scheduler.last_epoch == 6
    steps(again, 6, 9)
    assert_close(again, whole)


def test_a_run_that_began_with_torch_is_taken_over():
    stock = make_stock()
    foreign = LambdaLR(stock, SCHEDULE.lr_at)
    for k in range(4):
        set_grads(stock, k)
        stock.step()
        foreign.step()
    ours = make(copied(params_of(stock)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.load_state_dict(through_a_file(stock.state_dict()))
    steps(ours, 4, 8)
    whole = make()
    steps(whole, 0, 8)
    assert_close(ours, whole)


def test_a_detour_through_torch_keeps_what_the_schedule_had_skipped():
    """k counts updates of the run and t updates of a tensor: a late tensor does not set the schedule back."""
    ours = make()
    steps(ours, 0, 4)
    ours.add_param_group({"params": make_params()})
    steps(ours, 4, 6)
    assert ours.metrics()["step"].tolist() == [6, 2]
    stock = make_stock(copied(params_of(ours)[:4]))
    stock.add_param_group({"params": copied(params_of(ours)[4:])})
    stock.load_state_dict(ours.state_dict())
    steps(stock, 6, 8)
    again = make(copied(params_of(stock)[:4]))
    again.add_param_group({"params": copied(params_of(stock)[4:])})
    again.load_state_dict(stock.state_dict())
    assert again.metrics()["step"].tolist() == [8, 4]


# --- our own checkpoints, bit for bit

Build = Callable[[], fusedlr.FusedAdamW]


def two_groups(**options: Any) -> fusedlr.FusedAdamW:
    params = make_params((torch.float32,))
    groups = [
        {"params": params[:2]},
        {"params": params[2:], "lr": 0.2, "schedule": fusedlr.linear(total_steps=7)},
    ]
    return make(groups, **options)


RUNS: dict[str, tuple[Build, Callable[[int, int], bool] | None]] = {
    "fp64": (lambda: make(), None),
    "mixed": (
        lambda: make(make_params((torch.float32, torch.bfloat16, torch.float16)), max_grad_norm=1.0),
        None,
    ),
    "param dtype": (lambda: make(make_params((torch.bfloat16,)), state_dtype="param"), None),
    "amsgrad": (lambda: make(amsgrad=True), None),
    "no schedule": (lambda: make(schedule=None), None),
    "groups": (lambda: two_groups(max_grad_norm=0.5), None),
    "missing": (lambda: make(), lambda k, i: (k + i) % 3 == 0),
    "late": (lambda: two_groups(), lambda k, i: i > 1 and k < 4),
    "independent": (lambda: two_groups(groups="independent"), lambda k, i: i > 1 and k % 2 == 0),
    "first without": (lambda: make(), lambda k, i: k < 3),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_saved_and_loaded_anywhere_is_the_run(name):
    build, missing = RUNS[name]
    whole = build()
    steps(whole, 0, 6, missing=missing)
    broken = build()
    for k in range(6):
        steps(broken, k, k + 1, missing=missing)
        state = through_a_file(broken.state_dict())
        fresh = build()
        for p, q in zip(params_of(fresh), params_of(broken), strict=True):
            p.data.copy_(q.data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fresh.load_state_dict(state)
        assert bits(fresh.metrics()["step"]) == bits(broken.metrics()["step"])
        if k % 2:
            # what is loaded last decides, so this must agree with what the optimizer's own state says
            broken.scheduler.step()
            fresh.scheduler.load_state_dict(through_a_file(broken.scheduler.state_dict()))
        broken = fresh
    whole.scheduler.step()
    assert set(changes(snapshot(whole), snapshot(broken))) <= {"grads"}
    assert bits(whole.state_dict()) == bits(broken.state_dict())


def test_loading_into_a_running_optimizer_winds_it_back():
    optimizer = make(make_params((torch.float32, torch.bfloat16)))
    steps(optimizer, 0, 3)
    state = copy.deepcopy(optimizer.state_dict())
    weights = [p.detach().clone() for p in params_of(optimizer)]
    steps(optimizer, 3, 6)
    after = snapshot(optimizer)
    optimizer.load_state_dict(state)
    for p, w in zip(params_of(optimizer), weights, strict=True):
        p.data.copy_(w)
    steps(optimizer, 3, 6)
    assert not changes(after, snapshot(optimizer))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_moments_of_16_bit_parameters_stay_fp32(dtype):
    optimizer = make(make_params((dtype,)), amsgrad=True)
    steps(optimizer, 0, 2)
    moments = [(e["exp_avg"], e["exp_avg_sq"], e["max_exp_avg_sq"]) for e in optimizer.state.values()]
    assert {m.dtype for entry in moments for m in entry} == {torch.float32}
    # and hold digits that the parameter's dtype has not
    assert bits(moments[0][0]) != bits(moments[0][0].to(dtype).float())
    before = bits(moments)
    for target in (optimizer, make(make_params((dtype,)), amsgrad=True)):
        target.load_state_dict(through_a_file(optimizer.state_dict()))
        moments = [(e["exp_avg"], e["exp_avg_sq"], e["max_exp_avg_sq"]) for e in target.state.values()]
        assert bits(moments) == before


def test_moments_that_torch_narrowed_are_widened_again():
    stock = make_stock(make_params((torch.bfloat16,)))
    steps(stock, 0, 2)
    ours = make(copied(params_of(stock)), schedule=None)
    ours.load_state_dict(stock.state_dict())
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        assert ours.state[p]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[p]["exp_avg"], stock.state[q]["exp_avg"].float())


def test_moments_in_the_parameters_dtype_if_asked_for():
    optimizer = make(make_params((torch.bfloat16, torch.float32)), state_dtype="param")
    steps(optimizer, 0, 2)
    assert all(optimizer.state[p]["exp_avg_sq"].dtype == p.dtype for p in params_of(optimizer))


# --- what loading touches


def test_loading_never_aliases_the_callers_tensors():
    source = make()
    steps(source, 0, 3)
    state = copy.deepcopy(source.state_dict())
    before = bits(state)
    optimizer = make()
    optimizer.load_state_dict(state)
    owned = {
        t.untyped_storage().data_ptr()
        for entry in optimizer.state.values()
        for t in entry.values()
        if t.numel()
    }
    given = {
        t.untyped_storage().data_ptr()
        for entry in state["state"].values()
        for t in entry.values()
        if t.numel()
    }
    assert not owned & given
    steps(optimizer, 3, 5)
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    assert bits(state) == before


def test_loading_leaves_the_callers_dict_alone():
    source = make(amsgrad=True)
    steps(source, 0, 2)
    state = source.state_dict()
    before, ids = bits(state), [id(group) for group in state["param_groups"]]
    make(amsgrad=True).load_state_dict(state)
    assert bits(state) == before
    assert [id(group) for group in state["param_groups"]] == ids


def test_loading_in_place_keeps_addresses():
    """A captured CUDA graph goes on reading them."""
    optimizer = make(make_params((torch.float32, torch.bfloat16)), amsgrad=True)
    steps(optimizer, 0, 2)
    other = make(make_params((torch.float32, torch.bfloat16)), amsgrad=True)
    steps(other, 5, 9)
    addresses = [{key: id(value) for key, value in entry.items()} for entry in optimizer.state.values()]
    pointers = [{key: value.data_ptr() for key, value in entry.items()} for entry in optimizer.state.values()]
    optimizer.load_state_dict(through_a_file(other.state_dict()))
    assert [{k: id(v) for k, v in entry.items()} for entry in optimizer.state.values()] == addresses
    assert [{k: v.data_ptr() for k, v in entry.items()} for entry in optimizer.state.values()] == pointers
    assert snapshot(optimizer)["state"] == snapshot(other)["state"]
    steps(optimizer, 9, 10)
    assert [{k: v.data_ptr() for k, v in entry.items()} for entry in optimizer.state.values()] == pointers


def test_loading_its_own_live_state_changes_nothing():
    optimizer = make()
    steps(optimizer, 0, 3)
    optimizer.scheduler.step()
    before = snapshot(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert not changes(before, snapshot(optimizer))


def test_live_tensors_may_come_back_for_other_parameters():
    optimizer = make(make_params(shapes=((3,), (3,), (3,))))
    steps(optimizer, 0, 3)
    state = optimizer.state_dict()
    state["state"] = {i: state["state"][(i + 1) % 3] for i in range(3)}
    wanted = [bits(dict(optimizer.state[p])) for p in params_of(optimizer)]
    optimizer.load_state_dict(state)
    assert [bits(dict(optimizer.state[p])) for p in params_of(optimizer)] == wanted[1:] + wanted[:1]


def test_parameters_without_saved_state_start_anew():
    source = make(schedule=None)
    steps(source, 0, 3, missing=lambda k, i: i == 0)
    optimizer = make(schedule=None)
    steps(optimizer, 0, 2)
    optimizer.load_state_dict(source.state_dict())
    stock = make_stock(copied(params_of(optimizer)))
    stock.load_state_dict(source.state_dict())
    assert params_of(optimizer)[0] not in optimizer.state
    for each in (optimizer, stock):
        steps(each, 3, 5)
    assert_close(optimizer, stock)


def test_entries_of_no_parameter_are_kept_as_torch_keeps_them():
    source = make_stock()
    steps(source, 0, 1)
    state = source.state_dict()
    state["state"]["note"], state["state"]["count"] = {"a": 1}, 5
    optimizer = make(schedule=None)
    for _ in range(2):
        optimizer.load_state_dict(state)
        assert (optimizer.state["note"], optimizer.state["count"]) == ({"a": 1}, 5)
        steps(optimizer, 1, 2)
    assert optimizer.state_dict()["state"]["note"] == {"a": 1}


def test_hyperparameters_and_the_peak_come_from_the_file_and_the_schedule_from_here():
    source = make(lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, schedule=fusedlr.linear(total_steps=5))
    steps(source, 0, 2)
    optimizer = make()
    with pytest.warns(UserWarning, match="the loaded schedule is not the one asked for"):
        optimizer.load_state_dict(source.state_dict())
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.5, 0.6), 0.7, 0.3)
    assert group["schedule"] == SCHEDULE
    assert group["lr"] == SCHEDULE.lr_at(2, 0.3)


def test_a_groups_own_clipping_survives_a_state_of_torch():
    def build() -> fusedlr.FusedAdamW:
        a, b, *_ = make_params()
        groups = [{"params": [a], "max_grad_norm": 1e-3}, {"params": [b]}]
        return fusedlr.FusedAdamW(groups, lr=PEAK, groups="independent")

    a, b, *_ = make_params()
    stock = torch.optim.AdamW([{"params": [a]}, {"params": [b]}], lr=PEAK)
    steps(stock, 0, 1)
    optimizer = build()
    optimizer.load_state_dict(stock.state_dict())
    steps(optimizer, 1, 2)
    assert optimizer.metrics()["coef"].tolist() == [pytest.approx(0, abs=1e-2), 1.0]


def test_joint_groups_ignore_the_clipping_of_independent_ones():
    def build(**options: Any) -> fusedlr.FusedAdamW:
        a, b, *_ = make_params()
        return fusedlr.FusedAdamW(
            [{"params": [a], **options.pop("own", {})}, {"params": [b]}], lr=PEAK, **options
        )

    source = build(groups="independent", own={"max_grad_norm": 1e-3})
    steps(source, 0, 1)
    optimizer = build()
    optimizer.load_state_dict(source.state_dict())
    steps(optimizer, 1, 2)
    assert optimizer.metrics()["coef"] == 1


def test_independent_groups_count_their_own_steps_without_our_keys_too():
    def build() -> fusedlr.FusedAdamW:
        return two_groups(groups="independent")

    source = build()
    steps(source, 0, 5, missing=lambda k, i: i > 1 and k % 2 == 0)
    assert source.metrics()["step"].tolist() == [5, 2]
    state = source.state_dict()
    for group in state["param_groups"]:
        del group["k"], group["k_at_step"]
    optimizer = build()
    optimizer.load_state_dict(state)
    assert optimizer.metrics()["step"].tolist() == [5, 2]


def test_a_file_without_its_states_never_sets_the_schedule_before_its_start():
    source = make()
    steps(source, 0, 4)
    source.add_param_group({"params": make_params()})
    steps(source, 4, 6)
    state = source.state_dict()
    state["state"] = {}
    optimizer = make()
    optimizer.add_param_group({"params": make_params()})
    optimizer.load_state_dict(state)
    assert optimizer.metrics()["step"].tolist() == [0, 0]


def test_betas_may_come_as_a_list():
    source = make()
    steps(source, 0, 1)
    state = source.state_dict()
    # a trip through torch.distributed.checkpoint or JSON makes lists of tuples
    state["param_groups"][0]["betas"] = list(state["param_groups"][0]["betas"])
    optimizer = make()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_write_before_loading_is_forgotten():
    source = make()
    steps(source, 0, 2)
    optimizer = make()
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.load_state_dict(source.state_dict())
    steps(optimizer, 2, 3)
    assert optimizer.metrics()["lr"].item() == pytest.approx(SCHEDULE.lr_at(2, PEAK), rel=1e-15)


# --- state that others replace


def replace_step_by_tensor(state: dict[str, Any]) -> None:
    state["step"] = torch.tensor(7.0)


def replace_step_by_vector(state: dict[str, Any]) -> None:
    state["step"] = torch.tensor([7.0])


def replace_step_by_number(state: dict[str, Any]) -> None:
    state["step"] = 7


def fill_step(state: dict[str, Any]) -> None:
    state["step"].fill_(7)


def replace_moments(state: dict[str, Any]) -> None:
    state["exp_avg"] = state["exp_avg"] * 2
    state["exp_avg_sq"] = (state["exp_avg_sq"] + 1).clone()


def transpose_moments(state: dict[str, Any]) -> None:
    if state["exp_avg"].dim() == 2:
        state["exp_avg"] = state["exp_avg"].t().contiguous().t()


@pytest.mark.parametrize(
    "replace",
    [
        replace_step_by_tensor,
        replace_step_by_vector,
        replace_step_by_number,
        fill_step,
        replace_moments,
        transpose_moments,
    ],
)
def test_entries_replaced_from_outside_are_adopted(replace):
    ours, stock = make(schedule=None), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        replace(optimizer.state[params_of(optimizer)[0]])
    # torch has no use for these
    entry = stock.state[params_of(stock)[0]]
    entry["step"] = torch.as_tensor(entry["step"], dtype=torch.float32).reshape(())
    for optimizer in (ours, stock):
        steps(optimizer, 2, 4)
    assert_close(ours, stock)
    assert_steps_share_one_tensor(ours)


def test_a_whole_entry_may_be_replaced():
    ours, stock = make(schedule=None), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 2)
        optimizer.state[params_of(optimizer)[1]] = copy.deepcopy(optimizer.state[params_of(optimizer)[1]])
        steps(optimizer, 2, 4)
    assert_close(ours, stock)


def clear_all(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state.clear()


def replace_all(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state = defaultdict(dict)


def delete_one(optimizer: torch.optim.Optimizer) -> None:
    del optimizer.state[params_of(optimizer)[0]]


def empty_one(optimizer: torch.optim.Optimizer) -> None:
    optimizer.state[params_of(optimizer)[0]].clear()


@pytest.mark.parametrize("clear", [clear_all, replace_all, delete_one, empty_one])
def test_cleared_state_starts_anew_and_the_schedule_goes_on(clear):
    ours, stock = make(), make_stock()
    foreign = LambdaLR(stock, SCHEDULE.lr_at)
    for k in range(6):
        if k == 3:
            clear(ours)
            clear(stock)
        for optimizer in (ours, stock):
            set_grads(optimizer, k)
            optimizer.step()
        foreign.step()
    assert_close(ours, stock)
    assert ours.metrics()["step"].tolist() == [6]
    assert_steps_share_one_tensor(ours)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("exp_avg", torch.zeros(3), r"its exp_avg has shape \(3,\) but the parameter has \(4, 3\)"),
        (
            "exp_avg_sq",
            torch.zeros(4, 3, device="meta"),
            "its exp_avg_sq is on meta but the parameter is on cpu",
        ),
        ("step", torch.zeros(2), r"its step has shape \(2,\), expected one element"),
        ("step", "three", "its step is 'three', expected a number"),
        ("exp_avg", [1.0], r"its exp_avg is a list, expected a tensor"),
    ],
)
def test_state_that_does_not_fit_its_parameter_is_refused_before_anything_changes(key, value, message):
    p, q = make_params(shapes=((2,), (4, 3)))
    optimizer = make([("first", p), ("second", q)])
    steps(optimizer, 0, 2)
    optimizer.state[q][key] = value
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=f"parameter 'second': {message}"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


# --- pickle, deepcopy, groups, names


@pytest.mark.parametrize(
    "copied_by", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("name", RUNS)
def test_a_copy_continues_by_itself(name, copied_by):
    build, missing = RUNS[name]
    optimizer = build()
    steps(optimizer, 0, 3, missing=missing)
    # a copy shows the rate of the coming update
    optimizer.scheduler.step()
    before = snapshot(optimizer)
    twin = copied_by(optimizer)
    assert set(changes(before, snapshot(twin))) <= {"grads"}
    steps(twin, 3, 6, missing=missing)
    assert not changes(before, snapshot(optimizer))
    whole = build()
    steps(whole, 0, 6, missing=missing)
    assert not changes(snapshot(whole), snapshot(twin))
    # and is watched as the original: a foreign rate is obeyed by the one it was written to
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twin.param_groups[0]["lr"] = 0.0
        weights = [bits(p) for p in twin.param_groups[0]["params"]]
        steps(twin, 6, 7)
    assert [bits(p) for p in twin.param_groups[0]["params"]] == weights


def test_a_copy_has_the_settings_of_the_original():
    options = {"max_grad_norm": 0.5, "nonfinite": "propagate", "backend": "reference", "amp_scaling": False}
    optimizer = make(groups="independent", state_dtype="param", **options)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert repr(twin) == repr(optimizer)
        assert {
            name: getattr(twin, name) for name in ("max_grad_norm", "nonfinite", "backend", "groups")
        } == {
            "max_grad_norm": 0.5,
            "nonfinite": "propagate",
            "backend": "reference",
            "groups": "independent",
        }
        twin.max_grad_norm = 2.0
        assert optimizer.max_grad_norm == 0.5


def test_model_and_optimizer_copied_together_stay_together():
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    steps(optimizer, 0, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert params_of(twin)[0] is twin_model.weight
    steps(twin, 2, 3)
    steps(optimizer, 2, 3)
    assert bits(twin_model.weight) == bits(model.weight)


@pytest.mark.parametrize("schedule", [None, fusedlr.constant()], ids=str)
def test_a_group_added_in_mid_run_is_trained_as_by_torch(schedule):
    ours, stock = make(schedule=schedule), make_stock()
    for optimizer in (ours, stock):
        steps(optimizer, 0, 3)
        added = {"params": make_params(shapes=((6,), (2, 2))), "lr": 0.3, "weight_decay": 0.4}
        optimizer.add_param_group(added)
        steps(optimizer, 3, 6)
    assert_close(ours, stock)


def test_the_schedule_of_an_added_group_starts_at_its_beginning():
    optimizer = make()
    steps(optimizer, 0, 4)
    optimizer.add_param_group({"params": make_params(shapes=((6,),)), "lr": 1.0})
    assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(3, PEAK), SCHEDULE.lr_at(0, 1.0)]
    steps(optimizer, 4, 6)
    assert optimizer.metrics()["step"].tolist() == [6, 2]
    assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(5, PEAK), SCHEDULE.lr_at(1, 1.0)]
    state = through_a_file(optimizer.state_dict())
    fresh = make()
    fresh.add_param_group({"params": make_params(shapes=((6,),)), "lr": 1.0})
    fresh.load_state_dict(state)
    assert fresh.metrics()["step"].tolist() == [6, 2]
    assert fresh.scheduler.get_last_lr() == [SCHEDULE.lr_at(6, PEAK), SCHEDULE.lr_at(2, 1.0)]


def test_a_group_may_be_taken_away():
    optimizer = two_groups()
    steps(optimizer, 0, 2)
    for p in optimizer.param_groups.pop()["params"]:
        # torch refuses to save the state of a parameter that has gone
        del optimizer.state[p]
    steps(optimizer, 2, 4)
    assert optimizer.metrics()["step"].tolist() == [4]
    assert len(optimizer.state_dict()["param_groups"]) == 1
    assert len(optimizer.scheduler.state_dict()["k"]) == 1
    optimizer.add_param_group({"params": make_params(shapes=((6,),))})
    steps(optimizer, 4, 5)
    assert optimizer.metrics()["step"].tolist() == [5, 1]


def test_names_are_kept_as_torch_keeps_them():
    def named() -> list[tuple[str, nn.Parameter]]:
        return list(zip("abcd", make_params(), strict=True))

    ours, stock = make(named(), schedule=None), make_stock(named())
    assert ours.state_dict() == stock.state_dict()
    assert ours.state_dict()["param_groups"][0]["param_names"] == list("abcd")
    steps(stock, 0, 2)
    ours.load_state_dict(stock.state_dict())
    assert ours.param_groups[0]["param_names"] == list("abcd")
    # an unnamed state keeps this optimizer's names
    unnamed = make_stock()
    steps(unnamed, 0, 2)
    ours.load_state_dict(unnamed.state_dict())
    assert ours.param_groups[0]["param_names"] == list("abcd")


# --- refusals


def fewer_groups(state: dict[str, Any]) -> None:
    state["param_groups"].pop()


def more_groups(state: dict[str, Any]) -> None:
    state["param_groups"].append(copy.deepcopy(state["param_groups"][0]))


def fewer_params(state: dict[str, Any]) -> None:
    state["param_groups"][1]["params"].pop()


def no_state(state: dict[str, Any]) -> None:
    del state["state"]


def no_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


def no_params(state: dict[str, Any]) -> None:
    del state["param_groups"][1]["params"]


def no_lr(state: dict[str, Any]) -> None:
    del state["param_groups"][1]["lr"]


def no_step(state: dict[str, Any]) -> None:
    del state["state"][3]["step"]


def no_moments(state: dict[str, Any]) -> None:
    del state["state"][3]["exp_avg"], state["state"][3]["exp_avg_sq"]


def other_optimizer(state: dict[str, Any]) -> None:
    state["state"][3] = {"momentum_buffer": torch.zeros(2)}


def other_shape(state: dict[str, Any]) -> None:
    state["state"][3]["exp_avg_sq"] = torch.zeros(2, 1)


def long_step(state: dict[str, Any]) -> None:
    state["state"][3]["step"] = torch.zeros(2)


def worded_step(state: dict[str, Any]) -> None:
    state["state"][3]["step"] = "three"


def no_tensor(state: dict[str, Any]) -> None:
    state["state"][3]["exp_avg"] = [0.0, 0.0]


def broken_schedule(state: dict[str, Any]) -> None:
    state["param_groups"][1]["schedule"] = [1, 2, 3]


def worded_k(state: dict[str, Any]) -> None:
    state["param_groups"][1]["k"] = "three"


REFUSED = [
    (fewer_groups, "the loaded state dict has 1 parameter groups, this optimizer has 2"),
    (more_groups, "the loaded state dict has 3 parameter groups, this optimizer has 2"),
    (fewer_params, "group 1 of the loaded state dict has 1 parameters, this optimizer's has 2"),
    (no_state, r"the loaded state dict has no 'state', only \['param_groups'\]"),
    (no_groups, r"the loaded state dict has no 'param_groups', only \['state'\]"),
    (no_params, "group 1 of the loaded state dict has no 'params'"),
    (no_lr, "group 1 of the loaded state dict has no 'lr'"),
    (no_step, "parameter 1 of group 1.*: its loaded state has no step"),
    (no_moments, "parameter 1 of group 1.*: its loaded state has no exp_avg, exp_avg_sq, only step"),
    (
        other_optimizer,
        "parameter 1 of group 1.*: its loaded state has no step, exp_avg, exp_avg_sq, only momentum_buffer",
    ),
    (
        other_shape,
        r"parameter 1 of group 1.*: its loaded exp_avg_sq has shape \(2, 1\), the parameter has \(2,\)",
    ),
    (long_step, r"parameter 1 of group 1.*: its loaded step has shape \(2,\), expected one element"),
    (worded_step, "parameter 1 of group 1.*: its loaded step is 'three', expected a number"),
    (no_tensor, "parameter 1 of group 1.*: its loaded exp_avg is a list, expected a tensor"),
    (broken_schedule, "not a schedule in numbers"),
    (worded_k, "group 1 of the loaded state dict has k='three', expected an integer"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
@pytest.mark.parametrize("running", [False, True])
def test_a_state_that_does_not_fit_is_refused_before_anything_changes(spoil, message, running):
    def build() -> fusedlr.FusedAdamW:
        params = make_params(shapes=((3,), (4, 3), (5,), (2,)))
        return make([{"params": params[:2]}, {"params": params[2:]}])

    source = build()
    steps(source, 0, 3)
    state = copy.deepcopy(source.state_dict())
    spoil(state)
    optimizer = build()
    if running:
        steps(optimizer, 5, 7)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not changes(before, snapshot(optimizer))
    steps(optimizer, 7, 8)


def test_a_refusal_calls_a_named_parameter_by_its_name():
    source = make([("a.weight", nn.Parameter(torch.ones(3)))])
    steps(source, 0, 1)
    optimizer = make([("a.weight", nn.Parameter(torch.ones(2)))])
    with pytest.raises(ValueError, match=r"parameter 'a.weight': its loaded exp_avg has shape \(3,\)"):
        optimizer.load_state_dict(source.state_dict())


# --- disagreement, in words


def other_total(schedule: fusedlr.Schedule | None = SCHEDULE, **options: Any) -> dict[str, Any]:
    source = make(schedule=schedule, **options)
    steps(source, 0, 1)
    return source.state_dict()


@pytest.mark.parametrize(
    ("saved", "here", "message"),
    [
        (
            {"schedule": fusedlr.cosine(warmup_steps=2, total_steps=20, min_lr_ratio=0.1)},
            {},
            "group 0: the checkpoint's run has 20 updates, this one 12; this optimizer's schedule is used",
        ),
        (
            {"lr": 0.3},
            {},
            "group 0: the peak is 0.3 in the checkpoint and 0.05 here; the checkpoint's is used",
        ),
        (
            {"schedule": fusedlr.cosine(warmup_steps=4, total_steps=12, min_lr_ratio=0.1)},
            {},
            "group 0: at k = 1 the checkpoint's schedule gives 0.25 of the peak, this one 0.5",
        ),
        (
            {"schedule": fusedlr.linear(warmup_steps=2, total_steps=12, min_lr_ratio=0.1)},
            {},
            "the checkpoint's schedule gives .* of the peak, this one",
        ),
        ({}, {"schedule": None}, "group 0: the checkpoint was made with a schedule, this optimizer has none"),
    ],
)
def test_a_disagreement_is_reported_in_words(saved, here, message):
    state = through_a_file(other_total(**saved))
    optimizer = make(**here)
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.load_state_dict(state)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_every_group_that_disagrees_is_named_in_one_warning():
    source = two_groups()
    source.param_groups[1]["initial_lr"] = 0.4
    state = source.state_dict()
    state["param_groups"][0]["initial_lr"] = 0.6
    with pytest.warns(UserWarning, match=r"group 0: the peak is 0.6 .*; group 1: the peak is 0.4 ") as caught:
        two_groups().load_state_dict(state)
    assert len(caught) == 1


@pytest.mark.parametrize("schedule", [SCHEDULE, None, fusedlr.linear(total_steps=10, min_lr=1e-3)], ids=str)
def test_agreement_says_nothing(schedule):
    state = through_a_file(other_total(schedule=schedule))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make(schedule=schedule).load_state_dict(state)


def test_a_disagreement_made_an_error_changes_nothing():
    state = other_total(lr=0.3)
    optimizer = make()
    steps(optimizer, 0, 2)
    before = snapshot(optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="the peak is"):
            optimizer.load_state_dict(state)
    assert not changes(before, snapshot(optimizer))


# --- hooks


def test_load_hooks_run_as_torchs():
    source = make()
    steps(source, 0, 2)
    optimizer = make()
    seen: list[Any] = []

    def pre(self: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        seen.append(("pre", self, int(self.metrics()["step"])))
        group = {**state_dict["param_groups"][0], "eps": 0.25}
        return {**state_dict, "param_groups": [group]}

    def post(self: Any) -> None:
        seen.append(("post", self, int(self.metrics()["step"])))

    handles = [
        optimizer.register_load_state_dict_pre_hook(pre),
        optimizer.register_load_state_dict_post_hook(post),
    ]
    state = source.state_dict()
    optimizer.load_state_dict(state)
    assert seen == [("pre", optimizer, 0), ("post", optimizer, 2)]
    assert optimizer.param_groups[0]["eps"] == 0.25
    assert state["param_groups"][0]["eps"] == 1e-8
    for handle in handles:
        handle.remove()
    optimizer.load_state_dict(state)
    assert len(seen) == 2


def test_a_load_hook_may_change_the_top_level_without_touching_the_callers_dict():
    optimizer = make()

    def pre(self: Any, state_dict: dict[str, Any]) -> None:
        state_dict["state"] = {}

    optimizer.register_load_state_dict_pre_hook(pre)
    source = make()
    steps(source, 0, 1)
    state = source.state_dict()
    optimizer.load_state_dict(state)
    assert state["state"] and not optimizer.state


def test_state_dict_hooks_see_what_is_saved():
    optimizer = make()
    steps(optimizer, 0, 2)
    seen: list[Any] = []

    def post(self: Any, state_dict: dict[str, Any]) -> None:
        seen.append(bits(state_dict))
        # plain numbers already, also the schedule
        through_a_file(state_dict)
        state_dict["note"] = "from a hook"

    optimizer.register_state_dict_pre_hook(lambda self: seen.append(self))
    optimizer.register_state_dict_post_hook(post)
    state = optimizer.state_dict()
    assert state.pop("note") == "from a hook"
    assert seen == [optimizer, bits(state)]


def test_a_state_dict_hook_may_return_anything():
    optimizer = make()
    optimizer.register_state_dict_post_hook(lambda self, state_dict: {"saved": state_dict["state"]})
    assert optimizer.state_dict() == {"saved": {}}


# --- torch.distributed.checkpoint, one process


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)


def model_and_optimizer() -> tuple[nn.Module, fusedlr.FusedAdamW]:
    torch.manual_seed(0)
    model = Model()
    model.b.to(torch.bfloat16)
    groups = [{"params": list(model.a.parameters())}, {"params": list(model.b.parameters()), "lr": 0.2}]
    return model, make(groups, max_grad_norm=1.0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"full_state_dict": True},
        {"full_state_dict": True, "cpu_offload": True},
        {"flatten_optimizer_state_dict": True},
    ],
    ids=str,
)
def test_distributed_checkpoint_gets_and_sets(options):
    options = dcp_state.StateDictOptions(**options)
    model, optimizer = model_and_optimizer()
    steps(optimizer, 0, 3)
    saved = copy.deepcopy(dcp_state.get_state_dict(model, optimizer, options=options))
    steps(optimizer, 3, 6)
    other_model, other = model_and_optimizer()
    dcp_state.set_state_dict(
        other_model, other, model_state_dict=saved[0], optim_state_dict=saved[1], options=options
    )
    assert other.metrics()["step"].tolist() == [3, 3]
    steps(other, 3, 6)
    assert not changes(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoint_saves_and_loads_files(tmp_path, flatten):
    options = dcp_state.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = model_and_optimizer()
    steps(optimizer, 0, 3)
    with warnings.catch_warnings():
        # that there is no process group
        warnings.simplefilter("ignore")
        weights, state = dcp_state.get_state_dict(model, optimizer, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path, no_dist=True)
        steps(optimizer, 3, 6)
        other_model, other = model_and_optimizer()
        # allocates by a step at lr 0, and loads into the very tensors that are in use
        weights, state = dcp_state.get_state_dict(other_model, other, options=options)
        both = {"model": weights, "optimizer": state}
        dcp.load(both, checkpoint_id=tmp_path, no_dist=True)
        dcp_state.set_state_dict(
            other_model, other, model_state_dict=weights, optim_state_dict=both["optimizer"], options=options
        )
    steps(other, 3, 6)
    assert not changes(snapshot(optimizer), snapshot(other))


def test_a_checkpoint_made_before_the_first_step_starts_the_run():
    model, optimizer = model_and_optimizer()
    saved = copy.deepcopy(dcp_state.get_optimizer_state_dict(model, optimizer))
    other_model, other = model_and_optimizer()
    dcp_state.set_optimizer_state_dict(other_model, other, saved)
    assert other.metrics()["step"].tolist() == [0, 0]
    for each in (optimizer, other):
        steps(each, 0, 2)
        assert each.metrics()["step"].tolist() == [2, 2]
    assert not changes(snapshot(optimizer), snapshot(other))


def test_tensors_are_all_that_is_in_a_state(tmp_path):
    optimizer = make()
    steps(optimizer, 0, 1)
    for entry in optimizer.state.values():
        assert all(isinstance(value, Tensor) for value in entry.values())
