"""The lines to paste for a schedule: for fusedlr, transformers' TrainingArguments and torch's schedulers.

The page docs/explore.md shows them. tests/schedule/test_snippets.py runs them and compares every update.
"""

from __future__ import annotations

import inspect
from typing import Any

from fusedlr.schedule.constructors import CONSTRUCTORS
from fusedlr.schedule.convert import TRANSFORMERS
from fusedlr.schedule.describe import warmup_steps
from fusedlr.schedule.schedule import Schedule
from fusedlr.schedule.spec import Spec

# LinearLR refuses to start at 0; this share of the peak is as good as nothing
_NEARLY_0 = 1e-9


def snippets(one: Spec, schedule: Schedule, peak: float) -> dict[str, str]:
    """A title and a piece of Python for each way to get the schedule.

    Args:
        one: the call, as the user gives it.
        schedule: what it builds.
        peak: peak learning rate.

    >>> from fusedlr.schedule.spec import parse
    >>> one = parse("linear(warmup_steps=10, total_steps=100)")
    >>> print(snippets(one, one.build(), 2e-4)["TrainingArguments"])
    from transformers import TrainingArguments
    <BLANKLINE>
    args = TrainingArguments(
        learning_rate=0.0002,
        lr_scheduler_type='linear',
        warmup_steps=10,
        max_steps=100,
    )
    """
    parameters = inspect.signature(CONSTRUCTORS[one.name]).parameters
    # what an argument does by default needs no words
    given = {name: value for name, value in one.given.items() if value != parameters[name].default}
    if one.name in ("linear", "cosine", "cosine_with_restarts") and given.get("min_lr_ratio") == 0:
        del given["min_lr_ratio"]
    return {
        "fusedlr": _fusedlr(one, peak),
        "TrainingArguments": _transformers(one, given, schedule, peak),
        "torch": _torch(one, given, schedule, peak),
    }


def _fusedlr(one: Spec, peak: float) -> str:
    return (
        "import fusedlr\n\n"
        f"schedule = fusedlr.{one.text}\n"
        f"optimizer = fusedlr.FusedAdamW(model.parameters(), lr={peak!r}, schedule=schedule)\n"
    )


def _transformers(one: Spec, given: dict[str, Any], schedule: Schedule, peak: float) -> str:
    """Arguments of the Trainer that give this schedule, or how to hand it over where it has no such."""
    name = one.name
    if name == "cosine" and ("min_lr_ratio" in given or "min_lr" in given):
        name = "cosine_with_min_lr"
    renamed = {ours: theirs for theirs, ours in TRANSFORMERS[name][1].items()} if name in TRANSFORMERS else {}
    shared = {"warmup_steps", "total_steps"}
    kwargs = {renamed[key]: value for key, value in given.items() if key in renamed and key not in shared}
    if name not in TRANSFORMERS or len(kwargs) < len(given.keys() - shared):
        length = "" if schedule.total_steps is None else f", max_steps={schedule.total_steps}"
        return (
            "# transformers has no such schedule: the Trainer takes fusedlr's\n"
            "from transformers import Trainer, TrainingArguments\n\n"
            f"{_fusedlr(one, peak)}"
            f"args = TrainingArguments(learning_rate={peak!r}{length})\n"
            "trainer = Trainer(model, args, optimizers=(optimizer, optimizer.scheduler))\n"
        )
    lines = [f"learning_rate={peak!r}", f"lr_scheduler_type={name!r}"]
    lines += [f"warmup_steps={given['warmup_steps']!r}"] if given.get("warmup_steps") else []
    lines += [f"max_steps={schedule.total_steps}"] if schedule.total_steps is not None else []
    lines += [f"lr_scheduler_kwargs={kwargs!r}"] if kwargs else []
    written = "".join(f"    {line},\n" for line in lines)
    return f"from transformers import TrainingArguments\n\nargs = TrainingArguments(\n{written})\n"


def _torch(one: Spec, given: dict[str, Any], schedule: Schedule, peak: float) -> str:
    """torch's own classes where they give this schedule, else a LambdaLR of fusedlr's."""
    warmup = warmup_steps(schedule)
    after = _after_warmup(one.name, given, (schedule.total_steps or 0) - warmup, peak)
    optimizer = f"optimizer = torch.optim.AdamW(model.parameters(), lr={peak!r})\n"
    if after is None:
        ratio = (
            "schedule.lr_at" if schedule.resolve(peak) is schedule else f"schedule.resolve({peak!r}).lr_at"
        )
        return (
            f"import fusedlr\nimport torch\n\nschedule = fusedlr.{one.text}\n{optimizer}"
            f"scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, {ratio})\n"
        )
    top = f"import torch\nfrom torch.optim import lr_scheduler\n\n{optimizer}"
    if not warmup:
        return f"{top}scheduler = lr_scheduler.{after}\n"
    first, remark = given.get("warmup_from", 0.0), ""
    if first == 0:
        first, remark = _NEARLY_0, "# LinearLR may not start at 0\n"
    return (
        f"{top}{remark}"
        f"warmup = lr_scheduler.LinearLR(optimizer, {first!r}, 1.0, {warmup})\n"
        f"after = lr_scheduler.{after}\n"
        f"scheduler = lr_scheduler.SequentialLR(optimizer, [warmup, after], [{warmup}])\n"
    )


def _after_warmup(name: str, given: dict[str, Any], steps: int, peak: float) -> str | None:
    """torch's scheduler for the updates after the warm-up, None where it has none."""
    own = given.keys() - {"warmup_steps", "total_steps", "warmup_from"}
    if name in ("constant", "constant_with_warmup"):
        return "ConstantLR(optimizer, 1.0)"
    if steps <= 0:
        return None
    floor = given["min_lr"] / peak if "min_lr" in given else given.get("min_lr_ratio", 0.0)
    if name == "linear":
        return f"LinearLR(optimizer, 1.0, {floor!r}, {steps})"
    if name in ("cosine", "cosine_with_min_lr") and own <= {"min_lr", "min_lr_ratio"}:
        return f"CosineAnnealingLR(optimizer, {steps}, eta_min={floor * peak!r})"
    if name == "polynomial" and given.get("lr_end") == 0:
        return f"PolynomialLR(optimizer, {steps}, power={given.get('power', 1.0)!r})"
    return None
