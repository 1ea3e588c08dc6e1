"""16-bit parameters that are trained exactly: the state has the rest of their fp32 values."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from harness import backends_on
from kit import set_grads, spoil, through_a_file
from torch import Tensor, nn

import fusedlr
from fusedlr.reference import fp32_value, split_value

SHAPES = ((1025,), (33, 7), (), (0,))
COSINE = fusedlr.cosine(warmup_steps=5, total_steps=1000)
REST = {torch.bfloat16: "param_remainder", torch.float16: "master_param"}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"max_grad_norm": 1.0},
    "all at once": {"max_grad_norm": 0.5, "amsgrad": True, "maximize": True, "weight_decay": 0.1},
}


def away_from_zero(x: Tensor) -> Tensor:
    """An fp32 tensor rounded to bf16, ties away from zero, written without a look at bits."""
    down = x.double().abs()
    exponent = torch.frexp(down).exponent.clamp(min=-125)
    unit = torch.ldexp(torch.ones_like(down), exponent - 8)
    rounded = torch.floor(down / unit + 0.5) * unit
    return (torch.copysign(rounded, x.double())).to(torch.bfloat16)


def pair(dtype: torch.dtype, backend: str, **options: Any) -> tuple[Any, Any]:
    """An optimizer of 16-bit parameters with master weights, and one of the same numbers in fp32."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]
    settings = {"lr": 1e-3, "schedule": COSINE, "backend": backend, **options}
    small = fusedlr.FusedAdamW([nn.Parameter(x.clone()) for x in values], master_weights=True, **settings)
    return small, fusedlr.FusedAdamW([nn.Parameter(x.float()) for x in values], **settings)


def params(optimizer: Any) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def step_both(small: Any, whole: Any, k: int, *, spoiled: bool = False) -> None:
    generator = torch.Generator().manual_seed(k)
    for p, q in zip(params(small), params(whole), strict=True):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        if spoiled and p.numel() > 1000:
            p.grad.view(-1)[7] = math.inf
        q.grad = p.grad.float()
    small.step()
    whole.step()


def assert_exact(small: Any, whole: Any) -> None:
    for value, p, q in zip(small.master_parameters(), params(small), params(whole), strict=True):
        assert torch.equal(value, q)
        expected = away_from_zero(q.detach()) if p.dtype == torch.bfloat16 else q.detach().half()
        assert torch.equal(p, expected)
        for name in ("exp_avg", "exp_avg_sq", "step"):
            assert torch.equal(small.state[p][name], whole.state[q][name])


@pytest.mark.parametrize(
    ("backend", "dtype", "options"),
    [
        *(("cpu", dtype, options) for dtype in REST for options in OPTIONS),
        *(("reference", dtype, "all at once") for dtype in REST),
    ],
    ids=str,
)
def test_a_thousand_steps_are_those_of_fp32_through_a_file(backend, dtype, options):
    if backend not in backends_on("cpu"):
        pytest.skip(f"no {backend} here")
    small, whole = pair(dtype, backend, **OPTIONS[options])
    clips = "max_grad_norm" in OPTIONS[options]
    for k in range(1000):
        step_both(small, whole, k, spoiled=clips and k % 100 == 7)
        if k == 500:
            file = through_a_file(small.state_dict())
            again, _ = pair(dtype, backend, **OPTIONS[options])
            for p, q in zip(params(again), params(small), strict=True):
                p.data.copy_(q)
            again.load_state_dict(file)
            small = again
        if k % 50 == 0 or k == 999:
            assert_exact(small, whole)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", REST, ids=str)
def test_ten_steps_of_the_kernels_are_those_of_fp32(gpu_backend, dtype, options):
    small, whole = pair(dtype, gpu_backend, **OPTIONS[options])
    for k in range(10):
        step_both(small, whole, k, spoiled=k == 6 and "max_grad_norm" in OPTIONS[options])
    assert small.backend == gpu_backend
    assert_exact(small, whole)


@pytest.mark.parametrize("offset", [1, 4])
def test_sums_do_not_depend_on_types_and_addresses(gpu_backend, offset):
    def norm(dtype: torch.dtype, shift: int) -> float:
        optimizer = fusedlr.FusedAdamW(
            [nn.Parameter(torch.zeros(n, dtype=dtype)) for n in (1, 6, 1030, 4096, 5003)],
            max_grad_norm=1.0,
            backend=gpu_backend,
        )
        generator = torch.Generator().manual_seed(0)
        for p in params(optimizer):
            memory = torch.empty(p.numel() + shift, dtype=dtype)
            p.grad = memory[shift:].copy_(torch.randn(p.shape, generator=generator).bfloat16())
        optimizer.step()
        return optimizer.last_metrics()["grad_norm"]

    found = {norm(dtype, at) for dtype in (torch.float32, torch.bfloat16) for at in (0, offset)}
    assert len(found) == 1


def test_every_bfloat16_and_remainder_is_one_number():
    """65,536 remainders are as many numbers as round to a bf16 number when ties go away from zero."""
    high = torch.tensor([0x3F80, 0x3F81, 0xBF80, 0x0001, 0x7F7F, 0x8001], dtype=torch.int32)
    for bits in high:
        p = (bits - (bits >> 15 << 16)).to(torch.int16).view(torch.bfloat16).expand(65536).contiguous()
        rest = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)
        x = fp32_value(p, {"param_remainder": rest})
        assert x.unique().numel() == 65536 and torch.equal(away_from_zero(x), p)
        back, state = split_value(x, torch.bfloat16, {"param_remainder": rest})
        assert torch.equal(back, p) and torch.equal(state["param_remainder"], rest)


def test_ties_to_even_would_need_one_more_remainder():
    """To an even bf16 number round 65,537 fp32 numbers if ties go to even: 16 bits cannot tell them apart."""
    around = torch.arange(0x3F800000 - 0x8000 - 8, 0x3F800000 + 0x8000 + 9, dtype=torch.int32)
    x = around.view(torch.float32)
    assert int((x.bfloat16() == 1).sum()) == 65537
    assert int((away_from_zero(x) == 1).sum()) == 65536


def test_what_is_not_finite_keeps_its_kind():
    x = torch.tensor([math.nan, math.inf, -math.inf, 3.4028e38, 0.0, -0.0])
    p, state = split_value(x, torch.bfloat16, {"param_remainder": torch.zeros(6, dtype=torch.int16)})
    assert p.view(torch.int16)[0] == 0x7FC0 and state["param_remainder"][0] == 0
    back = fp32_value(p, state)
    assert torch.equal(back.nan_to_num(1), x.nan_to_num(1)) and back[0].isnan()
    assert torch.equal(back.signbit()[1:], x.signbit()[1:])


def test_a_parameter_that_is_assigned_stands(device, backend):
    for dtype, rest in REST.items():
        p = nn.Parameter(torch.ones(4, dtype=dtype, device=device))
        optimizer = fusedlr.FusedAdamW([p], lr=1e-5, weight_decay=0, master_weights=True, backend=backend)
        for _ in range(3):
            p.grad = torch.ones_like(p)
            optimizer.step()
        assert (p == 1).all() and (next(optimizer.master_parameters()) < 1).all()
        with torch.no_grad():
            p.copy_(torch.tensor([0.0, -0.0, 3.0, -2.0]))
        assigned = p.detach().clone()
        optimizer.step()
        value = next(optimizer.master_parameters())
        unit = torch.maximum(assigned.float().abs() * 2.0**-8, torch.tensor(1e-37))
        assert ((value - assigned.float()).abs() <= unit / 2 + 2e-5).all(), (dtype, value)
        assert value.isfinite().all() and rest in optimizer.state[p]


def test_updates_that_bf16_loses_are_kept(device, backend):
    found = {}
    for master in (False, True):
        p = nn.Parameter(torch.ones(5, dtype=torch.bfloat16, device=device))
        optimizer = fusedlr.FusedAdamW([p], lr=1e-4, weight_decay=0, master_weights=master, backend=backend)
        for _ in range(100):
            p.grad = torch.ones_like(p)
            optimizer.step()
        found[master] = p[0].item()
    assert found[False] == 1 and abs(found[True] - 0.99) < 2.0**-8


@pytest.mark.parametrize(("amsgrad", "expected"), [(False, 10), (True, 14)])
def test_bytes_of_state_per_parameter(amsgrad, expected):
    p = nn.Parameter(torch.ones(1000, dtype=torch.bfloat16))
    optimizer = fusedlr.FusedAdamW([p], master_weights=True, amsgrad=amsgrad)
    set_grads(optimizer, 0)
    optimizer.step()
    tensors = [x for name, x in optimizer.state[p].items() if name != "step"]
    assert sum(x.numel() * x.element_size() for x in tensors) == expected * p.numel()
    assert optimizer.state[p]["param_remainder"].dtype == torch.int16


def test_fp32_parameters_have_nothing_more():
    p = nn.Parameter(torch.ones(3))
    optimizer = fusedlr.FusedAdamW([p], master_weights=True)
    set_grads(optimizer, 0)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
    assert next(optimizer.master_parameters()).data_ptr() != p.data_ptr()


def test_a_skipped_step_leaves_the_rest(device, backend):
    for dtype, rest in REST.items():
        p = nn.Parameter(torch.ones(9, dtype=dtype, device=device))
        optimizer = fusedlr.FusedAdamW([p], lr=1e-4, max_grad_norm=1.0, master_weights=True, backend=backend)
        set_grads(optimizer, 0)
        optimizer.step()
        kept = optimizer.state[p][rest].clone()
        spoil(optimizer)
        optimizer.step()
        assert torch.equal(optimizer.state[p][rest], kept) and kept.any()


def test_a_first_step_that_is_skipped_leaves_the_fp32_value_of_the_parameter():
    p = nn.Parameter(torch.full((9,), 0.5, dtype=torch.float16))
    optimizer = fusedlr.FusedAdamW([p], lr=1e-4, max_grad_norm=1.0, master_weights=True)
    set_grads(optimizer, 0)
    spoil(optimizer)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["master_param"], p.float())


# files


def stepped(dtype: torch.dtype, *, master: bool = True) -> tuple[Any, Tensor]:
    p = nn.Parameter(torch.ones(6, dtype=dtype))
    optimizer = fusedlr.FusedAdamW([p], lr=1e-4, master_weights=master)
    set_grads(optimizer, 0)
    optimizer.step()
    return optimizer, p


@pytest.mark.parametrize("dtype", REST, ids=str)
def test_a_file_without_the_rest_clears_it(dtype):
    optimizer, p = stepped(dtype)
    plain, _ = stepped(dtype, master=False)
    optimizer.load_state_dict(plain.state_dict())
    assert torch.equal(next(optimizer.master_parameters()), p.float())
    set_grads(optimizer, 1)
    optimizer.step()
    assert REST[dtype] in optimizer.state[p]


@pytest.mark.parametrize("dtype", REST, ids=str)
def test_a_rest_that_was_cast_is_dropped(dtype):
    optimizer, p = stepped(dtype)
    file = optimizer.state_dict()
    stock = torch.optim.AdamW([nn.Parameter(p.detach().clone())])
    stock.load_state_dict(file)
    # which stock AdamW has cast to the parameter's dtype
    optimizer.load_state_dict(copy.deepcopy(stock.state_dict()))
    assert torch.equal(next(optimizer.master_parameters()), p.float())


@pytest.mark.parametrize("dtype", REST, ids=str)
def test_an_optimizer_without_master_weights_does_not_keep_it(dtype):
    optimizer, _ = stepped(dtype)
    plain, p = stepped(dtype, master=False)
    plain.load_state_dict(optimizer.state_dict())
    assert REST[dtype] not in plain.state[p] and REST[dtype] not in plain.state_dict()["state"][0]


@pytest.mark.parametrize("dtype", REST, ids=str)
def test_copies_and_scopes_carry_it(dtype):
    p = nn.Parameter(torch.ones(6, dtype=dtype))
    optimizer = fusedlr.FusedAdamW([{"params": [p], "scope": "a"}], lr=1e-4, master_weights=True)
    set_grads(optimizer, 0)
    optimizer.step()
    value = next(optimizer.master_parameters())
    assert torch.equal(next(copy.deepcopy(optimizer).master_parameters()), value)
    file = optimizer.scope_state_dict("a")
    optimizer.reset_scope("a")
    assert torch.equal(next(optimizer.master_parameters()), p.float())
    optimizer.load_scope_state_dict("a", file)
    assert torch.equal(next(optimizer.master_parameters()), value)


def test_fp32_parameters_take_nothing_more_from_a_file():
    small, whole = (
        fusedlr.FusedAdamW([nn.Parameter(torch.ones(3, dtype=dtype))], lr=0.1, master_weights=True)
        for dtype in (torch.float16, torch.float32)
    )
    set_grads(small), set_grads(whole)
    small.step()
    whole.load_state_dict(small.state_dict())
    assert whole.state[params(whole)[0]].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_a_flag_that_is_none_is_refused():
    with pytest.raises(ValueError, match="master_weights='yes'"):
        fusedlr.FusedAdamW([nn.Parameter(torch.ones(1))], master_weights="yes")
