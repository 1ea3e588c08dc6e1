"""torch.distributed.checkpoint in one process, and the step at a rate of zero by which it allocates state."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from kit import PEAK, disagreements, make, quiet, recorded, scheduled, set_grads, silent, step, steps
from snapshots import bits, changes, params_of, snapshot
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp_state

import fusedlr


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2, bias=False)


def model_and_optimizer() -> tuple[nn.Module, fusedlr.FusedAdamW]:
    torch.manual_seed(0)
    model = Model()
    model.b.to(torch.bfloat16)
    groups = [{"params": list(model.a.parameters())}, {"params": list(model.b.parameters()), "lr": 0.2}]
    return model, scheduled(groups, max_grad_norm=1.0)


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


@pytest.mark.parametrize("scheduler_first", [False, True])
def test_a_schedulers_state_carries_peaks_and_skips_past_distributed_checkpoint(scheduler_first):
    model, optimizer = model_and_optimizer()
    optimizer.param_groups[1]["initial_lr"] = 0.4
    steps(optimizer, 0, 3)
    set_grads(optimizer, 3)
    params_of(optimizer)[0].grad.fill_(torch.nan)
    optimizer.step()
    saved, scheduler = dcp_state.get_optimizer_state_dict(model, optimizer), optimizer.scheduler.state_dict()
    assert "fusedlr" not in saved
    other_model, other = model_and_optimizer()
    if scheduler_first:
        other.scheduler.load_state_dict(scheduler)
    with quiet():
        dcp_state.set_optimizer_state_dict(other_model, other, saved)
    if not scheduler_first:
        other.scheduler.load_state_dict(scheduler)
    assert other.metrics()["step"].tolist() == [3, 3]
    assert [group["initial_lr"] for group in other.param_groups] == [PEAK, 0.4]
    assert int(other.metrics()["skipped"]) == 1


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


def test_the_step_that_allocates_state_is_none_of_the_run():
    """torch.distributed.checkpoint makes a step with lr 0 and zero gradients on a fresh optimizer."""
    model = nn.Linear(3, 2)
    optimizer = fusedlr.FusedAdamW(
        model.parameters(), lr=PEAK, weight_decay=0.5, schedule=fusedlr.cosine(total_steps=9)
    )
    before = bits(dict(model.state_dict()))
    with recorded() as caught:
        dcp_state.get_optimizer_state_dict(model, optimizer)
        assert bits(dict(model.state_dict())) == before
        assert optimizer.metrics()["step"].tolist() == [0]
        assert {int(entry["step"]) for entry in optimizer.state.values()} == {0}
        set_grads(optimizer, 0)
        optimizer.step()
    assert not disagreements(caught)
    assert optimizer.metrics()["step"].tolist() == [1]
    assert optimizer.metrics()["lr"].tolist() == [PEAK]


def test_an_allocating_step_moves_no_weight_under_a_tensor_rate():
    model = nn.Linear(3, 2)
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=torch.tensor(PEAK), weight_decay=0.5)
    before = bits(dict(model.state_dict()))
    dcp_state.get_optimizer_state_dict(model, optimizer)
    assert bits(dict(model.state_dict())) == before
    assert optimizer.param_groups[0]["lr"] == torch.tensor(PEAK)


def test_a_foreign_rate_of_zero_later_in_the_run_is_a_step():
    optimizer = scheduled()
    step(optimizer, 0)
    optimizer.param_groups[0]["lr"] = 0.0
    with quiet():
        step(optimizer, 1)
    assert optimizer.metrics()["step"].tolist() == [2]


def test_the_schedules_own_first_rate_of_zero_is_a_step():
    optimizer = scheduled()
    assert optimizer.param_groups[0]["lr"] == 0.0
    step(optimizer, 0)
    assert optimizer.metrics()["step"].tolist() == [1]


def test_the_rate_of_an_allocating_step_is_not_that_of_the_next():
    optimizer = scheduled(schedule=fusedlr.cosine(total_steps=9))
    given_nothing(optimizer)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [0]
    # whether or not a tool puts back the rate that there was
    with silent():
        step(optimizer, 0)
    assert optimizer.metrics()["lr"].tolist() == [PEAK]


# done to an optimizer between the checkpoint tool's two doings, a zero gradient and a rate of 0, and the step
NOT_ONLY_TO_ALLOCATE: dict[str, Callable[[fusedlr.FusedAdamW], Any]] = {
    "another option": lambda optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
    "another rate": lambda optimizer: optimizer.param_groups[0].update(lr=0.3),
    "a rate in a tensor": lambda optimizer: optimizer.param_groups[0].update(lr=torch.tensor(0.0)),
    "a gradient": lambda optimizer: params_of(optimizer)[0].grad.fill_(1),
}


def given_nothing(optimizer: fusedlr.FusedAdamW) -> None:
    """Assign a rate of 0 and gradients that are zero but for a missing one."""
    optimizer.param_groups[0]["lr"] = 0.0
    for p in params_of(optimizer)[:-1]:
        p.grad = torch.zeros_like(p)


def test_a_step_at_the_rate_shown_with_gradients_of_zero_only_allocates():
    optimizer = scheduled()
    given_nothing(optimizer)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [0]
    # with the state there, the same is a step
    given_nothing(optimizer)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]


@pytest.mark.parametrize("name", NOT_ONLY_TO_ALLOCATE)
def test_a_first_step_that_does_more_than_to_allocate_is_one_of_the_run(name):
    optimizer = scheduled()
    given_nothing(optimizer)
    NOT_ONLY_TO_ALLOCATE[name](optimizer)
    with quiet():
        optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_a_gradient_whose_values_cannot_be_looked_at_is_refused_in_words():
    # torch has no `any` of this layout
    optimizer = scheduled([nn.Parameter(torch.ones(4, 3).to_sparse_csr())])
    optimizer.param_groups[0]["lr"] = 0.0
    params_of(optimizer)[0].grad = torch.zeros(4, 3).to_sparse_csr()
    with pytest.raises(RuntimeError, match=r"a gradient of layout torch\.sparse_csr is not supported"):
        optimizer.step()


def test_a_first_step_at_rate_0_without_a_schedule_is_one_of_the_run():
    optimizer = make()
    given_nothing(optimizer)
    optimizer.step()
    assert optimizer.metrics()["step"].tolist() == [1]
