"""What a Trainer class says of its optimizer, scheduler and norm is obeyed, or the user is told.

The classes are made in the ways of LLaMA-Factory, Unsloth, axolotl and TRL.
"""

from __future__ import annotations

import abc
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from small_runs import LR, STEPS, Linear, kinds, logged, make, train, weights  # noqa: E402

import fusedlr  # noqa: E402

Trainer = transformers.Trainer
pytestmark = pytest.mark.usefixtures("quick")
FUSED = ("FusedAdamW", "ScheduleView")


def mixed(cls: Any) -> Any:
    return type(f"Fused{cls.__name__}", (hf.FusedLRTrainerMixin, cls), {})


class HalfRate(Trainer):
    """A scheduler of its own, and the arguments' for nothing: axolotl's way."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            driver = optimizer if optimizer is not None else self.optimizer
            self.lr_scheduler = LambdaLR(driver, lambda k: 0.5)
        return self.lr_scheduler


class PassesOn(Trainer):
    """Both methods do something first and leave the rest to the Trainer: LLaMA-Factory's way."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        self.asked = True
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        self.args.lr_scheduler_type = transformers.SchedulerType.LINEAR
        return super().create_scheduler(num_training_steps, optimizer)


class GroupsOfItsOwn(Trainer):
    """Rates per group, with what the instance says of class and arguments: axolotl's way."""

    def create_optimizer(self, model: Any = None) -> Any:
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        first, *others = self.model.parameters()
        self.optimizer = cls([{"params": [first], "lr": 2 * kwargs["lr"]}, {"params": others}], **kwargs)
        return self.optimizer


class AsksTheClass(Trainer):
    """The same, with what the class says: Unsloth's way."""

    def create_optimizer(self, model: Any = None) -> Any:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
        self.optimizer = cls(self.model.parameters(), **kwargs)
        return self.optimizer


class StaticArguments(Trainer):
    @staticmethod
    def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
        cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "eps": 1e-3}


class InstanceArguments(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        assert isinstance(self, InstanceArguments)
        cls, kwargs = super().get_optimizer_cls_and_kwargs(args, model)
        return cls, {**kwargs, "eps": 1e-3}


class SignAdamW(torch.optim.AdamW):
    """A step of its own, which nothing may replace."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad.sign(), alpha=float(group["lr"]))


class OtherStep(Trainer):
    def get_optimizer_cls_and_kwargs(self, args: Any, model: Any = None) -> Any:
        return SignAdamW, {"lr": args.learning_rate}


class Abstract(Trainer, abc.ABC):
    pass


def compare(ours: Any, stock: Any) -> None:
    assert logged(ours, "learning_rate") == pytest.approx(logged(stock, "learning_rate"), abs=1e-12)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["mixin", "patch"])
@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (HalfRate, ("FusedAdamW", "LambdaLR")),
        (PassesOn, FUSED),
        (GroupsOfItsOwn, FUSED),
        (InstanceArguments, FUSED),
        (Abstract, FUSED),
    ],
)
def test_a_class_is_obeyed_as_under_stock(tmp_path, cls, expected, way):
    stock = train(cls, tmp_path)
    with hf.patch_transformers() if way == "patch" else nullcontext():
        ours = train(mixed(cls) if way == "mixin" else cls, tmp_path)
    assert kinds(ours) == expected
    compare(ours, stock)


@pytest.mark.parametrize(
    ("cls", "optimizer"), [(AsksTheClass, "AdamW"), (StaticArguments, "AdamW"), (OtherStep, "SignAdamW")]
)
def test_an_optimizer_that_is_not_fused_is_told_once_per_run_and_used(tmp_path, cls, optimizer):
    stock = train(cls, tmp_path)
    maker = "AsksTheClass.create_optimizer" if cls is AsksTheClass else "Trainer.create_optimizer"
    trainer = make(mixed(cls), tmp_path)
    for _ in range(2):
        with pytest.warns(UserWarning, match="this Trainer's optimizer is") as caught:
            trainer.train()
        said = [str(w.message) for w in caught if "FusedAdamW" in str(w.message)]
        assert len(said) == 1
        assert f"optimizer is {optimizer}, made by {maker}, and not FusedAdamW" in said[0]
    stock.train()
    assert kinds(trainer) == (optimizer, "LambdaLR")
    compare(trainer, stock)


@pytest.mark.parametrize("cls", [AsksTheClass, StaticArguments])
def test_patched_transformers_reaches_those_that_ask_the_class(tmp_path, cls):
    stock = train(cls, tmp_path)
    with hf.patch_transformers():
        ours = train(cls, tmp_path)
    assert kinds(ours) == FUSED
    compare(ours, stock)


def test_patched_transformers_leaves_a_step_of_ones_own_alone(tmp_path):
    with hf.patch_transformers():
        assert kinds(train(OtherStep, tmp_path)) == ("SignAdamW", "LambdaLR")


def test_a_subclass_of_ours_stays_what_it_is(tmp_path):
    class Mine(fusedlr.FusedAdamW):
        pass

    class Trains(Trainer):
        @staticmethod
        def get_optimizer_cls_and_kwargs(args: Any, model: Any = None) -> Any:
            return Mine, {"lr": args.learning_rate}

    assert kinds(train(mixed(Trains), tmp_path)) == ("Mine", "ScheduleView")


def test_another_signature_is_none_of_our_business(tmp_path):
    """As of LLaMA-Factory's PPO, which makes both in its own loop."""

    class Own(Trainer):
        def create_optimizer(self, model: Any, args: Any, extra: Any) -> Any:  # type: ignore[override]
            return "optimizer", extra

        def create_scheduler(self, args: Any, steps: int, optimizer: Any) -> Any:  # type: ignore[override]
            return "scheduler", steps

    trainer = make(mixed(Own), tmp_path)
    assert trainer.create_optimizer(None, None, 3) == ("optimizer", 3)
    assert trainer.create_scheduler(None, 4, None) == ("scheduler", 4)


def test_wherever_the_mixin_is_written_the_class_comes_first():
    class Between(Trainer):
        pass

    class First(hf.FusedLRTrainerMixin, Between):
        pass

    class Last(Between, hf.FusedLRTrainerMixin):
        pass

    class Both(First, PassesOn):
        pass

    class Alone(hf.FusedLRTrainerMixin):
        pass

    class Late(Alone, Trainer):
        pass

    for cls in (First, Last, Both, Late, hf.FusedLRTrainer):
        mro = cls.__mro__
        assert mro[mro.index(Trainer) - 1] is hf._FusedTrainer, cls
    assert Both.__mro__.index(PassesOn) < Both.__mro__.index(hf._FusedTrainer)


def test_an_optimizer_that_was_passed_in_is_told_as_such(tmp_path):
    model = Linear()
    settings = {"model": model, "optimizers": (torch.optim.AdamW(model.parameters(), lr=LR), None)}
    with pytest.warns(UserWarning, match="optimizer is AdamW, passed to it, and not FusedAdamW"):
        train(hf.FusedLRTrainer, tmp_path, trainer=settings)


def test_another_scheduler_over_a_schedule_of_its_own_is_told(tmp_path):
    model = Linear()
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=LR, schedule=fusedlr.linear(total_steps=STEPS))
    settings = {"model": model, "optimizers": (optimizer, LambdaLR(optimizer, lambda k: 0.5))}
    with pytest.warns(UserWarning) as caught:
        trainer = train(hf.FusedLRTrainer, tmp_path, trainer=settings)
    said = [str(w.message) for w in caught if "follows this Trainer's LambdaLR" in str(w.message)]
    assert len(said) == 1
    assert "and not the optimizer's own schedule, linear(total_steps=6)" in said[0]
    assert logged(trainer, "learning_rate") == pytest.approx([LR / 2] * STEPS)


def test_a_class_that_wraps_the_scheduler_is_obeyed_and_told(tmp_path):
    class Halved(LambdaLR):
        pass

    class Wraps(Trainer):
        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            super().create_scheduler(num_training_steps, optimizer)
            self.lr_scheduler = Halved(self.optimizer, lambda k: 0.5)
            return self.lr_scheduler

    stock = train(Wraps, tmp_path)
    with pytest.warns(UserWarning) as caught:
        ours = train(mixed(Wraps), tmp_path)
    assert len([w for w in caught if "follows this Trainer's Halved" in str(w.message)]) == 1
    compare(ours, stock)


def test_a_schedule_ends_where_a_later_run_follows_a_metric(tmp_path):
    def run(cls: Any) -> Any:
        # a constant one, so that the later run has a rate to go on with
        trainer = train(cls, tmp_path, lr_scheduler_type="constant", warmup_steps=0)
        trainer.args.lr_scheduler_type = transformers.SchedulerType.REDUCE_ON_PLATEAU
        trainer.eval_dataset = trainer.train_dataset
        trainer.args.metric_for_best_model = "loss"
        trainer.args.lr_scheduler_kwargs = {"patience": 0, "threshold": 0.9, "factor": 0.5}
        trainer.args.eval_strategy = transformers.IntervalStrategy.STEPS
        trainer.args.eval_steps = 2
        trainer.train()
        return trainer

    ours, stock = run(hf.FusedLRTrainer), run(Trainer)
    assert kinds(ours) == ("FusedAdamW", "ReduceLROnPlateau")
    assert hf.schedule_of(hf.unwrap(ours.optimizer)) is None
    compare(ours, stock)
    assert logged(ours, "learning_rate")[-1] < LR


def test_a_schedule_that_one_trainer_started_is_begun_anew_by_the_next(tmp_path):
    def run(cls: Any, optimizer_cls: Any) -> list[float]:
        torch.manual_seed(0)
        model = Linear()
        rates = []
        optimizer = optimizer_cls(model.parameters(), lr=LR)
        for _ in range(2):
            settings = {"model": model, "optimizers": (optimizer, None)}
            rates += logged(train(cls, tmp_path, trainer=settings), "learning_rate")
            # stock begins at the rate that it finds, which is what the schedule has come to
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"]
        return rates

    ours = run(hf.FusedLRTrainer, fusedlr.FusedAdamW)
    assert ours == pytest.approx(run(Trainer, torch.optim.AdamW), abs=1e-12)
    assert ours[:STEPS] == ours[STEPS:]


@pytest.mark.parametrize("cls", [hf.FusedLRTrainer, mixed(PassesOn), mixed(HalfRate)])
def test_where_all_is_in_order_nothing_is_said(tmp_path, cls):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(FusedAdamW|follows this Trainer)")
        train(cls, tmp_path)


def test_trl_is_obeyed_like_any_other(tmp_path):
    trl = pytest.importorskip("trl")
    for name in ("SFTTrainer", "DPOTrainer", "GRPOTrainer"):
        cls = mixed(getattr(trl, name))
        mro = cls.__mro__
        assert mro[mro.index(Trainer) - 1] is hf._FusedTrainer
        stock = getattr(trl, name)
        for method in ("create_optimizer", "create_scheduler", "get_optimizer_cls_and_kwargs"):
            if method in vars(stock):
                assert getattr(cls, method) is getattr(stock, method)
