"""Does an installed fusedlr work here? Ten steps on every backend that runs, against stock torch.

smoke.sh runs it in a fresh environment. Without torch it tries what needs none: schedules and the module.
"""

import importlib.util
import os
import platform

import fusedlr
from fusedlr.schedule import SHAPES

STEPS = 10
# all in fp64: two correct roundings of ten steps differ by some 1e-15
TOLERANCE = 1e-12


def main():
    # the tree that this file is in must not be what is tried
    assert "site-packages" in fusedlr.__file__, fusedlr.__file__
    schedule = fusedlr.cosine(warmup_steps=3, total_steps=STEPS)
    name = f"Python {platform.python_version()}"
    if importlib.util.find_spec("torch") is None:
        print(f"{name}, no torch: {evaluate(schedule)}; no step was tried")
        return
    import torch

    from fusedlr import backends

    expected, rates = stock(schedule)
    for backend, why in backends.reasons([torch.device("cpu")]).items():
        result = (
            why or f"{STEPS} steps equal stock's, {compare(backend, schedule, expected, rates):.0e} apart"
        )
        print(f"{name}, torch {torch.__version__}, {backend}: {result}")


def evaluate(schedule):
    """The compiled module's schedule against the definition: its addresses of tensors need torch."""
    if importlib.util.find_spec("fusedlr._cpu") is None:
        assert os.environ.get("FUSEDLR_CPU") == "0", "the module was not built"
        return "schedules work, no module"
    from fusedlr import _cpu

    phases = [
        (p.begin, p.end, p.origin, p.from_, p.to, SHAPES.index(p.shape), p.shape_param)
        for p in schedule.phases
    ]
    rates = _cpu.Schedule(phases, []).rates(list(range(STEPS)), 1.0)
    assert all(abs(rate - schedule.lr_at(k)) < TOLERANCE for k, rate in enumerate(rates))
    return f"the module loads and evaluates a schedule; instruction sets {', '.join(_cpu.isas())}"


def model():
    import torch

    torch.manual_seed(0)
    layers = torch.nn.Linear(16, 300), torch.nn.Tanh(), torch.nn.Linear(300, 4)
    return torch.nn.Sequential(*layers).double(), torch.randn(STEPS, 8, 16, dtype=torch.float64)


def compare(backend, schedule, expected, rates):
    """Largest difference from stock's weights."""
    net, batches = model()
    optimizer = fusedlr.FusedAdamW(
        net.parameters(), lr=0.01, max_grad_norm=1.0, schedule=schedule, backend=backend
    )
    for batch, rate in zip(batches, rates, strict=True):
        net(batch).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert abs(optimizer.param_groups[0]["lr"] - rate) < TOLERANCE
    gap = max((p - q).abs().max().item() for p, q in zip(net.parameters(), expected, strict=True))
    assert optimizer.backend == backend and gap < TOLERANCE, gap
    return gap


def stock(schedule):
    """Weights and rates of torch's own clipping, AdamW and scheduler."""
    import torch

    net, batches = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.lr_at)
    rates = []
    for batch in batches:
        net(batch).square().sum().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return list(net.parameters()), rates


if __name__ == "__main__":
    main()
