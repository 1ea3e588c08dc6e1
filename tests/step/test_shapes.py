"""Any mix of shapes, groups, options and missing gradients gives torch's numbers."""

from __future__ import annotations

import torch
from cases import Case, Group
from harness import fused, relative_difference, run, stock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import FP64_TRAJECTORY

import fusedlr

shapes = st.lists(st.integers(0, 6), min_size=0, max_size=3).map(tuple) | st.sampled_from([(1023,), (1025,)])
options = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(1e-5, 0.1),
        "weight_decay": st.floats(0, 0.5),
        "betas": st.tuples(st.floats(0, 0.99), st.floats(0, 0.9999)),
        "eps": st.floats(1e-8, 1e-2),
        "maximize": st.booleans(),
    },
)
groups = st.lists(
    st.builds(Group, st.lists(shapes, max_size=4).map(tuple), options), min_size=1, max_size=3
).filter(lambda groups: any(group.shapes for group in groups))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    total = draw(st.integers(1, 12))
    warmup = draw(st.integers(0, total))
    period = draw(st.integers(2, 5))
    size = draw(st.floats(1e-6, 1e6))
    return Case(
        name="drawn",
        groups=tuple(draw(groups)),
        schedule=fusedlr.cosine(warmup_steps=warmup, total_steps=total, min_lr_ratio=draw(st.floats(0, 1))),
        max_grad_norm=draw(st.none() | st.floats(1e-3, 1e3)),
        # past the end of the schedule too
        steps=min(total + 2, 8),
        options={"amsgrad": draw(st.booleans())},
        missing=lambda k, i: (k + i) % period == 0,
        grad_size=lambda k: size,
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases())
def test_equals_torch_in_fp64(case):
    ours, theirs = run(case, fused(case)), run(case, stock(case))
    assert relative_difference(ours.params, theirs.params) <= FP64_TRAJECTORY
    for key in ("exp_avg", "exp_avg_sq", "step"):
        assert relative_difference(ours.state(key), theirs.state(key)) <= FP64_TRAJECTORY
    k = [case.steps] * len(case.groups)
    assert ours.optimizer.last_metrics()["step"] == k
    # the counters are 0-dim views into one tensor
    steps = ours.state("step")
    assert len({step.untyped_storage().data_ptr() for step in steps}) <= 1
    assert all(step.dtype == torch.float32 and step.dim() == 0 for step in steps)
