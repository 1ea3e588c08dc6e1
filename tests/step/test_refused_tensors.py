"""Parameters and gradients that cannot be used are refused before anything changes."""

from __future__ import annotations

import pytest
import torch
from kit import make, make_params, scheduled, set_grads, steps
from snapshots import unchanged
from torch import nn


def test_an_expanded_parameter_is_refused_before_anything_changes():
    """Its elements share memory: an update in place would be applied several times or not at all."""
    good, expanded = make_params()[0], nn.Parameter(torch.ones(1, dtype=torch.float64).expand(5))
    optimizer = make([good, expanded])
    set_grads(optimizer)
    with (
        unchanged(optimizer),
        pytest.raises(RuntimeError, match=r"parameter 1 of group 0, shape \(5,\): .*(share|overlap)"),
    ):
        optimizer.step()


def test_a_single_element_shares_memory_with_no_other():
    p, q = (nn.Parameter(x) for x in (torch.ones(1).as_strided((1,), (0,)), torch.ones(1)))
    for optimizer in (make([p]), make([q])):
        steps(optimizer, 0, 3)
    assert p.stride() == (0,)
    assert torch.equal(p, q)


def sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p).to_sparse()


def other_dtype(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.to(torch.bfloat16)


def other_shape(p: nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    p.data = p.data.reshape(-1)[:5]


REFUSED_GRADS = [
    (sparse, "a gradient of layout torch.sparse_coo is not supported: gradients must be dense"),
    (other_dtype, "its gradient is torch.float64 but the parameter is torch.bfloat16"),
    (other_shape, r"its gradient has shape \(4, 3\) but the parameter has \(5,\)"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED_GRADS, ids=[f.__name__ for f, _ in REFUSED_GRADS])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("named", [True, False])
def test_a_gradient_that_cannot_be_used_is_refused_before_anything_changes(spoil, message, fresh, named):
    good, bad = make_params()[1], make_params()[0]
    params = [("good", good), ("layer.bad", bad)] if named else [good, bad]
    optimizer = scheduled(params, max_grad_norm=1.0)
    if not fresh:
        steps(optimizer, 0, 2)
    set_grads(optimizer)
    bad.grad = None
    spoil(bad)
    name = "parameter 'layer.bad'" if named else r"parameter 1 of group 0, shape \(.*\)"
    with unchanged(optimizer), pytest.raises(RuntimeError, match=f"{name}: {message}"):
        optimizer.step()


def test_a_parameter_that_came_after_the_names_is_called_by_its_place():
    optimizer = make([("a", make_params()[0])])
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    set_grads(optimizer)
    sparse(optimizer.param_groups[0]["params"][1])
    with unchanged(optimizer), pytest.raises(RuntimeError, match=r"parameter 1 of group 0, shape \(2,\): "):
        optimizer.step()


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (lambda: torch.ones(3, dtype=torch.complex64), "a parameter that is complex is not supported"),
        (lambda: torch.ones(3, device="meta"), "meta"),
        (lambda: torch.ones(3, dtype=torch.int64), "a parameter of dtype torch.int64 cannot be optimized"),
    ],
    ids=["complex", "meta", "whole numbers"],
)
def test_a_parameter_that_cannot_be_trained_is_refused_when_it_has_a_gradient(tensor, message):
    good, bad = make_params()[0], nn.Parameter(tensor(), requires_grad=False)
    optimizer = make([good, bad])
    good.grad, bad.grad = torch.ones_like(good), torch.ones_like(bad)
    with unchanged(optimizer), pytest.raises(RuntimeError, match=f"parameter 1 of group 0, .*: .*{message}"):
        optimizer.step()


class GradientElsewhere(nn.Parameter):
    """A parameter whose gradient lies on another device, as where its data was moved alone."""

    grad = property(lambda self: torch.ones(3, device="meta"))  # type: ignore[assignment]


def test_a_gradient_on_another_device_is_refused():
    optimizer = make([GradientElsewhere(torch.ones(3))])
    with unchanged(optimizer), pytest.raises(RuntimeError, match="is on meta but the parameter is on cpu"):
        optimizer.step()


@pytest.mark.parametrize("options", ({"max_grad_norm": 1.0}, {"nonfinite": "skip"}), ids=repr)
def test_a_norm_over_shards_is_refused(options):
    params = make_params()
    # what FSDP sets on the parameters it shards
    params[1]._fsdp_flattened = True  # type: ignore[attr-defined]
    optimizer = make(params, **options)
    set_grads(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0.*FSDP.*max_grad_norm=None"):
        optimizer.step()
    assert not optimizer.state
    make(params).step()
