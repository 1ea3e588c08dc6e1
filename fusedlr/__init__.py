"""AdamW, learning rate schedule, gradient clipping and AMP skip as one optimizer step, for LoRA fine-tuning.

What needs torch is imported when it is first used: schedules work without loading torch, and the command line
can set the environment that torch reads when it is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fusedlr.guard import ZClip as ZClip
from fusedlr.schedule import CONSTRUCTORS as _CONSTRUCTORS
from fusedlr.schedule import Phase as Phase
from fusedlr.schedule import Schedule as Schedule
from fusedlr.schedule import constant as constant
from fusedlr.schedule import constant_with_warmup as constant_with_warmup
from fusedlr.schedule import cosine as cosine
from fusedlr.schedule import cosine_warmup_with_min_lr as cosine_warmup_with_min_lr
from fusedlr.schedule import cosine_with_min_lr as cosine_with_min_lr
from fusedlr.schedule import cosine_with_restarts as cosine_with_restarts
from fusedlr.schedule import from_hf as from_hf
from fusedlr.schedule import from_torch as from_torch
from fusedlr.schedule import inverse_sqrt as inverse_sqrt
from fusedlr.schedule import linear as linear
from fusedlr.schedule import polynomial as polynomial
from fusedlr.schedule import table as table
from fusedlr.schedule import total_steps as total_steps
from fusedlr.schedule import warmup_stable_decay as warmup_stable_decay

if TYPE_CHECKING:
    from fusedlr import lora as lora
    from fusedlr.backends import FallbackWarning as FallbackWarning
    from fusedlr.optimizer import FusedAdamW as FusedAdamW
    from fusedlr.record import Record as Record
    from fusedlr.recorded import Recording as Recording

__version__ = "0.1.0"

# name -> module that defines it; "" for a submodule
_LATE_IMPORTS = {
    "FallbackWarning": "backends",
    "FusedAdamW": "optimizer",
    "Record": "record",
    "Recording": "recorded",
    "lora": "",
}

__all__ = sorted(
    [*_LATE_IMPORTS, *_CONSTRUCTORS, "Phase", "Schedule", "ZClip", "from_hf", "from_torch", "total_steps"]
)


def __getattr__(name: str) -> Any:
    if name not in _LATE_IMPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _LATE_IMPORTS[name]
    value = (
        getattr(import_module(f"{__name__}.{module}"), name)
        if module
        else import_module(f"{__name__}.{name}")
    )
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE_IMPORTS})
