"""The limit of a step is the smaller of the optimizer's own and what the TrainingArguments say now."""

from __future__ import annotations

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from small_runs import LR, Linear, make, train, weights  # noqa: E402

import fusedlr  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(
        not hasattr(transformers.Trainer, hf.CLIP_HOOK), reason="this transformers clips by itself"
    ),
]
# far below and far above the norms of these runs; a large eps makes an update follow its gradient's size
TIGHT, LOOSE, EPS = 0.01, 100.0, {"adam_epsilon": 1e-2}


def limit(trainer: Any) -> float | None:
    return hf.unwrap(trainer.optimizer).max_grad_norm


@pytest.mark.parametrize("first", [TIGHT, LOOSE, 0.0])
@pytest.mark.parametrize("second", [TIGHT, LOOSE, 0.0])
def test_a_second_run_has_the_limit_of_its_arguments(tmp_path, first, second):
    def run(cls: Any) -> Any:
        trainer = train(cls, tmp_path, max_grad_norm=first, **EPS)
        trainer.args.max_grad_norm = second
        trainer.train()
        return trainer

    ours, stock = run(hf.FusedLRTrainer), run(transformers.Trainer)
    assert limit(ours) == (second or None)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=1e-5, atol=1e-6)


def test_a_callback_changes_it_between_any_two_updates(tmp_path):
    class Change(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            args.max_grad_norm = [LOOSE, TIGHT, 0.0, TIGHT, LOOSE, 0.0][state.global_step - 1]
            seen.append(args.max_grad_norm)

    class Look(transformers.TrainerCallback):
        def on_optimizer_step(
            self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any
        ) -> None:
            fused = hf.unwrap(optimizer)
            used.append((fused.max_grad_norm, fused.last_metrics()["coef"] < 1))

    seen: list[float] = []
    used: list[tuple[float | None, bool]] = []
    callbacks = {"callbacks": [Change(), Look()]}
    ours = train(hf.FusedLRTrainer, tmp_path, trainer=callbacks, max_grad_norm=TIGHT, **EPS)
    asked = [TIGHT, *seen[:-1]]
    assert used == [(x or None, x == TIGHT) for x in asked]
    stock = train(
        transformers.Trainer, tmp_path, trainer={"callbacks": [Change()]}, max_grad_norm=TIGHT, **EPS
    )
    torch.testing.assert_close(weights(ours), weights(stock), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("own", "asked"), [(TIGHT, LOOSE), (LOOSE, TIGHT), (TIGHT, 0.0)])
def test_the_optimizers_own_limit_holds_in_every_run(tmp_path, own, asked):
    given = {"optimizer_cls_and_kwargs": (fusedlr.FusedAdamW, {"lr": LR, "max_grad_norm": own})}
    trainer = train(hf.FusedLRTrainer, tmp_path, trainer=given, max_grad_norm=asked)
    assert limit(trainer) == TIGHT
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    assert limit(trainer) == own


def test_a_limit_given_to_the_optimizer_in_the_run_becomes_its_own(tmp_path):
    class Give(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                hf.unwrap(optimizer).max_grad_norm = 2 * TIGHT
                args.max_grad_norm = LOOSE

    trainer = train(hf.FusedLRTrainer, tmp_path, trainer={"callbacks": [Give()]}, max_grad_norm=TIGHT)
    assert limit(trainer) == 2 * TIGHT


def test_two_trainers_that_share_an_optimizer_do_not_take_each_others_limit(tmp_path):
    model = Linear()
    optimizer = fusedlr.FusedAdamW(model.parameters(), lr=LR)
    for asked in (TIGHT, LOOSE, 0.0):
        settings = {"model": model, "optimizers": (optimizer, None)}
        train(hf.FusedLRTrainer, tmp_path, trainer=settings, max_grad_norm=asked)
        assert optimizer.max_grad_norm == (asked or None)


def test_a_run_without_a_limit_of_a_trainer_that_measures_in_its_own_way(tmp_path):
    class Own(hf.FusedLRTrainer):
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            return torch.tensor(0.0)

    trainer = train(Own, tmp_path, max_grad_norm=TIGHT)
    assert limit(trainer) == TIGHT
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    assert limit(trainer) is None


def test_patched_transformers_obeys_it_too(tmp_path):
    with hf.patch_transformers():
        trainer = make(transformers.Trainer, tmp_path, max_grad_norm=TIGHT)
        for asked in (TIGHT, LOOSE, 0.0):
            trainer.args.max_grad_norm = asked
            trainer.train()
            assert limit(trainer) == (asked or None)
