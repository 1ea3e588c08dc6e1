"""Whoever looks at the norm before the step, in a Trainer, sees that of the coming step: as under stock."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
hf = pytest.importorskip("fusedlr.hf")
from small_runs import logged, make, train, weights  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("quick"),
    pytest.mark.skipif(
        not hasattr(transformers.Trainer, hf.CLIP_HOOK), reason="this transformers clips by itself"
    ),
]


class Guard:
    """Leaves out every update whose norm is not below a limit, and notes what it has seen."""

    limit = math.inf

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]
        self.seen = [*getattr(self, "seen", []), float(norm)]
        if not float(norm) < self.limit:
            for p in model.parameters():
                p.grad = None
        return norm


class Stock(Guard, transformers.Trainer):
    pass


class Before(Guard, hf.FusedLRTrainerMixin, transformers.Trainer):
    pass


class Behind(hf.FusedLRTrainerMixin, Stock):
    pass


@pytest.mark.parametrize("limit", [math.inf, 12.0], ids=str)
@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("way", ["before", "behind", "patch"])
def test_a_guard_sees_what_stock_shows(tmp_path, monkeypatch, way, max_grad_norm, limit):
    monkeypatch.setattr(Guard, "limit", limit)
    options = {"max_grad_norm": max_grad_norm, "learning_rate": 0.1}
    stock = train(Stock, tmp_path, **options)
    with hf.patch_transformers() if way == "patch" else nullcontext():
        ours = train({"before": Before, "behind": Behind, "patch": Stock}[way], tmp_path, **options)
    assert hf.unwrap(ours.optimizer) is not None
    assert ours.seen == pytest.approx(stock.seen, rel=1e-5)
    assert logged(ours, "grad_norm") == pytest.approx(logged(stock, "grad_norm"), rel=1e-5)
    assert logged(ours, "loss") == pytest.approx(logged(stock, "loss"), rel=1e-4)
    torch.testing.assert_close(weights(ours), weights(stock), rtol=1e-5, atol=1e-6)
    if limit < math.inf:
        # some are left out, and some are not
        assert 0 < sum(norm < limit for norm in ours.seen) < len(ours.seen)


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("unscaled", [False, True])
def test_under_loss_scaling_the_norm_is_that_of_unscaled_gradients(tmp_path, unscaled, max_grad_norm):
    class Unscaled(Before):
        def _clip_grad_norm(self, model: Any) -> Any:
            self.accelerator.unscale_gradients()
            return super()._clip_grad_norm(model)

    plain = train(Before, tmp_path, max_grad_norm=max_grad_norm)
    scaled = make(Unscaled if unscaled else Before, tmp_path, max_grad_norm=max_grad_norm)
    # the Trainer has one on a GPU alone
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled.train()
    # a power of two is exact
    assert scaled.seen == plain.seen
    assert torch.equal(weights(scaled), weights(plain))


def test_nobody_multiplies_the_gradients_where_nothing_clips(tmp_path):
    """The Trainer measures by clipping to inf, which makes every gradient nan if one is inf."""
    kept = []

    class Spoil(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **kw: Any) -> None:
            kept.append([p.grad.isnan().any().item() for p in model.parameters()])

    class Infinite(hf.FusedLRTrainer):
        def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
            next(model.parameters()).grad.view(-1)[0] = torch.inf
            norm = super()._get_grad_norm(model, grad_norm)
            assert float(norm) == math.inf
            return norm

    train(Infinite, tmp_path, max_grad_norm=0.0, max_steps=1, trainer={"callbacks": [Spoil()]})
    assert kept == [[False, False]]
