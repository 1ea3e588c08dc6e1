"""What Lightning logs, warns of and writes of a recorded run."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

lightning = pytest.importorskip("lightning")
import fusedlr  # noqa: E402
from fusedlr.integrations.lightning import FusedLRCallback  # noqa: E402
from fusedlr.recorded import Recording  # noqa: E402

STEPS = 6


class Module(lightning.LightningModule):
    def __init__(self, record: Any = None, bad: Any = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 2)
        self.record, self.bad = record, bad

    def training_step(self, batch: Any, index: int) -> Any:
        return self.linear(batch).square().mean()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.trainer.global_step in self.bad:
            self.linear.bias.grad.fill_(torch.nan)

    def configure_optimizers(self) -> Any:
        schedule = fusedlr.cosine(warmup_steps=1, total_steps=STEPS)
        return fusedlr.FusedAdamW(
            self.named_parameters(), lr=1e-2, max_grad_norm=0.1, schedule=schedule, record=self.record
        )


class Memory(lightning.pytorch.loggers.logger.DummyLogger):
    """Keeps what is logged, by step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, dict[str, float]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.seen.setdefault(step, {}).update(metrics)


def train(folder: Path, module: Module, every: int = 1, accumulation: int = 1) -> Any:
    logger = Memory()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = lightning.Trainer(
        max_steps=STEPS,
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=logger,
        callbacks=[FusedLRCallback()],
        log_every_n_steps=every,
        accumulate_grad_batches=accumulation,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have many workers.*")
        trainer.fit(
            module, torch.utils.data.DataLoader(torch.randn(8 * STEPS * accumulation, 4), batch_size=8)
        )
    return logger.seen


@pytest.mark.parametrize("every", [1, 3])
def test_it_logs_every_so_many_steps_what_is_recorded(tmp_path, every):
    seen = train(tmp_path, Module(fusedlr.Record()), every)
    recording = Recording.load(tmp_path / "record.npz")
    assert recording["step"].tolist() == list(range(STEPS))
    logged = {step: entry for step, entry in seen.items() if "update_ratio/matrices" in entry}
    assert list(logged) == list(range(every - 1, STEPS, every))
    for step, entry in logged.items():
        expected = recording["tensor_update_ratio"][step]
        found = [entry["update_ratio/matrices"], entry["update_ratio/vectors"]]
        assert found == pytest.approx(expected.tolist(), rel=1e-5)
        assert entry["grad_norm"] == pytest.approx(recording["grad_norm"][step], rel=1e-5)


def test_batches_that_make_no_step_are_left_out_of_the_count(tmp_path):
    seen = train(tmp_path, Module(fusedlr.Record()), accumulation=2)
    recording = Recording.load(tmp_path / "record.npz")
    norms = [entry["grad_norm"] for entry in seen.values() if "grad_norm" in entry]
    assert len(recording["step"]) == STEPS
    assert norms == pytest.approx(recording["grad_norm"].tolist(), rel=1e-5)


def test_a_skip_is_logged_and_its_tensor_named_once(tmp_path):
    with pytest.warns(UserWarning, match="was skipped") as caught:
        seen = train(tmp_path, Module(bad=(2, 3)))
    said = [str(w.message) for w in caught if "was skipped" in str(w.message)]
    assert said == ["step 2 was skipped: the gradient of linear.bias was inf or nan"]
    assert [entry.get("skipped_steps") for _, entry in sorted(seen.items())][:6] == [None, None, 1, 2, 2, 2]
    # nothing was recorded
    assert not (tmp_path / "record.npz").exists()
    assert not any(name.startswith("update_ratio") for entry in seen.values() for name in entry)
