"""One run of the demo from the options to the report: what happens in which order, and how it ends early."""

import argparse
import contextlib
import importlib
import importlib.util
import os
import signal
import sys
import threading
import time
import warnings
from dataclasses import asdict

from fusedlr.console import nearest_folder, temporary_folder
from fusedlr.demo.corpus import CorpusError
from fusedlr.demo.files import publish
from fusedlr.demo.options import resolve
from fusedlr.demo.settings import Settings

# import name: what the demo cannot do without
PACKAGES = ("transformers", "peft", "accelerate", "tokenizers", "matplotlib", "tqdm")
# module, or module:name where a module is loaded when its name is asked for; optimizers load the last one
LIBRARIES = (
    "tokenizers",
    "torch.utils.data",
    "transformers:LlamaForCausalLM",
    "transformers:Trainer",
    "peft",
    "matplotlib.pyplot",
    "fusedlr.optimizer",
    "torch._dynamo",
)
INTERRUPTED = 130  # 128 + SIGINT, as shells report it
MESSAGE = "interrupted; nothing is left half-written"


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Run the demo and return its exit code: 0, or 130 after Ctrl-C.

    Options that make no sense and missing packages end in `parser.error`: one line and exit code 2.
    """
    with _on_sigint(_leave):
        missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            parser.error(f"the demo needs {', '.join(missing)}: pip install 'fusedlr[demo]'")
        settings = resolve(args, parser)
        _load_libraries()
    try:
        with _on_sigint(_raise), warnings.catch_warnings():
            # transformers warns about its own calls
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            # which backend ran is a line of the table, and a warning would tear the progress bars apart
            warnings.filterwarnings("ignore", message="fusedlr runs its reference step")
            _demo(settings)
    except KeyboardInterrupt:
        print(f"\n{MESSAGE}", file=sys.stderr)
        return INTERRUPTED
    except (OSError, CorpusError) as error:
        # a full disk, or a Python without its sources
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return 0


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, as a class of its own.

    Where a plain KeyboardInterrupt has passed through `exec` (dataclasses use it), Python ends itself by
    SIGINT at exit even if the exception was caught, and the exit code is not ours.
    """


def _raise(*_):
    raise Interrupted


def _leave(*_):
    # while libraries load: some swallow the exception, others fail later, and nothing is written yet
    os.write(2, f"\n{MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def _on_sigint(handler):
    # not where SIGINT is ignored (a background job) or somebody else's, nor outside the main thread
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _load_libraries():
    """Import now what is used later, before anything is written."""
    _stay_offline()
    from fusedlr.demo.progress import bar

    for name in bar(LIBRARIES, label="loading libraries"):
        module, _, attribute = name.partition(":")
        getattr(importlib.import_module(module), attribute or "__name__")


def _stay_offline():
    """Nothing here needs a hub: everything is made on this machine."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    # its warnings are about loading models, and would tear the progress bars apart
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def _demo(settings: Settings) -> None:
    from fusedlr.demo import panel, skips
    from fusedlr.demo.base import prepare_base
    from fusedlr.demo.finetune import FOREACH, FUSEDLR, OFF_BY_ONE, STOCK, finetune
    from fusedlr.demo.plot import draw, draw_panel, draw_skip
    from fusedlr.demo.report import as_dict, as_values, table, to_json, write_recording
    from fusedlr.demo.tokens import prepare_data

    seconds = {}
    began = time.perf_counter()
    data = prepare_data(settings)
    seconds["data"] = time.perf_counter() - began
    base = prepare_base(settings, data)
    seconds["base"] = time.perf_counter() - began - seconds["data"]
    # the report is put together next to where it goes, so that it appears at once
    with temporary_folder(nearest_folder(settings.output)) as folder:
        finished, scratch = folder / "report", folder / "scratch"
        finished.mkdir()
        results = []
        for trained in (FUSEDLR, STOCK, FOREACH, *([OFF_BY_ONE] if settings.teeth else [])):
            save = trained in (FUSEDLR, STOCK)
            checkpoints = finished / "checkpoints" / trained.name if save else scratch
            results.append(finetune(trained, settings, data, base, checkpoints, save))
        skip = skips.demonstrate(settings.device)
        spent = time.perf_counter() - began
        schedules = {}
        no_panel = panel.left_out(settings, spent, results[0].seconds)
        if no_panel is None:
            schedules = panel.run(settings, data, base, scratch)
            draw_panel(schedules, panel.PEAK, finished / "schedules.png")
        seconds["total"] = time.perf_counter() - began
        values = as_dict(settings, base, results, seconds) | {"skip": asdict(skip)}
        values["schedules"] = {name: as_values(result) for name, result in schedules.items()}
        (finished / "report.json").write_text(to_json(values) + "\n")
        draw(results, settings.schedule, finished / "curves.png")
        draw_skip(skip, finished / "skip.png")
        recorded = write_recording(results, finished)
        publish(finished, settings.output)
    print()
    print(table(settings, base, results))
    print(f"\n{recorded}")
    print(f"\n{skips.table(skip)}")
    print(f"\n{no_panel or panel.table(schedules)}")
    print(f"\n{seconds['total']:.0f} s; report in {settings.output}")
