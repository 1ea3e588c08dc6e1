"""`fusedlr report`: what a recorded run did, drawn here, into a picture or into a page, with what is unusual.

`fusedlr report` calls `add_arguments(parser)` and `run(args, parser)`. Importing this package imports neither
numpy nor matplotlib; the modules that need them are imported by `run`.
"""

from fusedlr.report.command import add_arguments, run

__all__ = ["add_arguments", "run"]
