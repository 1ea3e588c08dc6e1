"""Schedules run where there is neither torch nor numpy."""

from __future__ import annotations

import subprocess
import sys

from fusedlr.schedule import CONSTRUCTORS

CODE = """
import sys

# an import of either is an ImportError from here on
sys.modules["torch"] = sys.modules["numpy"] = None

from fusedlr import arguments, schedule
from fusedlr.schedule import curves, page, spec

needed = {
    "constant": {},
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr_ratio": 0.1},
    "warmup_stable_decay": {"decay_steps": 20},
    "table": {"fn": lambda k: 0.9**k, "total_steps": 100},
}
for name, build in schedule.CONSTRUCTORS.items():
    lengths = {} if name in ("constant", "table") else {"warmup_steps": 10, "total_steps": 100}
    built = build(**lengths, **needed.get(name, {}))
    assert 0 < built.lr_at(50, 1e-3) <= 1e-3
    assert "highest update" in built.describe(1e-3)
    assert curves.text({name: built}, 1e-3)
    resolved = built.resolve(1e-3)
    assert schedule.Schedule.from_numbers(resolved.to_numbers()) == resolved
assert schedule.from_hf("linear", 10, 100) == spec.parse("linear(10, num_training_steps=100)").build()
arguments.hyperparameters({"lr": 1e-3, "eps": 1e-8, "weight_decay": 0.0, "betas": (0.9, 0.999)})
shown = page.show("schedule=cosine(10,+100)&reading=literal")
assert not shown["problems"] and len(shown["curves"]) == 2
print(*schedule.CONSTRUCTORS)
"""


def test_every_constructor_without_torch_and_numpy() -> None:
    run = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == list(CONSTRUCTORS)
