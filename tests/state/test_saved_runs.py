"""A run that is saved and loaded, copied or pickled at any step is the run, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from kit import make, make_params, quiet, scheduled, silent, steps, through_a_file, two_groups
from snapshots import bits, changes, params_of, snapshot
from torch import nn

import fusedlr

Build = Callable[[], fusedlr.FusedAdamW]

RUNS: dict[str, tuple[Build, Callable[[int, int], bool] | None]] = {
    "fp64": (lambda: scheduled(), None),
    "mixed": (
        lambda: scheduled(make_params((torch.float32, torch.bfloat16, torch.float16)), max_grad_norm=1.0),
        None,
    ),
    "param dtype": (lambda: scheduled(make_params((torch.bfloat16,)), state_dtype="param"), None),
    "amsgrad": (lambda: scheduled(amsgrad=True), None),
    "no schedule": (lambda: make(), None),
    "groups": (lambda: two_groups(max_grad_norm=0.5), None),
    "missing": (lambda: scheduled(), lambda k, i: (k + i) % 3 == 0),
    "late": (lambda: two_groups(), lambda k, i: i > 1 and k < 4),
    "independent": (lambda: two_groups(groups="independent"), lambda k, i: i > 1 and k % 2 == 0),
    "first without": (lambda: scheduled(), lambda k, i: k < 3),
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
        with silent():
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
    optimizer = scheduled(make_params((torch.float32, torch.bfloat16)))
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
    optimizer = scheduled(make_params((dtype,)), amsgrad=True)
    steps(optimizer, 0, 2)
    moments = [(e["exp_avg"], e["exp_avg_sq"], e["max_exp_avg_sq"]) for e in optimizer.state.values()]
    assert {m.dtype for entry in moments for m in entry} == {torch.float32}
    # and hold digits that the parameter's dtype has not
    assert bits(moments[0][0]) != bits(moments[0][0].to(dtype).float())
    before = bits(moments)
    for target in (optimizer, scheduled(make_params((dtype,)), amsgrad=True)):
        target.load_state_dict(through_a_file(optimizer.state_dict()))
        moments = [(e["exp_avg"], e["exp_avg_sq"], e["max_exp_avg_sq"]) for e in target.state.values()]
        assert bits(moments) == before


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
    with quiet():
        twin.param_groups[0]["lr"] = 0.0
        weights = [bits(p) for p in twin.param_groups[0]["params"]]
        steps(twin, 6, 7)
    assert [bits(p) for p in twin.param_groups[0]["params"]] == weights


def test_a_copy_has_the_settings_of_the_original():
    options = {"max_grad_norm": 0.5, "nonfinite": "propagate", "backend": "reference", "amp_scaling": False}
    optimizer = scheduled(groups="independent", state_dtype="param", **options)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert repr(twin) == repr(optimizer)
        assert {
            name: getattr(twin, name) for name in ("max_grad_norm", "nonfinite", "backend", "groups")
        } == {"max_grad_norm": 0.5, "nonfinite": "propagate", "backend": "reference", "groups": "independent"}
        twin.max_grad_norm = 2.0
        assert optimizer.max_grad_norm == 0.5


def test_model_and_optimizer_copied_together_stay_together():
    model = nn.Linear(3, 2)
    optimizer = scheduled(model.parameters())
    steps(optimizer, 0, 2)
    twin_model, twin = copy.deepcopy((model, optimizer))
    assert params_of(twin)[0] is twin_model.weight
    steps(twin, 2, 3)
    steps(optimizer, 2, 3)
    assert bits(twin_model.weight) == bits(model.weight)
