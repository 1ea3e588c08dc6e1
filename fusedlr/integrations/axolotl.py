"""axolotl: one line in the YAML, `plugins: [fusedlr.integrations.axolotl.FusedLRPlugin]`.

axolotl imports this module and asks the plugin in every process that trains.
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin

from fusedlr.hf import patch_transformers
from fusedlr.warn import warn

# what transformers makes of these is torch's AdamW
_REPLACED = ("adamw_torch", "adamw_torch_fused")


class FusedLRPlugin(BasePlugin):
    """Has the run stepped by `FusedAdamW`, where `optimizer` is torch's AdamW; see `patch_transformers`.

    Rates, warm-up, schedule and `max_grad_norm` are those of the YAML. A schedule that is axolotl's own, as
    `cosine_min_lr_ratio`, drives the optimizer from the host.
    """

    def register(self, cfg: dict[str, Any]) -> None:
        """Patch transformers, until the process ends."""
        optimizer = cfg.get("optimizer")
        if optimizer is not None and getattr(optimizer, "value", optimizer) not in _REPLACED:
            warn(
                f"optimizer: {getattr(optimizer, 'value', optimizer)} is not torch's AdamW, which fusedlr "
                f"replaces, and stays as it is: use {' or '.join(_REPLACED)}"
            )
        patch_transformers()
