"""Hugging Face Trainer on fusedlr: every way in, against the stock Trainer with the same arguments."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trainers import (
    FOREACH,
    FUSED,
    LATE,
    LR,
    OURS,
    Outcome,
    assert_as_stock,
    assert_rates,
    distance,
    examples,
    lora_model,
    trainable,
    weights_of,
)

import fusedlr

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
hf = pytest.importorskip("fusedlr.hf")

pytestmark = pytest.mark.usefixtures("quick")

# long enough that what training makes of a last bit outweighs which bits two steps have in common
STEPS, WARMUP, CLIP = 20, 4, 0.25
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "constant_with_warmup": {},
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"power": 2.0},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr": 1e-3},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "warmup_stable_decay": {"num_decay_steps": 4},
}
WARMUPLESS = ("constant",)
# what torch, transformers and accelerate say when calls come in the wrong order or twice
ORDER = ("before `optimizer.step()`", "lr_scheduler.step", "optimizer.step()", "was assigned to group")

needs_hook = pytest.mark.skipif(
    not hasattr(transformers.Trainer, hf.CLIP_HOOK), reason="this transformers clips by itself"
)


def arguments(folder: Path, kind: str = OURS, **options: Any) -> Any:
    defaults = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": LR,
        "weight_decay": 0.01,
        "adam_beta2": 0.99,
        "lr_scheduler_type": "cosine",
        # gradients have norms of 0.2 to 0.5 here
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    warmup = options.pop("warmup_steps", WARMUP) + (kind == LATE)
    return transformers.TrainingArguments(**{**defaults, "warmup_steps": warmup, **options})


def make(
    folder: Path, kind: str, model: Any = None, cls: Any = None, trainer: Any = None, **options: Any
) -> Any:
    """A Trainer of the kind: ours, or stock on one of torch's kernels."""
    model = model if model is not None else lora_model()
    settings: dict[str, Any] = dict(trainer or {})
    if cls is None:
        cls = hf.FusedLRTrainer if kind == OURS else transformers.Trainer
    if kind in (FOREACH, LATE):
        kernel = {"lr": LR, "betas": (0.9, 0.99), "foreach": True}
        settings["optimizer_cls_and_kwargs"] = (torch.optim.AdamW, kernel)
    transformers.set_seed(0)
    made = cls(model=model, args=arguments(folder, kind, **options), train_dataset=examples(48), **settings)
    made.remove_callback(transformers.PrinterCallback)
    # dropout draws from here on
    transformers.set_seed(0)
    return made


def outcome(trainer: Any) -> Outcome:
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Outcome(
        weights_of(trainer.model),
        rates=[entry["learning_rate"] for entry in logs],
        losses=[entry["loss"] for entry in logs],
        # which older versions log only where they clip
        norms=[entry["grad_norm"] for entry in logs if "grad_norm" in entry],
    )


_stock: dict[str, Outcome] = {}


def run(folder: Path, kind: str, resume: Any = None, **options: Any) -> Outcome:
    # the same stock run is compared with by many
    key = repr((kind, sorted(options.items())))
    if resume is None and key in _stock:
        return _stock[key]
    trainer = make(folder, kind, **options)
    trainer.train(resume_from_checkpoint=resume)
    result = outcome(trainer)
    if kind != OURS and resume is None and not {"save_strategy", "model", "trainer"} & options.keys():
        _stock[key] = result
    return result


@pytest.fixture(autouse=True)
def no_complaints() -> Iterator[None]:
    """No warning about the order of calls or a second scheduler, from anybody."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(warning.message) for warning in caught]
    assert not [text for text in said if any(part in text for part in ORDER)]


# --- the class


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_trains_and_logs_as_stock(tmp_path, name):
    def train(kind: str) -> Outcome:
        return run(tmp_path, kind, lr_scheduler_type=name, lr_scheduler_kwargs=SCHEDULES[name])

    kinds = (OURS, FUSED, FOREACH) if name in WARMUPLESS else (OURS, FUSED, FOREACH, LATE)
    assert_as_stock(train, kinds)


def test_accumulation_epochs_and_evaluation_in_between(tmp_path):
    def train(kind: str) -> Outcome:
        trainer = make(
            tmp_path,
            kind,
            max_steps=-1,
            num_train_epochs=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=5,
            eval_strategy="steps",
            eval_steps=4,
            trainer={"eval_dataset": examples(4)},
        )
        trainer.train()
        # 24 micro-batches are 4 full updates and a short one
        assert trainer.state.global_step == 15
        # newer versions also evaluate at the end
        assert len([entry for entry in trainer.state.log_history if "eval_loss" in entry]) in (3, 4)
        return outcome(trainer)

    assert_as_stock(train)


def test_the_arguments_reach_the_optimizer_in_the_trainers_own_groups(tmp_path):
    options = {"adam_beta1": 0.8, "adam_epsilon": 1e-6, "weight_decay": 0.1, "max_steps": 1}
    # biases and norms do not decay
    adapters = {"bias": "all", "modules_to_save": ["norm"], "lora_bias": True}
    ours, stock = (make(tmp_path, kind, lora_model(**adapters), **options) for kind in (OURS, FUSED))
    for trainer in (ours, stock):
        trainer.train()
    fused = hf.unwrap(ours.optimizer)
    assert type(fused) is fusedlr.FusedAdamW
    assert fused.max_grad_norm == (CLIP if hasattr(transformers.Trainer, hf.CLIP_HOOK) else None)
    for mine, theirs in zip(fused.param_groups, stock.optimizer.param_groups, strict=True):
        assert [p.shape for p in mine["params"]] == [p.shape for p in theirs["params"]]
        for key in ("betas", "eps", "weight_decay", "initial_lr"):
            assert mine[key] == theirs[key], key
    assert [group["weight_decay"] for group in fused.param_groups] == [0.1, 0.0]
    assert all(group["params"] for group in fused.param_groups)


@pytest.mark.parametrize(
    "adapters",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"], "target_modules": "all-linear"},
    ],
    ids=["rslora", "dora", "modules_to_save"],
)
def test_kinds_of_adapters(tmp_path, adapters):
    assert_as_stock(lambda kind: run(tmp_path, kind, model=lora_model(**adapters)))


def loraplus(model: Any, cls: Any, **options: Any) -> Any:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(model, cls, lr=LR, loraplus_lr_ratio=4, **options)


def test_loraplus_gets_the_schedule_of_the_arguments(tmp_path):
    def train(kind: str) -> Outcome:
        model = lora_model()
        if kind == OURS:
            optimizer = loraplus(model, fusedlr.FusedAdamW)
        else:
            kernel = {"fused": True} if kind == FUSED else {"foreach": True}
            optimizer = loraplus(model, torch.optim.AdamW, **kernel)
        cls = hf.FusedLRTrainer if kind == OURS else transformers.Trainer
        transformers.set_seed(0)
        # no `make`: it would choose the optimizer
        trainer = cls(
            model=model,
            args=arguments(tmp_path, kind),
            train_dataset=examples(48),
            optimizers=(optimizer, None),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        transformers.set_seed(0)
        trainer.train()
        if kind == OURS:
            assert trainer.lr_scheduler is optimizer.scheduler
            assert max(optimizer.scheduler.base_lrs) == 4 * LR
        return outcome(trainer)

    assert_as_stock(train)


# --- the other ways in


def test_an_optimizer_and_its_view_in_a_plain_trainer(tmp_path):
    def train(kind: str) -> Outcome:
        if kind != OURS:
            return run(tmp_path, kind)
        model = lora_model()
        optimizer = fusedlr.FusedAdamW(
            trainable(model),
            lr=LR,
            betas=(0.9, 0.99),
            weight_decay=0.01,
            schedule=fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS),
        )
        settings = {"optimizers": (optimizer, optimizer.scheduler)}
        return run(tmp_path, kind, model=model, cls=transformers.Trainer, trainer=settings)

    assert_as_stock(train)


@pytest.mark.parametrize("ours", [transformers.Trainer, hf.FusedLRTrainer])
def test_the_class_and_its_arguments(tmp_path, ours):
    """In a plain Trainer its scheduler drives the optimizer, in ours the optimizer drives itself."""

    def train(kind: str) -> Outcome:
        if kind != OURS:
            return run(tmp_path, kind)
        settings = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, {"lr": LR, "betas": (0.9, 0.99)})}
        trainer = make(tmp_path, kind, cls=ours, trainer=settings)
        trainer.train()
        driven = isinstance(trainer.lr_scheduler, type(hf.unwrap(trainer.optimizer).scheduler))
        assert driven == (ours is hf.FusedLRTrainer)
        return outcome(trainer)

    assert_as_stock(train)


class FromYaml(transformers.Trainer):
    """A tool's own Trainer that knows nothing of fusedlr."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        return super().create_scheduler(num_training_steps, optimizer)


def test_patched_transformers_and_back(tmp_path):
    def train(kind: str) -> Outcome:
        if kind != OURS:
            return run(tmp_path, kind)
        with hf.patch_transformers():
            trainer = make(tmp_path, kind, cls=FromYaml)
            trainer.train()
        assert type(hf.unwrap(trainer.optimizer)) is fusedlr.FusedAdamW
        assert any(
            isinstance(callback, hf.FusedLRCallback) for callback in trainer.callback_handler.callbacks
        )
        return outcome(trainer)

    before = dict(vars(transformers.Trainer))
    assert_as_stock(train)
    assert dict(vars(transformers.Trainer)) == before


def test_a_patch_is_one_and_is_undone_once(tmp_path):
    before = dict(vars(transformers.Trainer))
    patch = hf.patch_transformers()
    assert hf.patch_transformers() is patch
    assert dict(vars(transformers.Trainer)) != before
    # our class on top of it, and what is not AdamW
    assert make(tmp_path, OURS).get_optimizer_cls_and_kwargs(arguments(tmp_path))[0] is fusedlr.FusedAdamW
    other = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(tmp_path, optim="sgd"))
    assert other[0] is torch.optim.SGD
    patch.undo()
    assert dict(vars(transformers.Trainer)) == before
    patch.undo()
    assert hf.patch_transformers() is not patch
    hf.patch_transformers().undo()


def test_a_patch_under_another_patch_is_not_undone(monkeypatch):
    patch = hf.patch_transformers()
    with monkeypatch.context() as other:
        other.setattr(transformers.Trainer, "create_scheduler", lambda *args: None)
        with pytest.raises(RuntimeError, match=r"Trainer\.create_scheduler was patched again"):
            patch.undo()
    patch.undo()


# --- who clips


def count_clips(trainer: Any, monkeypatch: Any) -> list[float]:
    """The limits that the Trainer's own clipping is called with."""
    limits: list[float] = []
    stock = trainer.accelerator.clip_grad_norm_

    def counted(parameters: Any, max_norm: float, *args: Any) -> Any:
        limits.append(max_norm)
        return stock(parameters, max_norm, *args)

    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", counted)
    return limits


@needs_hook
def test_the_step_clips_and_nothing_else_does(tmp_path, monkeypatch):
    trainer = make(tmp_path, OURS, max_grad_norm=0.1)
    limits = count_clips(trainer, monkeypatch)
    trainer.train()
    assert limits == []
    assert hf.unwrap(trainer.optimizer).max_grad_norm == 0.1
    # logged before clipping
    assert min(outcome(trainer).norms) > 0.1


def test_without_clipping_the_norm_is_logged_as_before(tmp_path):
    assert_as_stock(lambda kind: run(tmp_path, kind, max_grad_norm=0.0))


@needs_hook
@pytest.mark.parametrize(("own", "asked", "result"), [(0.1, 0.2, 0.1), (0.3, 0.2, 0.2), (0.1, 0.0, 0.1)])
def test_the_smaller_of_two_limits_holds(tmp_path, monkeypatch, own, asked, result):
    """As if the Trainer and the optimizer clipped one after the other."""
    settings = {"lr": LR, "max_grad_norm": own}
    given = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, settings)}
    trainer = make(tmp_path, OURS, trainer=given, max_grad_norm=asked, max_steps=2)
    limits = count_clips(trainer, monkeypatch)
    trainer.train()
    assert limits == []
    assert hf.unwrap(trainer.optimizer).max_grad_norm == result
    assert min(outcome(trainer).norms) > 0.2


def test_independent_groups_are_clipped_together_by_the_trainer(tmp_path, monkeypatch):
    given = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, {"lr": LR, "groups": "independent"})}
    trainer = make(tmp_path, OURS, trainer=given, max_steps=2)
    limits = count_clips(trainer, monkeypatch)
    trainer.train()
    assert limits == [CLIP, CLIP]


@needs_hook
def test_sharded_gradients_are_clipped_by_the_trainer(tmp_path, monkeypatch):
    trainer = make(tmp_path, OURS, max_steps=2)
    trainer.create_optimizer()
    assert hf._can_clip(trainer, trainer.optimizer)
    from accelerate.utils import DistributedType

    for kind in DistributedType:
        monkeypatch.setattr(type(trainer.accelerator), "distributed_type", kind)
        assert hf._can_clip(trainer, trainer.optimizer) == (kind == "NO" or kind.startswith("MULTI_")), kind


def test_where_the_hook_is_missing_one_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "CLIP_HOOK", "_clip_grads_some_other_way")
    hf._warn_missing_hook.cache_clear()
    with pytest.warns(UserWarning, match="has no Trainer._clip_grads_some_other_way") as caught:
        for _ in range(2):
            trainer = make(tmp_path, OURS)
            trainer.create_optimizer_and_scheduler(4)
    assert len([w for w in caught if "has no Trainer" in str(w.message)]) == 1
    hf._warn_missing_hook.cache_clear()


# --- what the Trainer drives itself


def test_a_schedule_that_follows_a_metric_stays_the_trainers(tmp_path):
    def train(kind: str) -> Outcome:
        return run(
            tmp_path,
            kind,
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"patience": 0, "threshold": 0.5, "factor": 0.7},
            eval_strategy="steps",
            eval_steps=3,
            trainer={"eval_dataset": examples(4)},
        )

    assert_as_stock(train, (OURS, FUSED, FOREACH))


def test_another_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="optim='sgd' is not torch's AdamW"):
        make(tmp_path, OURS, optim="sgd").train()


def test_a_second_train_starts_the_schedule_anew_as_stock(tmp_path):
    def train(kind: str) -> Outcome:
        trainer = make(tmp_path, kind, max_steps=5)
        trainer.train()
        first = outcome(trainer)
        transformers.set_seed(1)
        trainer.train()
        second = outcome(trainer)
        return Outcome(second.weights, first.rates + second.rates, first.losses + second.losses)

    assert_as_stock(train)


# --- checkpoints


def test_a_resumed_run_is_the_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 5}
    whole = run(tmp_path / "whole", OURS, **options)
    resumed = run(tmp_path / "again", OURS, resume=str(tmp_path / "whole" / "checkpoint-5"), **options)
    assert torch.equal(whole.weights, resumed.weights)
    assert whole.rates == resumed.rates
    assert whole.losses == resumed.losses
    assert whole.norms == resumed.norms


def test_checkpoints_are_plain_tensors_and_numbers(tmp_path):
    for kind in (OURS, FUSED):
        run(tmp_path / kind, kind, save_strategy="steps", save_steps=5)
    ours, stock = ({f.name for f in (tmp_path / kind / "checkpoint-5").iterdir()} for kind in (OURS, FUSED))
    assert ours == stock
    for name in ("optimizer.pt", "scheduler.pt"):
        mine, theirs = (
            torch.load(tmp_path / kind / "checkpoint-5" / name, weights_only=True) for kind in (OURS, FUSED)
        )
        assert mine.keys() >= theirs.keys()
        if name == "optimizer.pt":
            assert mine["state"].keys() == theirs["state"].keys()
            for a, b in zip(mine["param_groups"], theirs["param_groups"], strict=True):
                assert a.keys() - b.keys() == {"schedule", "k", "k_at_step"}
                assert b.keys() <= a.keys()


def test_more_epochs_than_the_checkpoint_had_are_reported_and_used(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 6}
    run(tmp_path / "a", OURS, **options)
    checkpoint = str(tmp_path / "a" / "checkpoint-6")
    with pytest.warns(UserWarning, match="the checkpoint's run has 20 updates, this one 30"):
        longer = run(tmp_path / "b", OURS, resume=checkpoint, max_steps=30)
    # nothing to say where nothing changes
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the loaded schedule")
        run(tmp_path / "c", OURS, resume=checkpoint)
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=30)
    assert_rates(longer.rates[6:], [schedule.lr_at(k, LR) for k in range(6, 30)])


# --- the callback


def spoil(trainer: Any, updates: set[int]) -> None:
    """Make the gradients of these updates infinite."""

    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(
            self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any
        ) -> None:
            if state.global_step in updates:
                trainable(model)[0].grad.view(-1)[0] = torch.inf

    trainer.add_callback(Spoil())


@needs_hook
def test_skipped_steps_are_logged_once_there_are_any(tmp_path):
    seen: list[Any] = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in logs:
                seen.append(logs.get("skipped_steps"))

    trainer = make(tmp_path, OURS, max_steps=8, trainer={"callbacks": [Reporter()]})
    spoil(trainer, {3, 5})
    with pytest.warns(UserWarning, match="training ended after 6 updates, but the schedule is"):
        trainer.train()
    logged = [entry.get("skipped_steps") for entry in trainer.state.log_history if "loss" in entry]
    assert logged == seen == [None] * 3 + [1, 1, 2, 2, 2]
    assert hf.unwrap(trainer.optimizer).scheduler.last_epoch == 6
    # the schedule waits for the updates that were skipped
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=8)
    assert_rates(outcome(trainer).rates, [schedule.lr_at(k, LR) for k in (0, 1, 2, 3, 3, 4, 4, 5)])


def with_schedule(folder: Path, total: int, stop: int | None = None) -> Any:
    """A plain Trainer of 12 updates whose optimizer has a schedule of its own."""

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == stop

    model = lora_model()
    optimizer = fusedlr.FusedAdamW(trainable(model), lr=LR, schedule=fusedlr.linear(total_steps=total))
    settings = {"optimizers": (optimizer, optimizer.scheduler), "callbacks": [hf.FusedLRCallback(), Stop()]}
    return make(folder, OURS, model, cls=transformers.Trainer, trainer=settings, max_steps=12)


def test_a_schedule_of_another_length_than_the_run_is_said_once(tmp_path):
    with pytest.warns(UserWarning) as caught:
        with_schedule(tmp_path, total=96).train()
    said = [str(w.message) for w in caught if "the schedule is" in str(w.message)]
    assert said == [
        "training will end after 12 updates, but the schedule is linear(total_steps=96): the last rate is "
        "88.5% of the peak where the schedule's last is 1.0%. total_steps counts updates that are made, not "
        "batches"
    ]


@pytest.mark.parametrize(("total", "stop"), [(12, None), (12, 4)])
def test_a_schedule_that_fits_and_a_run_stopped_on_purpose_say_nothing(tmp_path, total, stop):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*the schedule is")
        with_schedule(tmp_path, total, stop).train()


# --- loss scaling; the Trainer has a scaler on a GPU alone, so the test gives it one


def scaled(folder: Path, kind: str, bad: set[int]) -> Any:
    trainer = make(folder, kind)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)
    spoil(trainer, bad)
    trainer.train()
    return trainer


@needs_hook
def test_after_overflows_the_schedule_has_counted_the_updates_made_where_stock_drifts(tmp_path):
    bad = {1, 4, 5}
    schedule = fusedlr.cosine(warmup_steps=WARMUP, total_steps=STEPS)
    made, expected = 0, []
    for k in range(STEPS):
        expected.append(schedule.lr_at(made, LR))
        made += k not in bad
    ours = scaled(tmp_path, OURS, bad)
    fused = hf.unwrap(ours.optimizer)
    assert_rates(outcome(ours).rates, expected)
    assert fused.last_metrics()["step"] == [made] * len(fused.param_groups)
    assert {int(state["step"]) for state in fused.state.values()} == {made}
    assert fused.scheduler.last_epoch == made
    stock = scaled(tmp_path, FUSED, bad)
    # its weights have seen three updates fewer than its schedule
    assert {int(state["step"]) for state in stock.optimizer.state.values()} == {made}
    assert stock.lr_scheduler.last_epoch == STEPS
    assert outcome(stock).rates == pytest.approx([schedule.lr_at(k, LR) for k in range(STEPS)])


@needs_hook
def test_loss_scaling_changes_nothing_else(tmp_path):
    plain, scaled_run = run(tmp_path, OURS), outcome(scaled(tmp_path, OURS, set()))
    # a power of two is exact
    assert torch.equal(plain.weights, scaled_run.weights)
    assert plain.norms == scaled_run.norms
    assert distance(run(tmp_path, FOREACH), scaled_run) < 1e-6
