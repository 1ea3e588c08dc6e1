"""Runs a script as Python would, and then ends the process at once.

Threads of torch's process groups that still run when Python is gone abort it now and then, one time in three
for a script that has used DCP with gloo ("terminate called without an active exception").
"""

import os
import runpy
import sys

if __name__ == "__main__":
    script, *sys.argv[1:] = sys.argv[1:]
    sys.path[0], sys.argv[0] = os.path.dirname(script), script
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)
