"""Construction, steps and state under FakeTensorMode: shapes without values, through the reference."""

from __future__ import annotations

import pytest
import torch
from kit import needs_watch
from torch import nn
from torch._subclasses import FakeTensorMode

import fusedlr
from fusedlr.backends import compiled

OPTIONS = {
    "plain": {},
    "schedule and clipping": {"schedule": fusedlr.cosine(2, 20), "max_grad_norm": 1.0},
    "table": {"schedule": fusedlr.table([1.0, 0.5, 0.25])},
    "record": {"record": fusedlr.Record(last=2)},
    "independent": {"groups": "independent", "max_grad_norm": 1.0, "amsgrad": True},
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_without_values_has_the_shapes_and_rates_of_a_real_one(name, backend):
    def run(n):
        params = [nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3))]
        optimizer = fusedlr.FusedAdamW(params, lr=0.1, backend=backend, **OPTIONS[name])
        rates = []
        for _ in range(n):
            for p in params:
                p.grad = torch.ones_like(p)
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
            optimizer.zero_grad()
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.scheduler.step()
        return optimizer, rates

    def shapes(state_dict):
        return {
            i: {key: (tuple(value.shape), value.dtype) for key, value in entry.items()}
            for i, entry in state_dict["state"].items()
        }

    real, want = run(3)
    state, steps = shapes(real.state_dict()), real.metrics()["step"].shape
    with FakeTensorMode():
        fake, rates = run(3)
        assert fake.backend == "reference"
        assert repr(fake)
        state_dict = fake.state_dict()
        assert shapes(state_dict) == state
        assert fake.metrics()["step"].shape == steps
        assert fake.last_metrics()["step"] == [3]
        fake.load_state_dict(state_dict)
        added = nn.Parameter(torch.ones(2))
        added.grad = torch.ones(2)
        fake.add_param_group({"params": [added]})
        fake.step()
        assert len(fake.last_metrics()["step"]) == 2
    assert rates == want


def test_counts_without_values_are_placed_outside_of_the_mode():
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3))
        group = {"params": [p], "scope": "one"}
        optimizer = fusedlr.FusedAdamW([group], lr=0.1, schedule=fusedlr.cosine(2, 20))
        p.grad = torch.ones(3)
        optimizer.step()
    (group,) = optimizer.param_groups
    optimizer.scheduler.load_state_dict(optimizer.scheduler.state_dict())
    assert group["k"] == 1
    group["k"] = 3
    assert group["k"] == 3
    optimizer.reset_scope("one")
    assert group["k"] == 0


def test_a_step_without_values_is_refused_in_the_words_of_others():
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3))
        optimizer = fusedlr.FusedAdamW([p], lr=0.1)
        p.grad = torch.ones(3)
        optimizer.step()
        optimizer.param_groups[0]["eps"] = -1.0
        with pytest.raises(ValueError, match=r"group 0: eps=-1\.0"):
            optimizer.step()


@needs_watch
def test_the_compiled_watch_is_not_asked_for_addresses_that_do_not_exist(monkeypatch):
    def refuse(*given):
        raise AssertionError("a fake tensor is watched")

    monkeypatch.setattr(compiled.host, "Watch", refuse)
    with FakeTensorMode():
        p = nn.Parameter(torch.ones(3))
        optimizer = fusedlr.FusedAdamW([p], lr=0.1, backend="reference")
        p.grad = torch.ones(3)
        optimizer.step()
