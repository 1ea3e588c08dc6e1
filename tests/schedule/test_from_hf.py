"""`from_hf`: every name of transformers and its arguments, and warm-up as its Trainer counts it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fusedlr

LR = 0.05


def test_from_hf_takes_every_name_and_the_enum() -> None:
    transformers = pytest.importorskip("transformers")
    needs = {"cosine_with_min_lr": {"min_lr": 0.0}, "cosine_warmup_with_min_lr": {"min_lr": 0.0}}
    needs["warmup_stable_decay"] = {"num_decay_steps": 10}
    for name in transformers.SchedulerType:
        if name.value in ("reduce_lr_on_plateau", "greedy"):
            with pytest.raises(ValueError, match=rf"name='{name.value}' follows a metric, not the step"):
                fusedlr.from_hf(name, 10, 100)
            continue
        arguments = needs.get(name.value, {})
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], lr=LR)
        schedule = fusedlr.from_hf(name, 10, 100, **arguments)
        assert schedule == fusedlr.from_hf(name.value, 10, 100, scheduler_specific_kwargs=arguments)
        scheduler = transformers.get_scheduler(name, optimizer, 10, 100, scheduler_specific_kwargs=arguments)
        want = fusedlr.from_torch(scheduler, 100)
        assert [schedule.lr_at(k, LR) for k in range(100)] == pytest.approx(
            [want.lr_at(k, LR) for k in range(100)], rel=0, abs=1e-12 * LR
        )


def test_from_hf_with_a_peak_resolves() -> None:
    schedule = fusedlr.from_hf("polynomial", 5, 50, lr=1e-3, lr_end=1e-5)
    assert schedule == fusedlr.polynomial(5, 50, lr_end=1e-5).resolve(1e-3)
    assert repr(schedule) == "polynomial(warmup_steps=5, total_steps=50, lr_end=1e-05).resolve(0.001)"


def test_from_hf_ignores_what_transformers_ignores() -> None:
    assert fusedlr.from_hf("constant", lr_end=3, foo=1) == fusedlr.constant()
    assert fusedlr.from_hf("constant_with_warmup", 5, foo=1) == fusedlr.constant_with_warmup(5)


HF_REFUSED = [
    (("cosin", 1, 10), {}, "name='cosin' is not a schedule of transformers: did you mean 'cosine'"),
    (("Linear", 1, 10), {}, "name='Linear' is not a schedule of transformers: did you mean 'linear'"),
    (("wsd", 1, 10), {}, "name='wsd' is not a schedule of transformers"),
    ((None, 1, 10), {}, "name=None is not a schedule of transformers"),
    (("cosine", None, 10), {}, "name='cosine' needs num_warmup_steps"),
    (("cosine", 1), {}, "cosine needs total_steps"),
    (("cosine", 1, 10), {"power": 2}, "power=2 is not an argument of name='cosine', which takes num_cycles"),
    (("linear", 1, 10), {"min_lr": 0}, "min_lr=0 is not an argument of name='linear', which takes none"),
    (("cosine_with_min_lr", 1, 10), {}, "needs one of min_lr_ratio (min_lr_rate in transformers) and min_lr"),
    (
        ("cosine_with_min_lr", 1, 10),
        {"min_lr": 1e-5, "min_lr_rate": 0.1},
        "min_lr_ratio=0.1 and min_lr=1e-05 exclude each other",
    ),
    (("cosine_with_min_lr", 1, 10), {"min_lr": 1e-5, "lr": 1e-6}, "min_lr=1e-05 is above the peak lr=1e-06"),
    (("polynomial", 1, 10), {"lr": 1e-8}, "lr_end=1e-07 is above the peak lr=1e-08"),
    (("warmup_stable_decay", 1, 10), {}, "warmup_stable_decay needs decay_steps"),
    (("warmup_stable_decay", 9, 10), {"num_decay_steps": 5}, "the stable phase would be negative"),
    (("linear", -1, 10), {}, "warmup_steps=-1 must be at least 0"),
    (("cosine_with_restarts", 1, 10), {"num_cycles": 0.5}, "num_cycles=0.5 is not an integer"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), HF_REFUSED, ids=[row[2] for row in HF_REFUSED])
def test_from_hf_refuses(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        fusedlr.from_hf(*args, **kwargs)
    assert message in str(error.value)


@pytest.mark.parametrize("steps", [0, 1, 7, 0.03, 0.1, 0.999])
@pytest.mark.parametrize("total", [1, 10, 999, 12345])
def test_warmup_is_counted_as_the_trainer_does(steps: float, total: int, tmp_path: Any) -> None:
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(str(tmp_path), warmup_steps=steps, use_cpu=True)
    warmup = args.get_warmup_steps(total)
    assert fusedlr.constant_with_warmup(steps, total) == fusedlr.constant_with_warmup(warmup, total)
