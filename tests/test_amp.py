"""Loss scaling, overflow and skipped steps: what a GradScaler asks for, and what is left alone."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from snapshots import bits, changes, params_of, snapshot
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import fusedlr

SCHEDULE = fusedlr.linear(warmup_steps=3, total_steps=12, min_lr_ratio=0.1)
SHAPES = ((5, 3), (7,), (), (0,))


def make_params(
    device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for dtype in dtypes
        for shape in SHAPES
    ]


def make(device: str = "cpu", backend: str = "auto", **options) -> fusedlr.FusedAdamW:
    options = {"lr": 0.05, "schedule": SCHEDULE, **options}
    return fusedlr.FusedAdamW(make_params(device), backend=backend, **options)


def set_grads(optimizer: torch.optim.Optimizer, k: int, scale: float = 1.0) -> None:
    """Gradients of step `k`; a power of two as scale leaves their digits alone."""
    generator = torch.Generator().manual_seed(100 + k)
    for p in params_of(optimizer):
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.device, p.dtype)


def spoil(optimizer: torch.optim.Optimizer, value: float = math.inf, index: int = 0) -> None:
    params_of(optimizer)[index].grad.view(-1)[0] = value


def scaler_for(device: str, scale: float = 1024.0) -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    # a scaler makes its scale at the first loss it sees
    scaler.scale(torch.zeros((), device=device))
    return scaler


def skipped(optimizer: fusedlr.FusedAdamW) -> int:
    return int(optimizer.metrics()["skipped"])


# --- a scaler drives it


@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_scaled_run_gives_the_bits_of_an_unscaled_one(device, backend, max_grad_norm, unscale_first):
    plain = make(device, backend, max_grad_norm=max_grad_norm)
    scaled = make(device, backend, max_grad_norm=max_grad_norm)
    scaler = scaler_for(device)
    for k in range(6):
        set_grads(plain, k)
        plain.step()
        set_grads(scaled, k, scale=1024.0)
        if unscale_first:
            scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        assert scaler.get_scale() == 1024.0
        assert bits(scaled.metrics()["grad_norm"]) == bits(plain.metrics()["grad_norm"])
    left_out = "grads" if not unscale_first else ""
    assert set(changes(snapshot(plain), snapshot(scaled))) <= {left_out}


def test_gradients_stay_as_they_were(device, backend):
    optimizer = make(device, backend, max_grad_norm=0.1)
    set_grads(optimizer, 0, scale=1024.0)
    before = [bits(p.grad) for p in params_of(optimizer)]
    scaler_for(device).step(optimizer)
    assert [bits(p.grad) for p in params_of(optimizer)] == before
    assert optimizer.metrics()["coef"] < 1


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_grad_scale_set_by_the_user_multiplies_the_scalers(device, backend, unscale_first):
    plain, scaled = make(device, backend, max_grad_norm=1.0), make(device, backend, max_grad_norm=1.0)
    set_grads(plain, 0)
    plain.step()
    scaler = scaler_for(device, 256.0)
    set_grads(scaled, 0, scale=4.0 * 256.0)
    scaled.grad_scale = torch.tensor(4.0, device=device)
    if unscale_first:
        scaler.unscale_(scaled)
    scaler.step(scaled)
    assert set(changes(snapshot(plain), snapshot(scaled))) <= {"grads"}
    # the scaler takes both attributes away, and the next step is an unscaled one
    assert not hasattr(scaled, "grad_scale") and not hasattr(scaled, "found_inf")


@pytest.mark.parametrize("scale", [8.0, 8, torch.tensor(8.0), torch.tensor([8.0]), torch.tensor(8), None])
def test_a_grad_scale_may_be_any_single_number(device, backend, scale):
    plain, scaled = make(device, backend), make(device, backend)
    set_grads(plain, 0)
    plain.step()
    set_grads(scaled, 0, scale=1.0 if scale is None else 8.0)
    scaled.grad_scale = scale.to(device) if isinstance(scale, Tensor) else scale
    scaled.step()
    assert set(changes(snapshot(plain), snapshot(scaled))) <= {"grads"}


def test_a_disabled_scaler_changes_nothing():
    plain, scaled = make(), make()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for optimizer in (plain, scaled):
        set_grads(optimizer, 0)
    plain.step()
    scaler.step(scaled)
    assert not changes(snapshot(plain), snapshot(scaled))


def test_a_scaler_finds_no_gradient_at_all():
    optimizer = make()
    scaler_for("cpu").step(optimizer)
    assert optimizer.metrics()["step"].tolist() == [1]


@pytest.mark.parametrize("unscale_first", [False, True])
def test_an_overflow_skips_the_step_and_nothing_else(device, backend, unscale_first):
    optimizer, scaler = make(device, backend), scaler_for(device)
    for k in range(2):
        set_grads(optimizer, k, scale=1024.0)
        scaler.step(optimizer)
        scaler.update()
    set_grads(optimizer, 2, scale=1024.0)
    spoil(optimizer, math.nan, index=4)
    if unscale_first:
        scaler.unscale_(optimizer)
    before = snapshot(optimizer, lr=False)
    scaler.step(optimizer)
    scaler.update()
    assert changes(before, snapshot(optimizer, lr=False)) == ["skipped"]
    assert skipped(optimizer) == 1
    assert scaler.get_scale() == 512.0


@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_run_with_overflows_is_the_run_without_those_steps(device, backend, max_grad_norm):
    whole = make(device, backend, max_grad_norm=max_grad_norm)
    broken = make(device, backend, max_grad_norm=max_grad_norm)
    scaler = scaler_for(device)
    for k in range(8):
        set_grads(whole, k)
        whole.step()
        whole.scheduler.step()
        while True:
            set_grads(broken, k, scale=scaler.get_scale())
            overflow = k in (0, 3, 4) and scaler.get_scale() > 1024.0 / 2 ** (1 + k)
            if overflow:
                spoil(broken)
            scaler.step(broken)
            scaler.update()
            broken.scheduler.step()
            if not overflow:
                break
    assert set(changes(snapshot(whole), snapshot(broken))) <= {"grads", "skipped"}
    assert skipped(broken) > 2
    assert broken.scheduler.last_epoch == 8


def test_torchs_own_schedule_drifts_after_an_overflow():
    """Beside ours: stock fused AdamW with LambdaLR, as accelerate and Lightning drive it."""
    stock = torch.optim.AdamW(make_params(dtypes=(torch.float32,)), lr=0.05, fused=True)
    stock_scheduler = LambdaLR(stock, SCHEDULE.lr_at)
    ours = fusedlr.FusedAdamW(make_params(dtypes=(torch.float32,)), lr=0.05, schedule=SCHEDULE)
    for optimizer, scheduler in ((stock, stock_scheduler), (ours, ours.scheduler)):
        scaler = scaler_for("cpu")
        for k in range(4):
            set_grads(optimizer, k, scale=scaler.get_scale())
            if k == 1:
                spoil(optimizer)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
    assert stock.state[stock.param_groups[0]["params"][0]]["step"] == 3
    assert stock_scheduler.last_epoch == 4
    assert ours.state[ours.param_groups[0]["params"][0]]["step"] == 3
    assert ours.scheduler.last_epoch == 3
    assert ours.scheduler.get_last_lr() == [SCHEDULE.lr_at(3, 0.05)]


def test_torch_applies_inf_gradients_where_two_devices_report_them():
    """Beside ours: the flag is a sum over devices, and stock fused AdamW skips at exactly 1.0 only."""
    stock = torch.optim.AdamW(make_params(dtypes=(torch.float32,)), lr=0.05, fused=True)
    set_grads(stock, 0)
    spoil(stock)
    stock.found_inf = torch.tensor(2.0)
    stock.step()
    p = params_of(stock)[0]
    assert stock.state[p]["step"] == -1
    assert not p.isfinite().all()


# --- found_inf


def flags() -> list:
    values = [0.0, 1.0, 2.0, -1.0, math.nan, math.inf, 1e-300]
    out = [(torch.tensor(v, dtype=torch.float64), v) for v in values]
    out += [(torch.tensor([v]), v) for v in values[:-1]]
    out += [(v, v) for v in (0, 1, 2, 0.0, 1.0, math.nan, False, True)]
    out += [(torch.tensor(v), v) for v in (0, 1, 2, False, True)]
    out += [(torch.tensor([[True]]), True), (torch.tensor([0], dtype=torch.uint8), 0)]
    return [
        pytest.param(f, v, id=f"{v}-{getattr(f, 'dtype', type(f).__name__)}-{getattr(f, 'ndim', '')}")
        for f, v in out
    ]


@pytest.mark.parametrize(("flag", "value"), flags())
def test_any_found_inf_but_zero_skips(device, backend, flag, value):
    optimizer, plain = make(device, backend), make(device, backend)
    for k in range(2):
        for each in (optimizer, plain):
            set_grads(each, k)
            each.step()
            each.scheduler.step()
    for each in (optimizer, plain):
        set_grads(each, 2)
    before = snapshot(optimizer)
    optimizer.found_inf = flag.to(device) if isinstance(flag, Tensor) else flag
    optimizer.step()
    if value == 0:
        plain.step()
        assert not changes(snapshot(plain), snapshot(optimizer))
        return
    assert changes(before, snapshot(optimizer)) == ["skipped"]
    assert skipped(optimizer) == 1
    # and the run goes on as if that step had not been asked for
    del optimizer.found_inf
    optimizer.step()
    plain.step()
    assert changes(snapshot(plain), snapshot(optimizer)) == ["skipped"]


def test_a_skipped_first_step_leaves_fresh_state(device, backend):
    optimizer = make(device, backend, amsgrad=True)
    set_grads(optimizer, 0)
    before = [bits(p) for p in params_of(optimizer)]
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert [bits(p) for p in params_of(optimizer)] == before
    for p in params_of(optimizer):
        assert {key: value.abs().sum().item() for key, value in optimizer.state[p].items()} == dict.fromkeys(
            ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"), 0.0
        )
    del optimizer.found_inf
    fresh = make(device, backend, amsgrad=True)
    set_grads(fresh, 0)
    optimizer.step()
    fresh.step()
    assert changes(snapshot(fresh), snapshot(optimizer)) == ["skipped"]


def test_bits_that_arithmetic_would_lose_survive_a_skip(device, backend):
    """A nan with a payload, -0.0 and denormal numbers: a skip selects, it does not multiply by zero."""
    payload = torch.tensor([0x7FC01234, -0x80000000, 1, 0x7F800000], dtype=torch.int32).view(torch.float32)
    p = nn.Parameter(payload.to(device))
    optimizer = fusedlr.FusedAdamW([p], lr=0.1, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert bits(p) == bits(payload)


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
@pytest.mark.parametrize("shape", [(2,), (0,), (1, 3)])
def test_a_signal_of_several_elements_is_refused(name, shape):
    optimizer = make()
    set_grads(optimizer, 0)
    before = snapshot(optimizer)
    setattr(optimizer, name, torch.ones(shape))
    with pytest.raises(ValueError, match=rf"{name} has shape \({shape[0]},.*\), expected one element"):
        optimizer.step()
    assert not changes(before, snapshot(optimizer))


# --- non-finite gradients without a scaler


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "options", [{"max_grad_norm": 1.0}, {"nonfinite": "skip"}], ids=["clip", "asked for"]
)
@pytest.mark.parametrize("index", [0, 2, 5])
def test_a_gradient_that_is_not_finite_skips(device, backend, options, value, index):
    optimizer = make(device, backend, **options)
    assert optimizer.nonfinite == "skip"
    set_grads(optimizer, 0)
    optimizer.step()
    optimizer.scheduler.step()
    set_grads(optimizer, 1)
    spoil(optimizer, value, index)
    before = snapshot(optimizer)
    optimizer.step()
    assert changes(before, snapshot(optimizer)) == ["skipped"]
    assert not math.isfinite(optimizer.metrics()["grad_norm"])


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_propagate_is_torch(device, backend, value, max_grad_norm):
    ours = make(device, backend, max_grad_norm=max_grad_norm, nonfinite="propagate", schedule=None)
    assert ours.nonfinite == "propagate"
    stock = torch.optim.AdamW(make_params(device), lr=0.05)
    for optimizer in (ours, stock):
        set_grads(optimizer, 0)
        spoil(optimizer, value)
    if max_grad_norm is not None:
        torch.nn.utils.clip_grad_norm_(params_of(stock), max_grad_norm)
    ours.step()
    stock.step()
    for p, q in zip(params_of(ours), params_of(stock), strict=True):
        assert torch.equal(p.isnan(), q.isnan())
        assert torch.equal(ours.state[p]["exp_avg"].isfinite(), stock.state[q]["exp_avg"].isfinite())
    assert skipped(ours) == 0
    assert ours.metrics()["step"].tolist() == [1]


def test_without_clipping_nothing_is_skipped_by_default():
    optimizer = make(schedule=None)
    assert optimizer.nonfinite == "propagate"
    set_grads(optimizer, 0)
    spoil(optimizer)
    optimizer.step()
    assert params_of(optimizer)[0].isnan().any()
    assert math.isnan(optimizer.metrics()["grad_norm"])


def test_a_norm_that_overflows_counts_as_not_finite(device, backend):
    optimizer = make(device, backend, max_grad_norm=1.0)
    set_grads(optimizer, 0)
    # finite, but its square is not, in fp32
    spoil(optimizer, 1e30)
    before = snapshot(optimizer)
    optimizer.step()
    assert changes(before, snapshot(optimizer)) == ["state", "skipped"]
    assert optimizer.metrics()["grad_norm"] == math.inf


def test_a_norm_that_overflows_is_clipped_to_nothing_by_propagate(device, backend):
    """As `clip_grad_norm_` does: 1 over an infinite norm is 0."""
    ours = make(device, backend, max_grad_norm=1.0, nonfinite="propagate", schedule=None, weight_decay=0.0)
    set_grads(ours, 0)
    spoil(ours, 1e30)
    before = [bits(p) for p in params_of(ours)]
    ours.step()
    assert ours.metrics()["coef"] == 0
    assert [bits(p) for p in params_of(ours)] == before
    assert skipped(ours) == 0


def test_a_large_fp64_gradient_is_no_overflow():
    p = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = fusedlr.FusedAdamW([p], lr=0.1, max_grad_norm=1.0)
    p.grad = torch.full_like(p, 1e100)
    optimizer.step()
    assert skipped(optimizer) == 0
    assert optimizer.metrics()["grad_norm"].item() == pytest.approx(math.sqrt(3) * 1e100)


def test_an_unscaled_gradient_that_fits_is_no_overflow(device, backend):
    """The norm is that of the unscaled gradients: scaled ones may be far too large to square."""
    optimizer = make(device, backend, max_grad_norm=1.0)
    set_grads(optimizer, 0, scale=2.0**80)
    optimizer.grad_scale = torch.tensor(2.0**80, device=device)
    optimizer.step()
    assert skipped(optimizer) == 0


# --- skips in a row


def overflow(optimizer: fusedlr.FusedAdamW, times: int) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(times):
            set_grads(optimizer, 0)
            spoil(optimizer)
            optimizer.step()
            optimizer.last_metrics()
    return [w for w in caught if not issubclass(w.category, fusedlr.FallbackWarning)]


def test_ten_skips_in_a_row_warn_once():
    optimizer = make(max_grad_norm=1.0)
    assert overflow(optimizer, 9) == []
    (warning,) = overflow(optimizer, 1)
    assert "10 optimizer steps in a row were skipped" in str(warning.message)
    assert "gradient norm inf" in str(warning.message)
    assert warning.filename == __file__
    assert overflow(optimizer, 25) == []
    assert skipped(optimizer) == 35


def test_a_step_that_is_made_ends_the_row():
    optimizer = make(max_grad_norm=1.0)
    for _ in range(3):
        assert overflow(optimizer, 9) == []
        set_grads(optimizer, 0)
        optimizer.step()
    assert skipped(optimizer) == 27


# --- independent groups


def independent(device: str = "cpu", backend: str = "auto", **options) -> fusedlr.FusedAdamW:
    params = make_params(device, dtypes=(torch.float32,))
    groups = [{"params": params[:2]}, {"params": params[2:], "max_grad_norm": 0.5}]
    return fusedlr.FusedAdamW(
        groups,
        lr=0.05,
        schedule=SCHEDULE,
        groups="independent",
        max_grad_norm=1.0,
        backend=backend,
        **options,
    )


def test_independent_groups_skip_alone(device, backend):
    spoiled, whole = independent(device, backend), independent(device, backend)
    for optimizer in (spoiled, whole):
        set_grads(optimizer, 0)
        optimizer.step()
        set_grads(optimizer, 1)
    spoil(spoiled)
    before = snapshot(spoiled, lr=False)
    spoiled.step()
    whole.step()
    after, other = snapshot(spoiled, lr=False), snapshot(whole, lr=False)
    assert after["params"][:2] == before["params"][:2]
    assert after["state"][:2] == before["state"][:2]
    assert after["params"][2:] == other["params"][2:] != before["params"][2:]
    assert after["state"][2:] == other["state"][2:]
    assert spoiled.metrics()["skipped"].tolist() == [1, 0]
    assert spoiled.metrics()["step"].tolist() == [1, 2]
    assert spoiled.last_metrics()["skipped"] == [1, 0]


def test_a_scalers_flag_skips_all_independent_groups_that_had_gradients(device, backend):
    optimizer = independent(device, backend)
    set_grads(optimizer, 0)
    for p in optimizer.param_groups[1]["params"]:
        p.grad = None
    before = snapshot(optimizer, lr=False)
    optimizer.found_inf = torch.tensor(1.0, device=device)
    optimizer.step()
    assert snapshot(optimizer, lr=False)["params"] == before["params"]
    assert optimizer.metrics()["skipped"].tolist() == [1, 0]
    assert optimizer.metrics()["step"].tolist() == [0, 0]


def test_joint_groups_skip_together(device, backend):
    params = make_params(device)
    groups = [{"params": params[:2]}, {"params": params[2:], "lr": 0.01}, {"params": []}]
    optimizer = fusedlr.FusedAdamW(groups, lr=0.05, schedule=SCHEDULE, max_grad_norm=1.0, backend=backend)
    set_grads(optimizer, 0)
    spoil(optimizer, index=6)
    before = snapshot(optimizer)
    optimizer.step()
    assert changes(before, snapshot(optimizer)) == ["state", "skipped"]
    assert optimizer.metrics()["step"].tolist() == [0, 0, 0]
    assert skipped(optimizer) == 1


# --- the protocol can be left


def test_amp_scaling_is_announced_unless_switched_off():
    assert make()._step_supports_amp_scaling
    assert not hasattr(make(amp_scaling=False), "_step_supports_amp_scaling")


def test_without_amp_scaling_the_scaler_skips_by_itself():
    optimizer, scaler = make(amp_scaling=False), scaler_for("cpu")
    for k in range(5):
        set_grads(optimizer, k, scale=scaler.get_scale())
        if k in (1, 2):
            spoil(optimizer)
        scaler.step(optimizer)
        scaler.update()
        # called whatever happened, as accelerate does where it cannot tell
        optimizer.scheduler.step()
    assert optimizer.metrics()["step"].tolist() == [3]
    assert optimizer.scheduler.get_last_lr() == [SCHEDULE.lr_at(3, 0.05)]
    # the optimizer was not asked, so it has nothing to count
    assert skipped(optimizer) == 0


@pytest.mark.parametrize("amp_scaling", [True, False])
def test_copies_answer_a_scaler_as_the_original(amp_scaling):
    optimizer = make(amp_scaling=amp_scaling)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert getattr(twin, "_step_supports_amp_scaling", False) == amp_scaling


def test_skips_are_counted_on_through_a_copy():
    optimizer = make(max_grad_norm=1.0)
    set_grads(optimizer, 0)
    spoil(optimizer)
    optimizer.step()
    assert skipped(copy.deepcopy(optimizer)) == 1
    assert skipped(pickle.loads(pickle.dumps(optimizer))) == 1
