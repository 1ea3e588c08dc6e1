"""What an optimizer keeps alive, and that it goes at once when it is dropped."""

from __future__ import annotations

import gc
import weakref

import pytest
from kit import PEAK, make, quiet, scheduled, step, steps
from snapshots import params_of
from torch.optim import lr_scheduler


@pytest.fixture
def no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("use", ["fresh", "stepped", "viewed", "loaded", "foreign", "refused"])
def test_a_dropped_optimizer_is_freed_at_once(use):
    optimizer = scheduled()
    params = params_of(optimizer)
    if use != "fresh":
        step(optimizer, 0)
    if use == "viewed":
        optimizer.scheduler.step()
        optimizer.last_metrics()
        repr(optimizer)
    if use == "loaded":
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.scheduler.load_state_dict(optimizer.scheduler.state_dict())
    if use == "foreign":
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda k: 1.0)
        with quiet():
            step(optimizer, 1)
        scheduler.step()
        del scheduler
    if use == "refused":
        with pytest.raises(ValueError, match="groups"):
            optimizer.load_state_dict({"state": {}, "param_groups": []})
    moments = [weakref.ref(entry["exp_avg"]) for entry in optimizer.state.values()]
    alive = weakref.ref(optimizer)
    del optimizer
    assert alive() is None
    assert all(ref() is None for ref in moments)
    assert params


@pytest.mark.usefixtures("no_collector")
def test_a_view_keeps_its_optimizer():
    view = scheduled().scheduler
    assert view.optimizer.param_groups[0]["initial_lr"] == PEAK
    alive = weakref.ref(view.optimizer)
    del view
    assert alive() is None


def test_a_dropped_group_of_parameters_is_not_kept_alive():
    optimizer = make()
    steps(optimizer, 0, 2)
    gone = weakref.ref(optimizer.param_groups[0]["params"][0])
    del optimizer.state[gone()]
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][1:]
    steps(optimizer, 2, 3)
    gc.collect()
    assert gone() is None


def test_a_cooldown_keeps_no_gradient_alive():
    optimizer = scheduled()
    step(optimizer)
    gradients = [weakref.ref(p.grad) for p in params_of(optimizer)]
    optimizer.cooldown(4)
    optimizer.zero_grad()
    assert all(ref() is None for ref in gradients)
