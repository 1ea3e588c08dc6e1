"""`python -m fusedlr`."""

import sys

from fusedlr.cli import main

if __name__ == "__main__":
    sys.exit(main())
