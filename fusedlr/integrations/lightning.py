"""Lightning: a callback that logs what the optimizer's last step did, and writes what it has recorded.

`lightning.Trainer(callbacks=[fusedlr.integrations.lightning.FusedLRCallback()])`, with the optimizer that the
module's `configure_optimizers` makes. Needs lightning.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from fusedlr.logs import Nonfinite, scalars, write_recording
from fusedlr.optimizer import FusedAdamW
from fusedlr.wrapped import unwrap


class FusedLRCallback(Callback):
    """Logs `fusedlr.logs.scalars` every `log_every_n_steps`, through the module's own `log`.

    These are `grad_norm`, `skipped_steps` once there are any, and `update_ratio/...` where the optimizer
    records tensors, as of the last copy that has reached the host: nothing waits for a GPU. A warning names
    the first tensor whose gradient was inf or nan in a skipped step. At the end of the fit the recording goes
    to `record.npz` in the logger's folder, or in `default_root_dir` where there is none. Of several
    optimizers the first `FusedAdamW` is meant.
    """

    def __init__(self) -> None:
        self._nonfinite = Nonfinite()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the loggers will be given of this batch."""
        fused = _fused(trainer)
        every = trainer.log_every_n_steps
        if fused is None or not every or trainer.global_step % every:
            return
        self._nonfinite.tell(fused)
        pl_module.log_dict(scalars(fused))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write the recording."""
        fused = _fused(trainer)
        if fused is not None:
            folder = Path(trainer.log_dir or trainer.default_root_dir)
            write_recording(fused, folder, writes=trainer.is_global_zero)


def _fused(trainer: Any) -> FusedAdamW | None:
    return next((found for found in map(unwrap, trainer.optimizers) if found is not None), None)


__all__ = ["FusedLRCallback"]
