"""The modules that axolotl and torchtune are given by name, called as these tools call them.

The calls are those of axolotl's `PluginManager` (integrations/base.py) and of torchtune's recipes
(`_setup_lr_scheduler` in recipes/lora_finetune_single_device.py), neither of which is needed here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import fusedlr
from fusedlr.integrations import torchtune

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from small_runs import LR, kinds, logged, train, weights  # noqa: E402

PLUGIN = "fusedlr.integrations.axolotl.FusedLRPlugin"


class BasePlugin:
    """The hooks of axolotl's that a training passes, as a plugin inherits them."""

    def register(self, cfg: Any) -> None:
        pass

    def create_lr_scheduler(self, cfg: Any, trainer: Any, optimizer: Any, num_training_steps: int) -> Any:
        pass

    def get_trainer_cls(self, cfg: Any) -> Any:
        pass


@pytest.fixture
def plugin(monkeypatch) -> Iterator[Any]:
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin  # type: ignore[attr-defined]
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "axolotl.integrations.base", base)
    # as axolotl's load_plugin
    module, name = PLUGIN.rsplit(".", 1)
    monkeypatch.delitem(sys.modules, module, raising=False)
    yield getattr(importlib.import_module(module), name)()
    hf.patch_transformers().undo()
    sys.modules.pop(module, None)


class AxolotlTrainer(transformers.Trainer):
    """Asks the plugins first, then itself, then transformers: as axolotl's SchedulerMixin does."""

    plugin: Any = None
    cosine_min_lr_ratio: float | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        optimizer = self.optimizer if optimizer is None else optimizer
        if self.lr_scheduler is None:
            made = self.plugin and self.plugin.create_lr_scheduler(
                {}, trainer=self, optimizer=optimizer, num_training_steps=num_training_steps
            )
            if made is not None:
                self.lr_scheduler = made
            elif self.cosine_min_lr_ratio is not None:
                floor = self.cosine_min_lr_ratio
                self.lr_scheduler = LambdaLR(optimizer, lambda k: floor + (1 - floor) / (1 + k))
            else:
                super().create_scheduler(num_training_steps, optimizer=optimizer)
        return self.lr_scheduler


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("floor", [None, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", None])
def test_axolotl_trains_with_it_as_without(tmp_path, monkeypatch, plugin, optimizer, floor):
    monkeypatch.setattr(AxolotlTrainer, "cosine_min_lr_ratio", floor)
    options = {"optim": optimizer or "adamw_torch_fused"}
    stock = train(AxolotlTrainer, tmp_path, **options)
    assert kinds(stock) == ("AdamW", "LambdaLR")
    monkeypatch.setattr(AxolotlTrainer, "plugin", plugin)
    plugin.register({"optimizer": optimizer} if optimizer else {})
    assert plugin.get_trainer_cls({}) is None
    ours = train(AxolotlTrainer, tmp_path, **options)
    assert kinds(ours) == ("FusedAdamW", "ScheduleView" if floor is None else "LambdaLR")
    assert logged(ours, "learning_rate") == pytest.approx(logged(stock, "learning_rate"), abs=1e-12)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=1e-5, atol=1e-6)


def test_axolotl_with_another_optimizer_is_told(plugin):
    with pytest.warns(UserWarning, match="optimizer: adamw_bnb_8bit is not torch's AdamW, which fusedlr"):
        plugin.register({"optimizer": "adamw_bnb_8bit"})


def recipe(optimizer: Any, scheduler: Any, steps: range, total: int, **config: Any) -> list[float]:
    """A recipe of torchtune's: the rates that the updates got."""
    made = scheduler(optimizer, num_training_steps=total, last_epoch=steps.start - 1, **config)
    rates = []
    for _ in steps:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        made.step()
    return rates


def cosine(optimizer: Any, num_training_steps: int, last_epoch: int = -1, num_warmup_steps: int = 0) -> Any:
    make = transformers.get_cosine_schedule_with_warmup
    return make(optimizer, num_warmup_steps, num_training_steps, last_epoch=last_epoch)


def parameter() -> Any:
    return torch.nn.Parameter(torch.ones(3))


@pytest.mark.parametrize("state", [True, False])
def test_torchtune_gets_the_rates_that_its_own_scheduler_gives_and_resumes(state):
    config = {"num_warmup_steps": 3}
    stock = torch.optim.AdamW([parameter()], lr=LR)
    expected = recipe(stock, cosine, range(12), 12, **config)
    first = fusedlr.FusedAdamW([parameter()], lr=LR)
    rates = recipe(first, torchtune.lr_scheduler, range(5), 12, **config)
    second = fusedlr.FusedAdamW([parameter()], lr=LR)
    if state:
        second.load_state_dict(first.state_dict())
    rates += recipe(second, torchtune.lr_scheduler, range(5, 12), 12, **config)
    assert rates == pytest.approx(expected, abs=1e-15)


def test_torchtune_names_any_schedule_of_transformers():
    optimizer = fusedlr.FusedAdamW([parameter()], lr=LR)
    view = torchtune.lr_scheduler(
        optimizer, num_training_steps=10, name="cosine_with_min_lr", num_warmup_steps=2, min_lr_rate=0.1
    )
    assert view is optimizer.scheduler
    assert optimizer.param_groups[0]["schedule"] == fusedlr.cosine(2, 10, min_lr_ratio=0.1)


def test_after_skips_torchtune_goes_on_at_the_updates_made():
    first = fusedlr.FusedAdamW([parameter()], lr=LR, max_grad_norm=1.0)
    view = torchtune.lr_scheduler(first, num_training_steps=10)
    for value in (1.0, torch.inf, 1.0):
        first.param_groups[0]["params"][0].grad = torch.full((3,), value)
        first.step()
        view.step()
    second = fusedlr.FusedAdamW([parameter()], lr=LR, max_grad_norm=1.0)
    second.load_state_dict(first.state_dict())
    # the recipe has counted three
    assert torchtune.lr_scheduler(second, num_training_steps=10, last_epoch=2).last_epoch == 2


def test_torchtune_with_another_optimizer_is_refused():
    with pytest.raises(
        TypeError, match=r"optimizer is a AdamW, .* name fusedlr\.FusedAdamW as the optimizer"
    ):
        torchtune.lr_scheduler(torch.optim.AdamW([parameter()]), num_training_steps=10)
