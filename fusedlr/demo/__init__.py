"""The demo: a LoRA fine-tune through PEFT and the Hugging Face Trainer, with fusedlr and with stock AdamW.

`python -m fusedlr demo` calls `add_arguments(parser)` and `run(args, parser)`. Importing this package
imports none of the optional packages; they are imported where they are used.
"""

from fusedlr.demo.main import run
from fusedlr.demo.options import add_arguments

__all__ = ["add_arguments", "run"]
