"""The pictures: loss, learning rate and distance from stock over the updates, and a schedule after a skip."""

from pathlib import Path

from fusedlr.demo.finetune import FOREACH, FUSEDLR, OFF_BY_ONE, STOCK, Result
from fusedlr.demo.skips import Skip

# colours that stay apart for colour-blind readers (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"
# 900 pixels wide; three panels leave room for code on the README's first screen
WIDTH, PANEL, DPI = 9.0, 2.6, 100


def draw(results: list[Result], schedule: str, path: Path) -> None:
    """Write the picture of `results` to `path`, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = {result.run: result for result in results}
    ours, stock = runs[FUSEDLR], runs[STOCK]
    updates = range(1, len(stock.losses) + 1)
    figure, (losses, rates, gaps) = pyplot.subplots(
        3, 1, sharex=True, figsize=(WIDTH, 3 * PANEL), dpi=DPI, layout="constrained"
    )
    for axes, name in ((losses, "losses"), (rates, "lrs")):
        axes.plot(updates, getattr(stock, name), color=BLUE, linewidth=2, label="stock AdamW and scheduler")
        axes.plot(updates, getattr(ours, name), color=ORANGE, label="fusedlr", **_markers(len(updates)))
        axes.legend()
    losses.set_title("LoRA fine-tune, fusedlr against stock")
    losses.set_ylabel("training loss (nats per token)")
    rates.set_title(f"learning rate, {schedule}")
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))

    _gap(gaps, updates, runs.get(OFF_BY_ONE), stock, GREY, "stock, warm-up one update longer")
    _gap(gaps, updates, runs[FOREACH], stock, GREEN, "stock foreach", marker="x", markersize=5, linewidth=1)
    # every update, so that none of the differences is left out
    _gap(gaps, updates, ours, stock, ORANGE, "fusedlr", **_markers(len(updates)) | {"markevery": 1})
    # runs may agree in every bit, so the axis is linear below float32's resolution of the loss
    gaps.set_yscale("symlog", linthresh=1e-7)
    gaps.set_ylim(bottom=-2e-8)
    gaps.set_title("difference in training loss from the stock fused run")
    gaps.set_ylabel("difference (nats per token)")
    gaps.set_xlabel("update")
    gaps.legend()
    for axes in (losses, rates, gaps):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def draw_skip(skip: Skip, path: Path) -> None:
    """Write the picture of the rates around a skipped step to `path`, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(WIDTH, PANEL), dpi=DPI, layout="constrained")
    updates = range(1, len(skip.meant) + 1)
    axes.plot(updates, skip.meant, color=GREY, linewidth=1, label="meant")
    axes.plot(updates, skip.stock.rates, color=BLUE, linewidth=2, label="stock AdamW and scheduler")
    axes.plot(updates, skip.fusedlr.rates, color=ORANGE, label="fusedlr", **_markers(len(updates)))
    axes.set_title("learning rate of every update made; one step was skipped for an overflow")
    axes.set_xlabel("update")
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def draw_panel(results: dict[str, Result], peak: float, path: Path) -> None:
    """Write the picture of one run per schedule to `path`, a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, rates) = pyplot.subplots(
        2, 1, sharex=True, figsize=(WIDTH, 2 * PANEL), dpi=DPI, layout="constrained"
    )
    # where curves coincide the wider ones beneath stay visible
    styles = ((GREY, 4.5), (BLUE, 2.8), (ORANGE, 1.2))
    for (color, width), (name, result) in zip(styles, results.items(), strict=True):
        updates = range(1, len(result.losses) + 1)
        style = {"color": color, "linewidth": width}
        losses.plot(updates, result.losses, label=f"{name}: held-out {result.code:.3f}", **style)
        rates.plot(updates, result.lrs, label=name, **style)
    losses.set_title(f"three schedules at a high peak rate, {peak:g}")
    losses.set_ylabel("training loss (nats per token)")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_xlabel("update")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    pyplot.close(figure)


def _markers(count):
    """Open markers and no line, about 30 over the axis, so that a curve beneath stays visible."""
    return {
        "linestyle": "none",
        "marker": "o",
        "markersize": 6,
        "fillstyle": "none",
        "markevery": max(1, count // 30),
    }


def _gap(axes, updates, result, stock, color, label, **style):
    if result is None:
        return
    values = [abs(a - b) for a, b in zip(result.losses, stock.losses, strict=True)]
    axes.plot(updates, values, color=color, label=label, **style)
