"""What loading a state dict touches, keeps and takes from the file."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kit import (
    PEAK,
    SCHEDULE,
    assert_same,
    copied,
    make,
    make_params,
    make_stock,
    quiet,
    scheduled,
    silent,
    step,
    steps,
    through_a_file,
    torchs_part,
    two_groups,
)
from snapshots import bits, params_of, snapshot, unchanged
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fusedlr
from fusedlr import checkpoint


def storages(entries):
    return {t.untyped_storage().data_ptr() for entry in entries for t in entry.values() if t.numel()}


def test_loading_leaves_the_callers_dict_and_tensors_alone():
    source = scheduled(amsgrad=True)
    steps(source, 0, 3)
    state = copy.deepcopy(source.state_dict())
    before, ids = bits(state), [id(group) for group in state["param_groups"]]
    optimizer = scheduled(amsgrad=True)
    optimizer.load_state_dict(state)
    assert not storages(optimizer.state.values()) & storages(state["state"].values())
    steps(optimizer, 3, 5)
    optimizer.param_groups[0]["betas"] = (0.1, 0.2)
    assert bits(state) == before
    assert [id(group) for group in state["param_groups"]] == ids


def test_loading_in_place_keeps_addresses():
    """A captured CUDA graph goes on reading them."""
    optimizer = scheduled(make_params((torch.float32, torch.bfloat16)), amsgrad=True)
    steps(optimizer, 0, 2)
    other = scheduled(make_params((torch.float32, torch.bfloat16)), amsgrad=True)
    steps(other, 5, 9)
    addresses = [{key: id(value) for key, value in entry.items()} for entry in optimizer.state.values()]
    pointers = [{key: value.data_ptr() for key, value in entry.items()} for entry in optimizer.state.values()]
    optimizer.load_state_dict(through_a_file(other.state_dict()))
    assert [{k: id(v) for k, v in entry.items()} for entry in optimizer.state.values()] == addresses
    assert [{k: v.data_ptr() for k, v in entry.items()} for entry in optimizer.state.values()] == pointers
    assert snapshot(optimizer)["state"] == snapshot(other)["state"]
    steps(optimizer, 9, 10)
    assert [{k: v.data_ptr() for k, v in entry.items()} for entry in optimizer.state.values()] == pointers


@pytest.mark.parametrize(
    "other",
    [torch.zeros(4, 3), torch.zeros(3), torch.zeros(3).double(), torch.zeros(3, device="meta")],
    ids=str,
)
def test_tensors_that_do_not_fit_the_parameter_are_replaced(other):
    source, optimizer = (make([nn.Parameter(torch.ones(3))]) for _ in range(2))
    for each in (source, optimizer):
        steps(each, 0, 2)
    (p,) = params_of(optimizer)
    optimizer.state[p]["exp_avg"] = other
    optimizer.load_state_dict(source.state_dict())
    assert bits(optimizer.state[p]["exp_avg"]) == bits(source.state[params_of(source)[0]]["exp_avg"])


def test_loading_its_own_live_state_changes_nothing():
    optimizer = scheduled()
    steps(optimizer, 0, 3)
    optimizer.scheduler.step()
    with unchanged(optimizer):
        optimizer.load_state_dict(optimizer.state_dict())


class Without(TorchDispatchMode):
    """An operator that may not be called."""

    def __init__(self, refused):
        super().__init__()
        self.refused = refused

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not self.refused
        return func(*args, **(kwargs or {}))


def test_counts_of_updates_are_not_read_one_by_one():
    """On a GPU each would be waited for."""
    optimizer = scheduled()
    steps(optimizer, 0, 3)
    with Without(torch.ops.aten._local_scalar_dense.default):
        optimizer.state_dict()


def test_loading_copies_no_tensor_but_into_those_that_are_there():
    source, optimizer = scheduled(), scheduled()
    for each in (source, optimizer):
        steps(each, 0, 3)
    state = source.state_dict()
    # as old files have them
    state["state"] = {i: {**entry, "step": float(entry["step"])} for i, entry in state["state"].items()}
    with Without(torch.ops.aten.clone.default):
        optimizer.load_state_dict(state)
        optimizer.load_state_dict(optimizer.state_dict())


def test_an_entry_that_has_no_count_yet_can_be_saved():
    optimizer = scheduled()
    optimizer.state[params_of(optimizer)[0]]["note"] = "of a tool"
    assert optimizer.state_dict()["fusedlr"]["groups"][0]["k_at_step"] == 0
    step(optimizer, 0)
    assert optimizer.state_dict()["fusedlr"]["groups"][0]["k_at_step"] == 1


def test_a_group_without_parameters_loads_entries_of_none():
    optimizer = make([{"params": []}])
    state = optimizer.state_dict()
    state["state"]["note"] = {"a": 1}
    optimizer.load_state_dict(state)
    assert optimizer.state["note"] == {"a": 1}


def test_an_entry_without_anything_begins_anew():
    source = make()
    steps(source, 0, 3)
    state = source.state_dict()
    # asking torch's `state` for a tensor makes one
    state["state"][0] = {}
    optimizer = make()
    steps(optimizer, 0, 2)
    optimizer.load_state_dict(state)
    assert optimizer.state[params_of(optimizer)[0]] == {}
    step(optimizer, 3)
    assert [int(optimizer.state[p]["step"]) for p in params_of(optimizer)] == [1, 4, 4, 4]


def test_on_a_gpu_the_file_has_stock_adamw_keep_its_counts_there():
    with FakeTensorMode():
        here, there = (nn.Parameter(torch.ones(2, device=device)) for device in ("cpu", "cuda"))
        saved = {"param_groups": [{}, {}]}
        checkpoint.complete(saved, [{"params": [here]}, {"params": [here, there]}], {})
    assert [group.get("fused") for group in saved["param_groups"]] == [None, True]


def test_live_tensors_may_come_back_for_other_parameters():
    optimizer = scheduled(make_params(shapes=((3,), (3,), (3,))))
    steps(optimizer, 0, 3)
    for i, p in enumerate(params_of(optimizer)):
        optimizer.state[p]["note"] = i
    state = optimizer.state_dict()
    state["state"] = {i: state["state"][(i + 1) % 3] for i in range(3)}
    wanted = [bits(dict(optimizer.state[p])) for p in params_of(optimizer)]
    optimizer.load_state_dict(state)
    assert [bits(dict(optimizer.state[p])) for p in params_of(optimizer)] == wanted[1:] + wanted[:1]


def test_parameters_without_saved_state_start_anew():
    source = make()
    steps(source, 0, 3, missing=lambda k, i: i == 0)
    optimizer = make()
    steps(optimizer, 0, 2)
    optimizer.load_state_dict(source.state_dict())
    stock = make_stock(copied(params_of(optimizer)))
    stock.load_state_dict(source.state_dict())
    assert params_of(optimizer)[0] not in optimizer.state
    for each in (optimizer, stock):
        steps(each, 3, 5)
    assert_same(optimizer, stock)


def test_hyperparameters_and_the_peak_come_from_the_file_and_the_schedule_from_here():
    source = make(lr=0.3, betas=(0.5, 0.6), weight_decay=0.7, schedule=fusedlr.linear(total_steps=5))
    steps(source, 0, 2)
    optimizer = scheduled()
    with pytest.warns(UserWarning, match="the loaded schedule is not the one asked for"):
        optimizer.load_state_dict(source.state_dict())
    group = optimizer.param_groups[0]
    assert (group["betas"], group["weight_decay"], group["initial_lr"]) == ((0.5, 0.6), 0.7, 0.3)
    assert group["schedule"] == SCHEDULE
    assert group["lr"] == SCHEDULE.lr_at(2, 0.3)


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
    # nor would a file of theirs have it
    assert "max_grad_norm" not in optimizer.param_groups[0]


def test_independent_groups_count_their_own_steps_without_our_keys_too():
    def build() -> fusedlr.FusedAdamW:
        return two_groups(groups="independent")

    source = build()
    steps(source, 0, 5, missing=lambda k, i: i > 1 and k % 2 == 0)
    assert source.metrics()["step"].tolist() == [5, 2]
    state = source.state_dict()
    del state["fusedlr"]
    optimizer = build()
    optimizer.load_state_dict(state)
    assert optimizer.metrics()["step"].tolist() == [5, 2]


def test_a_file_without_its_states_never_sets_the_schedule_before_its_start():
    source = scheduled()
    steps(source, 0, 4)
    source.add_param_group({"params": make_params()})
    steps(source, 4, 6)
    state = source.state_dict()
    state["state"] = {}
    optimizer = scheduled()
    optimizer.add_param_group({"params": make_params()})
    optimizer.load_state_dict(state)
    assert optimizer.metrics()["step"].tolist() == [0, 0]


@pytest.mark.parametrize("lost", ["k", "k_at_step"])
def test_a_file_that_lost_a_count_goes_on_at_the_updates_made(lost):
    source, optimizer = scheduled(), scheduled()
    steps(source, 0, 3)
    state = source.state_dict()
    del state["fusedlr"]["groups"][0][lost]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["k"] == 3


def test_the_first_rate_that_a_torch_scheduler_noted_is_a_peak_and_goes_with_the_file():
    source, plain, ours, stock = make(lr=0.3), make(), make(), make_stock()
    for each in (source, ours, stock):
        torch.optim.lr_scheduler.LambdaLR(each, lambda k: 0.5)
    optimizer = scheduled()
    with quiet():
        optimizer.load_state_dict(source.state_dict())
    assert optimizer.param_groups[0]["initial_lr"] == 0.3
    # as in torch a file without it takes it away
    for each in (ours, stock):
        each.load_state_dict(torchs_part(plain.state_dict()))
        assert "initial_lr" not in each.param_groups[0]


def test_betas_may_come_as_a_list():
    source = scheduled()
    steps(source, 0, 1)
    state = source.state_dict()
    # a trip through torch.distributed.checkpoint or JSON makes lists of tuples
    state["param_groups"][0]["betas"] = list(state["param_groups"][0]["betas"])
    optimizer = scheduled()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_file_without_betas_leaves_each_group_its_own():
    source = scheduled()
    steps(source, 0, 1)
    state = source.state_dict()
    del state["param_groups"][0]["betas"]
    optimizer = scheduled([{"params": make_params(), "betas": (0.5, 0.75)}])
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)


def test_a_schedule_may_stand_in_a_state_dict_as_it_is():
    source, other = scheduled(), fusedlr.linear(total_steps=9)
    steps(source, 0, 1)
    state = source.state_dict()
    state["fusedlr"]["groups"][0]["schedule"] = SCHEDULE
    optimizer = scheduled()
    with silent():
        optimizer.load_state_dict(state)
    state["fusedlr"]["groups"][0]["schedule"] = other
    with pytest.warns(UserWarning, match="the checkpoint's run has 9 updates, this one 12"):
        optimizer.load_state_dict(state)


def test_a_write_before_loading_is_forgotten():
    source = scheduled()
    steps(source, 0, 2)
    optimizer = scheduled()
    optimizer.param_groups[0]["lr"] = 0.7
    optimizer.load_state_dict(source.state_dict())
    steps(optimizer, 2, 3)
    assert optimizer.metrics()["lr"].item() == pytest.approx(SCHEDULE.lr_at(2, PEAK), rel=1e-15)


def test_names_are_kept_as_torch_keeps_them():
    def named() -> list[tuple[str, nn.Parameter]]:
        return list(zip("abcd", make_params(), strict=True))

    ours, stock = make(named()), make_stock(named())
    assert torchs_part(ours.state_dict()) == stock.state_dict()
    assert ours.state_dict()["param_groups"][0]["param_names"] == list("abcd")
    steps(stock, 0, 2)
    ours.load_state_dict(stock.state_dict())
    assert ours.param_groups[0]["param_names"] == list("abcd")
    # an unnamed state keeps this optimizer's names
    unnamed = make_stock()
    steps(unnamed, 0, 2)
    ours.load_state_dict(unnamed.state_dict())
    assert ours.param_groups[0]["param_names"] == list("abcd")
