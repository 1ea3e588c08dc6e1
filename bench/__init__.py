"""The benchmark: fusedlr's step against stock torch's and others', interleaved in one run.

`python -m fusedlr bench` calls `add_arguments(parser)` and `run(args, parser)`. Installed, this package is
`fusedlr.bench`. Importing it does not import torch, so that `fusedlr --help` answers at once.
"""

from .main import run
from .options import add_arguments

__all__ = ["add_arguments", "run"]
