"""The Trainer keeps the fp32 values of trained bf16 parameters, says so once, and can be told not to."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from small_runs import Linear, arguments, make, weights  # noqa: E402

pytestmark = pytest.mark.usefixtures("quick")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def nothing_was_said():
    hf._say_master_weights.cache_clear()
    yield
    hf._say_master_weights.cache_clear()


class Cast(Linear):
    """Computes in the dtype of its weight."""

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x.to(self.linear.weight.dtype), labels.to(self.linear.weight.dtype))


def model(dtype: torch.dtype = BF16) -> Any:
    torch.manual_seed(0)
    return Cast().to(dtype)


def trained(folder: Path, net: Any, cls: Any = None, **options: Any) -> tuple[Any, list[str]]:
    """A Trainer after its run, and what was said of master weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make(cls or hf.FusedLRTrainer, folder, trainer={"model": net}, **options)
        trainer.train()
    return trainer, [str(w.message) for w in caught if "master_weights" in str(w.message)]


def kept(trainer: Any) -> set[str]:
    return {name for entry in hf.unwrap(trainer.optimizer).state.values() for name in entry}


def test_updates_that_bf16_loses_are_kept_and_said_once(tmp_path):
    lost, _ = trained(tmp_path, model(), optim_args="master_weights=false", learning_rate=1e-5)
    assert torch.equal(weights(lost), torch.cat([p.flatten() for p in model().parameters()]))
    trainer, said = trained(tmp_path, model(), learning_rate=1e-5)
    assert len(said) == 1 and "param_remainder" in kept(trainer)
    masters = torch.cat([x.flatten() for x in hf.unwrap(trainer.optimizer).master_parameters()])
    assert not torch.equal(masters, weights(trainer).float())
    again, said = trained(tmp_path, model())
    assert not said and "param_remainder" in kept(again)


def test_it_can_be_turned_off(tmp_path):
    trainer, said = trained(tmp_path, model(), optim_args="other=1, master_weights=False")
    assert not said and "param_remainder" not in kept(trainer)


def test_it_can_be_turned_on_for_fp16(tmp_path):
    net = model(torch.float16)
    assert "master_weights" not in _options(tmp_path, net)
    assert _options(tmp_path, net, optim_args="master_weights=true")["master_weights"]


def _options(folder: Path, net: Any, **options: Any) -> Any:
    return hf.FusedLRTrainer.get_optimizer_cls_and_kwargs(arguments(folder, **options), net)[1]


def test_fp32_and_frozen_16_bit_parameters_change_nothing(tmp_path):
    trainer, said = trained(tmp_path, model(torch.float32))
    assert not said and "param_remainder" not in kept(trainer)
    net = model(torch.float32)
    net.base = torch.nn.Linear(2, 2, dtype=BF16).requires_grad_(False)
    assert "master_weights" not in _options(tmp_path, net)
    assert "master_weights" not in _options(tmp_path, None)


def test_patched_trainers_have_it_too(tmp_path):
    with hf.patch_transformers():
        trainer, said = trained(tmp_path, model(), cls=transformers.Trainer)
    assert len(said) == 1 and "param_remainder" in kept(trainer)


def test_what_is_neither_true_nor_false_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim_args='master_weights=perhaps': master_weights is neither"):
        _options(tmp_path, model(), optim_args="master_weights=perhaps")


def test_a_resumed_run_is_the_run_in_one_go(tmp_path):
    whole, _ = trained(tmp_path / "whole", model(), save_strategy="steps", save_steps=3)
    resumed = make(hf.FusedLRTrainer, tmp_path / "resumed", trainer={"model": model()})
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    mine, expected = (hf.unwrap(t.optimizer).master_parameters() for t in (resumed, whole))
    assert all(torch.equal(x, y) for x, y in zip(mine, expected, strict=True))
