"""Eight peak learning rates in one run: eight LoRA adapters over one small base, one optimizer, one step.

Each adapter has its own peak, warm-up and schedule. The same runs are then made one after another, with an
optimizer each, and compared. Base and texts are those of `fusedlr demo`, made on this machine: nothing is
downloaded. `python examples/many_adapters.py --help` for the options.
"""

from __future__ import annotations

import json
import math
import statistics
import textwrap
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import get_scheduler, set_seed
from transformers.utils.logging import disable_progress_bar

import fusedlr
from fusedlr.arguments import number
from fusedlr.chart import Scale, chart
from fusedlr.console import Parser, add_device, aligned, nearest_folder, temporary_folder
from fusedlr.demo import add_arguments
from fusedlr.demo.base import build_model, held_out_loss, prepare_base, to_tokens
from fusedlr.demo.files import publish
from fusedlr.demo.options import SCHEDULES, default_cache, resolve
from fusedlr.demo.progress import bar
from fusedlr.demo.tokens import prepare_data
from fusedlr.lora import adapter_groups

MAX_GRAD_NORM = 1.0
WEIGHT_DECAY = 0.01
LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
# the ways to train all of them, which are rows of the tables
TOGETHER, ALONE, STOCK = "all in one run", "one by one, fusedlr", "one by one, stock"
# what an update is timed by
PHASES = ("set_adapter", "forward, backward", "optimizer")


@dataclass(frozen=True)
class Trial:
    """One adapter and how it is trained; its settings have its peak, warm-up and schedule."""

    name: str
    settings: object

    @property
    def options(self):
        """What `adapter_groups` takes."""
        return {
            "lr": self.settings.lr,
            "schedule": self.settings.own_schedule(),
            "max_grad_norm": MAX_GRAD_NORM,
            "weight_decay": WEIGHT_DECAY,
        }


class StockOptimizer:
    """What one adapter takes without fusedlr: clipping, AdamW and a scheduler."""

    def __init__(self, model, settings):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.adamw = torch.optim.AdamW(self.params, lr=settings.lr, weight_decay=WEIGHT_DECAY, fused=True)
        self.scheduler = get_scheduler(
            settings.schedule,
            self.adamw,
            settings.warmup,
            settings.steps,
            scheduler_specific_kwargs=settings.schedule_arguments(),
        )
        self.state, self.zero_grad = self.adamw.state, self.adamw.zero_grad

    def step(self):
        torch.nn.utils.clip_grad_norm_(self.params, MAX_GRAD_NORM)
        self.adamw.step()
        self.scheduler.step()


class Clock:
    """Seconds spent in each call of each phase; a GPU is waited for at both ends."""

    def __init__(self, device):
        self.device, self.seconds = device, defaultdict(list)

    @contextmanager
    def __call__(self, phase):
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds[phase].append(time.perf_counter() - began)

    def _wait(self):
        if self.device == "cuda":
            torch.cuda.synchronize()

    def per_update(self, updates):
        """Milliseconds of an update of all adapters per phase: the median call times the calls."""
        return {
            phase: 1e3 * statistics.median(calls) * len(calls) / updates
            for phase, calls in self.seconds.items()
        }


def fused_optimizer(model, trials):
    return fusedlr.FusedAdamW(adapter_groups(model, {trial.name: trial.options for trial in trials}))


def lora_model(base, trials):
    """The base with an adapter per trial, each with the first values that it has alone."""
    settings = trials[0].settings
    model = build_model(settings)
    model.load_state_dict(base.weights)
    for i, trial in enumerate(trials):
        set_seed(settings.seed)
        if i == 0:
            model = get_peft_model(model, LORA, adapter_name=trial.name)
        else:
            model.add_adapter(trial.name, LORA)
    return model


def draw_batches(data, settings):
    """The micro-batches that every adapter sees, in this order."""
    examples = data.blocks["code_train"]
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randint(len(examples), (settings.steps, settings.size.batch), generator=generator)
    return [to_tokens(examples[rows.numpy()], settings.device) for rows in chosen]


def train(model, trials, optimizer, batches, clock, progress):
    """Every adapter on every batch; returns the bytes held before the last step."""
    for tokens in batches:
        losses = []
        for trial in trials:
            if len(trials) > 1:
                with clock("set_adapter"):
                    model.set_adapter(trial.name)
            with clock("forward, backward"):
                loss = model(input_ids=tokens, labels=tokens).loss
                loss.backward()
            losses.append(loss.detach())
            progress.update()
        held = bytes_held(model, optimizer) if tokens is batches[-1] else {}
        with clock("optimizer"):
            optimizer.step()
            optimizer.zero_grad()
        progress.set_postfix_str(f"best loss {torch.stack(losses).min().item():.3f}", refresh=False)
    return held


def bytes_held(model, optimizer):
    """Bytes of tensors by what they are, without activations, which one micro-batch has at a time."""
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    everything = sum(p.nbytes for p in model.parameters())
    return {
        "base": everything - sum(p.nbytes for p in adapters),
        "adapters": sum(p.nbytes for p in adapters),
        "gradients": sum(p.grad.nbytes for p in adapters if p.grad is not None),
        "moments": sum(x.nbytes for state in optimizer.state.values() for x in state.values()),
    }


def measure(model, trials, data):
    """Held-out loss and weights of every adapter, under the names that they have without the adapter's."""
    losses, weights = [], []
    for trial in trials:
        model.set_adapter(trial.name)
        losses.append(held_out_loss(model, data.blocks["code_held_out"], trial.settings, trial.name))
        own = get_peft_model_state_dict(model, adapter_name=trial.name, save_embedding_layers=False)
        weights.append({name: x.detach().cpu().clone() for name, x in own.items()})
    return losses, weights


def run(way, trials, base, data, batches):
    """Train all trials in one of the ways; returns what came out and what it took."""
    clock = Clock(trials[0].settings.device)
    found = {"losses": [], "weights": [], "held": {}}
    began = time.perf_counter()
    runs = [trials] if way == TOGETHER else [[trial] for trial in trials]
    with bar(label=way, total=len(trials) * len(batches)) as progress:
        for some in runs:
            model = lora_model(base, some)
            if way == STOCK:
                optimizer = StockOptimizer(model, some[0].settings)
            else:
                optimizer = fused_optimizer(model, some)
            held = train(model, some, optimizer, batches, clock, progress)
            # one after another: the largest of the runs counts
            found["held"] = max(found["held"], held, key=lambda sizes: sum(sizes.values()))
            losses, weights = measure(model, some, data)
            found["losses"] += losses
            found["weights"] += weights
    found["seconds"] = time.perf_counter() - began
    found["ms"] = clock.per_update(len(batches))
    # of the only model in which all adapters are
    found["model"] = model
    return found


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a, b):
    """Mean absolute difference of a weight."""
    return torch.cat([(a[name] - b[name]).abs().flatten() for name in a]).mean().item()


def loss_table(trials, results):
    """Held-out losses, and how far the weights of the one run are from those of the others."""
    together, alone, stock = (results[way] for way in (TOGETHER, ALONE, STOCK))
    rows = [
        [
            "peak rate",
            "schedule",
            "warm-up",
            "held-out loss",
            "alone",
            "weights differ",
            "stock",
            "weights differ",
        ]
    ]
    for i, trial in enumerate(trials):
        weights = together["weights"][i]
        rows.append(
            [
                f"{trial.settings.lr:.2e}",
                trial.settings.schedule,
                str(trial.settings.warmup),
                f"{together['losses'][i]:.5f}",
                f"{alone['losses'][i]:.5f}",
                "no bit" if same_bits(weights, alone["weights"][i]) else "YES",
                f"{stock['losses'][i]:.5f}",
                f"{distance(weights, stock['weights'][i]):.1e}",
            ]
        )
    return aligned(rows)


def cost_tables(results):
    """Time by what it was spent on, and megabytes by what they hold."""
    times = [["ms per update of all (medians)", *PHASES, "together", "whole run, s"]]
    sizes = [["MB", *results[TOGETHER]["held"], "together"]]
    for way, result in results.items():
        spent = [result["ms"].get(phase, 0.0) for phase in PHASES]
        times.append([way, *(f"{x:.2f}" for x in [*spent, sum(spent), result["seconds"]])])
        held = [size / 1e6 for size in result["held"].values()]
        sizes.append([way, *(f"{x:.2f}" for x in [*held, sum(held)])])
    return [*aligned(times), "", *aligned(sizes)]


def what_it_means(trials, results):
    """The two tables of costs in words."""
    optimizer = {way: result["ms"]["optimizer"] for way, result in results.items()}
    more = sum(results[TOGETHER]["held"].values()) - sum(results[ALONE]["held"].values())
    base = results[TOGETHER]["held"]["base"]
    said = (
        "Forward and backward are the same work in every row, one adapter and one micro-batch at a time: "
        f"what differs there is noise. One run makes one step for all adapters, {optimizer[TOGETHER]:.2f} "
        f"ms, where one by one it is a step for each of {len(trials)}, {optimizer[ALONE]:.2f} ms "
        f"with fusedlr and {optimizer[STOCK]:.2f} ms with stock AdamW; but PEFT takes "
        f"{results[TOGETHER]['ms']['set_adapter']:.2f} ms to switch between adapters. The one run holds "
        f"{more / 1e6:.2f} MB more than one run after another: weights, gradients and moments of the other "
        f"adapters. As many runs at once would hold {(len(trials) - 1) * base / 1e6:.2f} MB more of bases."
    )
    return textwrap.wrap(said, 100)


def terminal_picture(trials, losses):
    """Held-out loss over the logarithm of the peak rate, in lines of text."""
    points = [
        (math.log10(trial.settings.lr), loss)
        for trial, loss in zip(trials, losses, strict=True)
        if math.isfinite(loss)
    ]
    xs, ys = zip(*points, strict=True)
    room = 0.05 * (max(ys) - min(ys)) or 0.1
    scale = Scale(min(xs), max(xs), min(ys) - room, max(ys) + room)
    dots = [("O", [point]) for point in points]
    end = f"{max(xs):.3g} (log10 of the peak rate)"
    return ["held-out loss", *chart([*dots, (".", points)], scale, 72, 12, end)]


def draw(trials, losses, before, path):
    """The same as a PNG, if matplotlib is here."""
    try:
        import matplotlib
    except ImportError:
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    peaks = [trial.settings.lr for trial in trials]
    axes.plot(peaks, losses, marker="o", label="after training")
    axes.plot(peaks[losses.index(min(losses))], min(losses), marker="*", markersize=15, label="best")
    axes.axhline(before, linestyle=":", color="grey", label="the base alone")
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="held-out loss (nats per token)")
    axes.set_title(f"{len(trials)} adapters, trained in one run with one optimizer")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def save_best(model, trial, data, folder):
    """Save the adapter as a PEFT folder and its base, load both again; returns their held-out loss."""
    scratch = folder.with_name("peft")
    # PEFT makes a folder per adapter, under its name
    model.save_pretrained(scratch, selected_adapters=[trial.name], save_embedding_layers=False)
    (scratch / trial.name).rename(folder / "adapter")
    base = model.unload()
    base.save_pretrained(folder / "base")
    again = PeftModel.from_pretrained(type(base).from_pretrained(folder / "base"), folder / "adapter")
    again.to(trial.settings.device)
    return held_out_loss(again, data.blocks["code_held_out"], trial.settings, "loaded again")


def parse(argv):
    """The settings of every trial."""
    parser = Parser(prog="many_adapters.py", description=__doc__.split("\n")[0])
    add, count = parser.add_argument, number(int, 2, 1_000_000)
    rate = number(float, 0, 1e6, above=True)
    add("--adapters", type=number(int, 2, 64), default=8, metavar="N", help="(default: %(default)s)")
    add("--lowest", type=rate, default=5e-4, metavar="X", help="lowest peak (default: %(default)s)")
    add("--highest", type=rate, default=6.4e-2, metavar="X", help="highest peak (default: %(default)s)")
    add(
        "--schedule",
        nargs="+",
        choices=SCHEDULES,
        default=["cosine"],
        metavar="NAME",
        help="transformers' names, which the adapters take in turns (default: cosine)",
    )
    add("--updates", type=count, metavar="N", help="per adapter (default: 40, or 4 with --quick)")
    add("--quick", action="store_true", help="a base hardly trained, and 4 updates: only to see that it runs")
    add_device(parser, "train")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help="(default: %(default)s)")
    add("--output", type=Path, default=Path("fusedlr-adapters"), metavar="DIR", help="(default: %(default)s)")
    add(
        "--cache", type=Path, default=default_cache(), metavar="DIR", help="of tokens and base, as the demo's"
    )
    args = parser.parse_args(argv)
    if args.lowest >= args.highest:
        parser.error(f"argument --lowest: {args.lowest:g} must be below --highest {args.highest:g}")
    wanted = [f"--{name}={getattr(args, name)}" for name in ("device", "seed", "output", "cache")]
    steps = args.updates or (4 if args.quick else 40)
    wanted += ["--size=quick", f"--steps={steps}", *(["--base-steps=10"] if args.quick else [])]
    demo = Parser(prog=parser.prog)
    add_arguments(demo)
    settings = resolve(demo.parse_args(wanted), demo)
    trials = []
    for i in range(args.adapters):
        share = i / (args.adapters - 1)
        # a higher peak is approached more slowly: over 5% to 30% of the updates
        own = replace(
            settings,
            lr=args.lowest * (args.highest / args.lowest) ** share,
            warmup=max(1, round(steps * (0.05 + 0.25 * share))),
            schedule=args.schedule[i % len(args.schedule)],
        )
        trials.append(Trial(f"rate_{i + 1}", own))
    return settings, trials


def main(argv: list[str] | None = None) -> dict:
    began = time.perf_counter()
    # of loading and saving a model, which takes no time here
    disable_progress_bar()
    settings, trials = parse(argv)
    data = prepare_data(settings)
    base = prepare_base(settings, data)
    batches = draw_batches(data, settings)
    # what a process does once is no way's time
    warm = lora_model(base, trials[:1])
    with bar(label="warming up", total=1, keep=False) as progress:
        train(warm, trials[:1], fused_optimizer(warm, trials[:1]), batches[:1], Clock("cpu"), progress)
    results = {way: run(way, trials, base, data, batches) for way in (TOGETHER, ALONE, STOCK)}
    losses = results[TOGETHER]["losses"]
    best = losses.index(min(filter(math.isfinite, losses)))
    report = {
        "peaks": [trial.settings.lr for trial in trials],
        "best": best,
        "loss_before": base.code,
        "same_bits": [
            same_bits(*pair)
            for pair in zip(*(results[way]["weights"] for way in (TOGETHER, ALONE)), strict=True)
        ],
        **{
            way: {key: result[key] for key in ("losses", "ms", "seconds", "held")}
            for way, result in results.items()
        },
    }
    with temporary_folder(nearest_folder(settings.output)) as folder:
        staged = folder / "report"
        staged.mkdir()
        report["loss_loaded"] = save_best(results[TOGETHER]["model"], trials[best], data, staged)
        draw(trials, losses, base.code, staged / "losses.png")
        (staged / "report.json").write_text(json.dumps(report, indent=2) + "\n")
        publish(staged, settings.output)
    paragraphs = (
        loss_table(trials, results),
        terminal_picture(trials, losses),
        cost_tables(results),
        what_it_means(trials, results),
        [
            f"The best peak is {trials[best].settings.lr:.2e}: held-out loss {losses[best]:.5f}, "
            f"{base.code:.5f} before training,",
            f"and {report['loss_loaded']:.5f} when loaded again from {settings.output / 'adapter'}.",
            f"{time.perf_counter() - began:.0f} s in all",
        ],
    )
    for lines in paragraphs:
        print("\n".join(["", *lines]))
    return report


if __name__ == "__main__":
    main()
