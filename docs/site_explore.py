"""For mkdocs: puts what docs/explore.md runs into the site: uPlot, Pyodide and the schedule package.

`make docs` installs the first two in node_modules/, once, as package-lock.json says. Nothing is fetched
while the site is built or read.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = ROOT / "node_modules"
# the files of each package that a browser asks for
WANTED = {
    "uplot": ("dist/uPlot.esm.js", "dist/uPlot.min.css", "LICENSE"),
    "pyodide": (
        "pyodide.mjs",
        "pyodide.asm.mjs",
        "pyodide.asm.wasm",
        "pyodide-lock.json",
        "python_stdlib.zip",
    ),
}
# prints the files that the page needs; an import of torch or numpy is an error
NEEDED = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = None
import fusedlr.schedule.page
ours = (module for name, module in sys.modules.items() if name.partition(".")[0] == "fusedlr")
print(*sorted(module.__file__ for module in ours), sep="\\n")
"""


def on_post_build(config, **_):
    """A hook of mkdocs: the site's folder is complete but for these."""
    assemble(Path(config["site_dir"]) / "explore" / "vendor")


def assemble(folder):
    """Fill `folder` with what the page's modules import and fetch."""
    for package, names in WANTED.items():
        (folder / package).mkdir(parents=True, exist_ok=True)
        for name in names:
            source = MODULES / package / name
            if not source.exists():
                raise FileNotFoundError(f"{source} is missing: `make docs` installs it, with npm")
            shutil.copy(source, folder / package / source.name)
    command = [sys.executable, "-c", NEEDED]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    with zipfile.ZipFile(folder / "fusedlr.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in filter(None, files):
            # a fixed date: the same sources make the same bytes
            entry = zipfile.ZipInfo(str(Path(path).relative_to(ROOT)))
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, Path(path).read_bytes())
