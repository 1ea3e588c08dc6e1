"""`ZClip`: limits against the formula of its paper in plain Python, what it sees, keeps and hands over."""

from __future__ import annotations

import copy
import math
import pickle
import random
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from kit import counters, make_params, params_of, quiet, recorded, through_a_file
from torch import nn
from wrong import steps as wrong_steps

import fusedlr
from fusedlr import ZClip, backends

QUICK = ZClip(warmup_steps=3, alpha=0.5)
# fp32 on a GPU: the parts of a limit are each rounded, about five times, which is less than 1e-6 of it
LIMIT = 1e-6


@dataclass
class Plain:
    """The authors' algorithm, adaptive scaling, on numbers."""

    zclip: ZClip
    warm_up: list[float] = field(default_factory=list)
    mean: float | None = None
    variance: float = 0.0

    def __call__(self, n: float) -> tuple[float, float, bool]:
        """The coefficient and the limit of a step with the norm `n`, and whether it is skipped."""
        zclip, limit, spike = self.zclip, n, False
        if self.mean is None:
            self.warm_up.append(n)
            if len(self.warm_up) == zclip.warmup_steps:
                self.mean = sum(self.warm_up) / len(self.warm_up)
                self.variance = sum((x - self.mean) ** 2 for x in self.warm_up) / len(self.warm_up)
        else:
            deviation = math.sqrt(self.variance)
            z = (n - self.mean) / (deviation + 1e-6)
            if z > zclip.z_thresh:
                spike, limit = True, self.mean + zclip.z_thresh**2 * deviation / z
            if not (spike and zclip.action == "skip"):
                self.mean = zclip.alpha * self.mean + (1 - zclip.alpha) * limit
                self.variance = zclip.alpha * self.variance + (1 - zclip.alpha) * (limit - self.mean) ** 2
        held = min(limit, zclip.max_norm or math.inf)
        highest = held if spike else zclip.max_norm or math.inf
        return min(1.0, highest / (n + 1e-6)), held, spike and zclip.action == "skip"


def norms_of_a_run(steps: int = 200) -> list[float]:
    """Norms that fall as those of a run do, with noise, and with spikes of every size."""
    draw = random.Random(0)
    norms = [0.3 + 2 * math.exp(-k / 40) + draw.uniform(-0.1, 0.1) for k in range(steps)]
    # one of them is the first after a warm-up of 25
    for k in (25, *range(7, steps, 11)):
        norms[k] *= draw.choice((1.2, 1.5, 2, 5, 30, 1000))
    return norms


def one_parameter(limit: Any, **options: Any) -> fusedlr.FusedAdamW:
    p = nn.Parameter(torch.zeros(2, device=options.pop("device", "cpu")))
    return fusedlr.FusedAdamW([p], lr=0.01, max_grad_norm=limit, **options)


def give(optimizer: Any, norm: float, first: int = 0) -> dict[str, Any]:
    """A step whose gradient norm this is; what it used."""
    for p in params_of(optimizer):
        p.grad = torch.zeros_like(p)
    params_of(optimizer)[first].grad.view(-1)[0] = norm
    optimizer.step()
    return {name: x.double().cpu() for name, x in optimizer.metrics().items()}


def seen(optimizer: Any) -> list[list[float]]:
    return optimizer._counts.read_norms()


def distance(zclip: ZClip, **options: Any) -> float:
    """How far coefficients and limits are from the paper's, relative; inf where other steps are skipped."""
    optimizer, plain, skips, spikes, worst = one_parameter(zclip, **options), Plain(zclip), 0, 0, 0.0
    for norm in norms_of_a_run():
        used = give(optimizer, norm)
        *expected, skipped = plain(float(used["grad_norm"]))
        skips, spikes = skips + skipped, spikes + (expected[1] < norm)
        pairs = zip((float(used["coef"]), float(used["limit"])), expected, strict=True)
        worst = max(worst, *(abs(x - y) / y if math.isfinite(x) else math.inf for x, y in pairs))
        if int(used["skipped"]) != skips:
            return math.inf
    assert spikes > 5 and (skips > 5) == (zclip.action == "skip")
    return worst


ZCLIPS = {
    "default": ZClip(),
    "skip": ZClip(action="skip"),
    "slow, with max_norm": ZClip(alpha=0.999, z_thresh=1.0, warmup_steps=10, max_norm=1.5),
    "nothing kept": ZClip(alpha=0.0, warmup_steps=1),
}


@pytest.mark.parametrize("name", ZCLIPS)
def test_every_step_has_the_coefficient_of_the_paper(device, backend, name):
    assert distance(ZCLIPS[name], device=device, backend=backend) <= LIMIT


@pytest.mark.parametrize("name", wrong_steps.GUARD_EDITS)
def test_other_formulas_are_rejected(name, monkeypatch):
    wrong = wrong_steps.load(name, wrong_steps.GUARD_EDITS)
    entry = replace(backends.BACKENDS["reference"], prepare=wrong.ReferenceStepper)
    monkeypatch.setitem(backends.BACKENDS, "reference", entry)
    assert max(distance(zclip, backend="reference") for zclip in ZCLIPS.values()) > 100 * LIMIT


def test_a_constant_norm_is_never_a_spike_and_the_next_larger_one_is(device, backend):
    optimizer = one_parameter(QUICK, device=device, backend=backend)
    for _ in range(30):
        assert give(optimizer, 0.7)["coef"] == 1
    used = give(optimizer, 0.8)
    # nothing deviates, so all that is above the mean is cut off
    assert float(used["limit"]) == pytest.approx(0.7, rel=1e-6)


def test_what_is_not_finite_and_what_is_skipped_is_not_seen(device, backend):
    optimizer = one_parameter(QUICK, device=device, backend=backend)
    for norm in (1.0, math.inf, 1.2, math.nan, 0.9, math.inf):
        give(optimizer, norm)
    count, mean, rest, *_ = seen(optimizer)[0]
    assert count == 3 and mean + rest == pytest.approx((1 + 1.2 + 0.9) / 3, rel=1e-6)
    optimizer.grad_scale = torch.tensor(1.0, device=device)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    give(optimizer, 1.1)
    assert seen(optimizer)[0][0] == 3


def test_the_limit_of_a_number_is_the_number_and_of_none_it_is_inf(device, backend):
    assert give(one_parameter(0.5, device=device, backend=backend), 2.0)["limit"] == 0.5
    assert give(one_parameter(None, device=device, backend=backend), 2.0)["limit"] == math.inf


def test_max_norm_caps_every_step_from_the_first_on(device, backend):
    zclip = ZClip(warmup_steps=2, max_norm=3.0)
    optimizer = one_parameter(zclip, device=device, backend=backend)
    used = give(optimizer, 6.0)
    assert used["limit"] == 3 and float(used["coef"]) == pytest.approx(0.5, rel=1e-6)
    # the mean is that of the norms before they are capped
    assert seen(optimizer)[0][1] == pytest.approx(6.0)


# who keeps what was seen


def two_scopes(*, independent: bool = False, **options: Any) -> fusedlr.FusedAdamW:
    params = make_params((torch.float32,), shapes=((3,), (2,), (4,)))
    names = (None, None, None) if independent else ("a", "a", "b")
    groups = [
        {"params": [p], "max_grad_norm": QUICK, **({"scope": name} if name else {})}
        for p, name in zip(params, names, strict=True)
    ]
    return fusedlr.FusedAdamW(groups, groups="independent" if independent else "joint", lr=0.01, **options)


def test_the_groups_of_a_scope_keep_what_it_has_seen_whatever_becomes_of_the_first(backend, device):
    if device != "cpu":
        pytest.skip("the counters move alike on every device")
    optimizer = two_scopes(backend=backend)
    for norm in (1.0, 2.0, 1.5, 1.1):
        give(optimizer, norm)
    before, of_b = seen(optimizer)[0], seen(optimizer)[2]
    assert before[0] == of_b[0] == 4
    first = optimizer.param_groups.pop(0)
    give(optimizer, 1.0)
    assert [x[0] for x in seen(optimizer)] == [5, 5]
    optimizer.param_groups.reverse()
    optimizer._notes.changed = True
    optimizer._counts.adopt(optimizer.param_groups)
    assert [x[0] for x in seen(optimizer)] == [5, 5]
    # the group that was out comes back as the first of its scope, with what was seen when it went
    optimizer.param_groups.insert(0, first)
    optimizer._counts.adopt(optimizer.param_groups)
    assert seen(optimizer)[0] == before
    new = {"params": [nn.Parameter(torch.ones(2))], "scope": "b"}
    optimizer.add_param_group(new)
    optimizer.param_groups.insert(0, optimizer.param_groups.pop())
    optimizer._counts.adopt(optimizer.param_groups)
    assert [x[0] for x in seen(optimizer)] == [5, 4, 5, 4]
    # put there as tools do, it is the first of its scope at once, while another scope has seen more
    another = {**optimizer.param_groups[1], "params": [nn.Parameter(torch.ones(2))], "scope": "a"}
    optimizer.param_groups.insert(0, another)
    optimizer._counts.adopt(optimizer.param_groups)
    assert [x[0] for x in seen(optimizer)] == [4, 5, 4, 5, 4]


def test_a_copy_a_pickle_and_a_file_go_on_bit_for_bit(device, backend):
    def run(optimizer: Any, begin: int, end: int) -> Any:
        for norm in norms_of_a_run()[begin:end]:
            give(optimizer, norm)
        return optimizer

    def loaded(state: Any) -> Any:
        other = one_parameter(zclip, device=device, backend=backend)
        with torch.no_grad():
            params_of(other)[0].copy_(params_of(half)[0])
        other.load_state_dict(state)
        return other

    zclip = ZClip(warmup_steps=10)
    whole, half = (run(one_parameter(zclip, device=device, backend=backend), 0, end) for end in (30, 17))
    others = [copy.deepcopy(half), pickle.loads(pickle.dumps(half))]
    others.append(loaded(through_a_file(half.state_dict())))
    if device == "cpu":
        # where tools drop what is ours from the optimizer's file, the scheduler's state has it
        other = one_parameter(zclip, backend=backend)
        with torch.no_grad():
            params_of(other)[0].copy_(params_of(half)[0])
        bare = {key: x for key, x in half.state_dict().items() if key != "fusedlr"}
        other.load_state_dict(bare)
        other.scheduler.load_state_dict(through_a_file(half.scheduler.state_dict()))
        others.append(other)
    for other in others:
        assert seen(other) == seen(half) and other.max_grad_norm == zclip
        run(other, 17, 30)
        assert torch.equal(params_of(other)[0], params_of(whole)[0]) and seen(other) == seen(whole)
        assert torch.equal(counters(other).limit, counters(whole).limit)


def test_a_scope_hands_its_limit_and_what_it_has_seen_to_another(backend, device):
    optimizer = two_scopes(backend=backend)
    for norm in (1.0, 2.0, 1.5, 1.1):
        give(optimizer, norm)
    state = through_a_file(optimizer.scope_state_dict("a"))
    alone = fusedlr.FusedAdamW(
        [{"params": make_params((torch.float32,), shapes=(s,)), "scope": "x"} for s in ((3,), (2,))],
        lr=0.01,
        backend=backend,
    )
    alone.load_scope_state_dict("x", state)
    assert seen(alone) == seen(optimizer)[:2] and alone.param_groups[1]["max_grad_norm"] == QUICK
    of_b = optimizer.scope_state_dict("b")
    give(optimizer, 1.0)
    optimizer.load_scope_state_dict("b", of_b)
    assert [x[0] for x in seen(optimizer)] == [5, 5, 4]
    optimizer.reset_scope("a")
    assert [x[0] for x in seen(optimizer)] == [0, 0, 4]


def test_what_was_seen_stays_where_another_limit_is_assigned(device, backend):
    optimizer = one_parameter(QUICK, device=device, backend=backend)
    for norm in (1.0, 2.0, 1.5, 1.1):
        give(optimizer, norm)
    before = seen(optimizer)
    optimizer.max_grad_norm = 0.1
    give(optimizer, 50.0)
    assert seen(optimizer) == before
    optimizer.max_grad_norm = ZClip(warmup_steps=4, alpha=0.9, z_thresh=1.0)
    assert give(optimizer, 50.0)["coef"] < 0.1


def test_a_reader_that_knows_no_zclip_finds_the_norm_that_caps_it():
    optimizer = two_scopes()
    optimizer.param_groups[2]["max_grad_norm"] = ZClip(max_norm=2.0)
    own = through_a_file(optimizer.state_dict())["fusedlr"]
    assert [group["max_grad_norm"] for group in own["groups"]] == [math.inf, math.inf, 2.0]
    assert "zclip" not in [*one_parameter(1.0).state_dict()["fusedlr"]["groups"][0]]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("norms", [1.0, 2.0], "expected 5 numbers"),
        ("norms", [1.5, 2.0, 0.0, 1.0, 0.0], "expected 5 numbers"),
        ("norms", [4, math.nan, 0.0, 1.0, 0.0], "expected 5 numbers"),
        ("norms", [4, 1.0, 0.5, 1.0, 0.0], "expected 5 numbers"),
        ("norms", [4, 1.0, 0.0, -1.0, 0.0], "expected 5 numbers"),
        ("norms", [4, 1.0, 0.0, 1.0, 0.5], "expected 5 numbers"),
        ("norms", [4, math.inf, 0.0, 1.0, 0.0], "expected 5 numbers"),
        ("norms", ["4", 1.0, 0.0, 1.0, 0.0], "expected 5 numbers"),
        ("norms", [-1, 1.0, 0.0, 1.0, 0.0], "expected 5 numbers"),
        ("norms", [2.0**53, 1.0, 0.0, 1.0, 0.0], "expected 5 numbers"),
        ("norms", "many", "expected 5 numbers"),
        ("norms", 5, "expected 5 numbers"),
        ("zclip", {"alpha": 2.0}, "alpha=2.0 must be a ratio"),
        ("zclip", {"beta": 2.0}, "must be a dict with keys among"),
        ("zclip", [0.97], "must be a dict with keys among"),
    ],
)
def test_a_hostile_file_is_refused_and_changes_nothing(key, value, message):
    optimizer = two_scopes()
    for norm in (1.0, 2.0):
        give(optimizer, norm)
    state, before = optimizer.state_dict(), seen(optimizer)
    state["fusedlr"]["groups"][1][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert seen(optimizer) == before


# words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.0}, "alpha=1.0 must be below 1"),
        ({"alpha": -0.5}, "alpha=-0.5 must be"),
        ({"z_thresh": 0}, "z_thresh=0 must be above 0"),
        ({"warmup_steps": 0}, "warmup_steps=0 must be at least 1"),
        ({"warmup_steps": 2**24 + 1}, "must be at most"),
        ({"max_norm": math.nan}, "max_norm=nan must be"),
        ({"action": "stop"}, "action='stop' is unknown"),
    ],
)
def test_wrong_values_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        ZClip(**options)


def test_a_run_whose_norms_have_risen_for_good_is_told_that_skipping_will_not_end():
    optimizer = one_parameter(ZClip(warmup_steps=3, action="skip"))
    with recorded() as caught:
        for norm in (1.0, 1.1, 0.9, *[9.0] * 12):
            give(optimizer, norm)
    (warning,) = [str(w.message) for w in caught]
    assert "10 optimizer steps in a row were skipped: ZClip takes" in warning and "norm 9, limit" in warning


def test_a_smaller_cap_is_taken_over():
    assert ZClip().capped(2.0).max_norm == 2 and ZClip(max_norm=1.0).capped(2.0).max_norm == 1
    assert ZClip(max_norm=1.0).capped(None) == ZClip(max_norm=1.0)


def test_groups_of_one_scope_agree_on_their_zclip():
    params = make_params((torch.float32,))
    groups = [
        {"params": [p], "scope": "a", "max_grad_norm": ZClip(alpha=x)}
        for p, x in zip(params[:2], (0.5, 0.6), strict=True)
    ]
    with pytest.raises(ValueError, match="its groups are normed and clipped together"):
        fusedlr.FusedAdamW(groups)


def test_independent_groups_have_limits_of_their_own(backend, device):
    with quiet():
        optimizer = two_scopes(independent=True, backend=backend)
        for k, norm in enumerate((1.0, 2.0, 1.5, 1.1, 100.0)):
            for p in params_of(optimizer):
                p.grad = torch.zeros_like(p)
            for i, p in enumerate(params_of(optimizer)):
                p.grad.view(-1)[0] = norm if i == 1 else 1 + k % 2
            optimizer.step()
    assert (optimizer.metrics()["coef"] < 1).tolist() == [False, True, False]
