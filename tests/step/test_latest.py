"""`last_update_ratios`: a few numbers of the last step, as the recording has them, for whoever logs them."""

import math

import numpy as np
import pytest
import torch
from kit import make, set_grads, slow_arrivals, spoil, step, steps
from snapshots import params_of
from torch import nn
from torch._subclasses import FakeTensorMode

from fusedlr import Record
from fusedlr import latest as latest_module
from fusedlr.record import Ring

LORA = [f"model.layers.{i}.q_proj.lora_{matrix}.{{}}.weight" for matrix in "AB" for i in range(3)]


def lora(adapters=("default",)):
    """Parameters with PEFT's names; B matrices start at 0."""
    torch.manual_seed(0)
    return [
        (name.format(adapter), nn.Parameter(torch.zeros(4, 3) if "lora_B" in name else torch.randn(3, 4)))
        for adapter in adapters
        for name in LORA
    ]


def test_they_are_the_medians_of_what_is_recorded(device, backend):
    params = [(name, nn.Parameter(p.detach().to(device))) for name, p in lora()]
    norm = ("model.norm.weight", nn.Parameter(torch.ones(5, device=device)))
    head = ("model.head.weight", nn.Parameter(torch.ones(2, 5, device=device)))
    optimizer = make([*params, norm, head], record=Record(), backend=backend)
    assert optimizer.last_update_ratios() == {}
    step(optimizer, 0)
    # B was 0, so it moved infinitely much of itself
    assert set(optimizer.last_update_ratios()) == {"lora_A", "matrices", "vectors"}
    for k in range(1, 4):
        step(optimizer, k)
        recording = optimizer.record()
        of = dict(zip(recording["names"], recording["tensor_update_ratio"][-1], strict=True))
        expected = {
            "lora_A": np.median([x for name, x in of.items() if "lora_A" in name]),
            "lora_B": np.median([x for name, x in of.items() if "lora_B" in name]),
            "matrices": of["model.head.weight"],
            "vectors": of["model.norm.weight"],
        }
        assert optimizer.last_update_ratios() == pytest.approx(expected, rel=1e-6)
    # the ring goes round
    short = make(lora(), record=Record(last=2))
    steps(short, 0, 5)
    found = short.record()["tensor_update_ratio"][-1]
    assert short.last_update_ratios()["lora_A"] == pytest.approx(np.median(found[:3]))


def test_a_skipped_step_moved_nothing_and_what_has_no_gradient_is_left_out():
    optimizer = make(lora(), record=Record(), max_grad_norm=1.0)
    steps(optimizer, 0, 2)
    set_grads(optimizer, 2)
    spoil(optimizer)
    optimizer.step()
    assert optimizer.last_update_ratios() == {"lora_A": 0.0, "lora_B": 0.0}
    set_grads(optimizer, 3, missing=lambda k, i: i < 3)
    optimizer.step()
    assert list(optimizer.last_update_ratios()) == ["lora_B"]


@pytest.mark.parametrize(("name", "value"), (("grad", math.nan), ("lr", 1e39)))
def test_what_has_become_nan_or_inf_is_left_out(name, value):
    head = nn.Parameter(torch.ones(2, 5))
    optimizer = make([*lora(), ("model.head.weight", head)], record=Record())
    set_grads(optimizer)
    if name == "grad":
        head.grad.fill_(value)
    else:
        optimizer.param_groups[0]["lr"] = value
        for p in params_of(optimizer)[:-1]:
            p.grad = None
    optimizer.step()
    assert not head.isfinite().all()
    assert list(optimizer.last_update_ratios()) == (["lora_A"] if name == "grad" else [])


def test_several_adapters_are_told_apart():
    norm = ("model.norm.weight", nn.Parameter(torch.ones(5)))
    optimizer = make([*lora(("first", "second")), norm], record=Record())
    steps(optimizer, 0, 2)
    kinds = {f"lora_{matrix}/{adapter}" for matrix in "AB" for adapter in ("first", "second")}
    assert set(optimizer.last_update_ratios()) == {*kinds, "vectors"}


@pytest.mark.parametrize("record", [None, Record(tensors=False)])
def test_without_tensors_there_are_none(record):
    optimizer = make(lora(), record=record)
    step(optimizer, 0)
    assert optimizer.last_update_ratios() == {} and optimizer.recorded == record


def test_where_tensors_have_no_values_there_are_none():
    with FakeTensorMode():
        optimizer = make([("w", nn.Parameter(torch.ones(3)))], record=Record())
        step(optimizer)
        assert optimizer.last_update_ratios() == {}


def test_what_was_before_a_file_of_no_tensors_is_not_shown():
    optimizer = make(lora(), record=Record())
    step(optimizer)
    assert optimizer.last_update_ratios()
    state = optimizer.state_dict()
    record = state["fusedlr"]["record"]
    record.update(params=[], sums=record["sums"][:, :, :0])
    optimizer.load_state_dict(state)
    assert optimizer.last_update_ratios() == {}


@pytest.mark.parametrize(("captured", "tensors"), ((False, True), (True, True), (False, False)))
def test_no_copy_is_started_without_tensors_or_while_a_graph_is_captured(captured, tensors, monkeypatch):
    started = []
    monkeypatch.setattr(latest_module, "Arrival", started.append)
    monkeypatch.setattr(latest_module, "capturing", lambda device: captured)
    # a device that is not the CPU
    ring = Ring.empty(Record(tensors=tensors), 1, torch.device("meta"), torch.float32)
    assert latest_module.Latest().ratios(ring, []) == {}
    assert len(started) == (tensors and not captured)


def test_from_a_gpu_the_last_copy_that_has_arrived_is_shown_and_nothing_waits(monkeypatch):
    optimizer = make(lora(), record=Record())
    started = slow_arrivals(monkeypatch, latest_module)
    latest = latest_module.Latest()
    # what is done for a ring on a GPU, with this one
    monkeypatch.setattr(latest, "_refresh", latest._take_arrived)

    def ratios():
        return latest.ratios(optimizer._counts.counters.ring, optimizer.param_groups)

    steps(optimizer, 0, 2)
    assert ratios() == {} and len(started) == 1
    expected = optimizer.last_update_ratios()
    step(optimizer, 2)
    # on its way: no second copy is started
    assert ratios() == {} and len(started) == 1
    started[0].here = True
    assert ratios() == expected != optimizer.last_update_ratios()
    assert len(started) == 2
    # one that was started before a parameter came along is of those that were there
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3)))]})
    step(optimizer, 3)
    started[1].here = True
    assert set(ratios()) == {"lora_A", "lora_B"}
    started[2].here = True
    assert set(ratios()) == {"lora_A", "lora_B", "vectors"}
