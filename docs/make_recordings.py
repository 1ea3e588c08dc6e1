"""Trains the runs that docs/watching.md shows, and draws what `fusedlr report` makes of each.

The model is the quick one of `fusedlr demo`, trained first unless it is in the demo's cache. Run it from
anywhere after a change to the report; it needs `fusedlr[demo]` and takes a minute or two on two cores. Its
corpus is the standard library of the Python that runs it, whose version changes the numbers a little.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from PIL import Image

from fusedlr.demo import options
from fusedlr.demo.base import prepare_base
from fusedlr.demo.finetune import Run as DemoRun
from fusedlr.demo.finetune import finetune
from fusedlr.demo.tokens import prepare_data
from fusedlr.report import picture
from fusedlr.report.runs import Run
from fusedlr.report.unusual import unusual

FOLDER = Path(__file__).resolve().parent / "pictures"
STEPS = 120


@dataclass(frozen=True)
class Example:
    """A run of the page: its peak rate, and its updates of warm-up."""

    lr: float
    warmup: int


# the first is as the other two but for one thing each
EXAMPLES = {
    "healthy": Example(lr=2e-2, warmup=24),
    "high_rate": Example(lr=1e-1, warmup=24),
    "no_warmup": Example(lr=2e-2, warmup=0),
}


def trained() -> dict[str, Run]:
    """What each of the runs has recorded; prints what it has learned."""
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "report")
        asked = ["--quick", "--device", "cpu", "--steps", str(STEPS), "--output", output]
        settings = options.resolve(parser.parse_args(asked), parser)
        data = prepare_data(settings)
        base = prepare_base(settings, data)
        runs = {}
        for name, example in EXAMPLES.items():
            changed = replace(settings, lr=example.lr, warmup=example.warmup)
            result = finetune(DemoRun(name), changed, data, base, Path(folder), save=False)
            print(f"{name}: held-out loss on code {base.code:.3f} before, {result.code:.3f} after")
            runs[name] = Run(name.replace("_", " "), result.recording)
    return runs


def main() -> None:
    """Write a picture per run, `recorded_NAME.png`, and print what the report says of it."""
    FOLDER.mkdir(exist_ok=True)
    for name, run in trained().items():
        path = FOLDER / f"recorded_{name}.png"
        # a third of the bytes, and nobody sees the difference
        Image.open(BytesIO(picture.png([run]))).quantize(64).save(path, optimize=True)
        print(path.name, f"{path.stat().st_size:,} bytes")
        for sentence in unusual(run) or ["nothing unusual"]:
            print(f"  {sentence}")


if __name__ == "__main__":
    sys.exit(main())
