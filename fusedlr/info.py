"""`fusedlr info`: versions, devices and backends for a bug report; and the cache of compiled CUDA kernels."""

from __future__ import annotations

import argparse
import os
import platform
import time
from importlib import metadata

from fusedlr import __version__

# what a bug report should name
_PACKAGES = ("torch", "triton", "transformers", "accelerate", "peft", "numpy")
# they change what runs, and are easily forgotten in a shell; others hold paths
_VARIABLES = ("FUSEDLR_BACKEND", "FUSEDLR_CPU_ISA", "TRITON_INTERPRET")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `info` takes."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the CUDA kernels now and keep them, for the GPUs here or for --arch; needs no GPU",
    )
    parser.add_argument("--arch", metavar="SM", help="with --compile, for which GPUs: sm_90 for 9.0, say")
    parser.add_argument("--clear", action="store_true", help="remove the CUDA kernels that have been kept")


def run(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Print what is asked for, and do what is asked of the compiled kernels."""
    if args.arch is not None and not args.compile:
        parser.error("argument --arch: it says what --compile compiles for")
    if args.clear:
        clear()
    if args.compile:
        for arch in [args.arch] if args.arch is not None else _archs_here(parser):
            compile_for(arch, parser)
    if not (args.clear or args.compile):
        print(text())
    return 0


def clear() -> None:
    """Remove the compiled kernels, and say how many there were."""
    from fusedlr.backends.gpu.cache import Cache

    cache = Cache.of_user()
    size = cache.size()
    print(f"removed {cache.clear()} files of compiled kernels, {size / 2**20:.1f} MiB, from {cache.folder}")


def compile_for(arch: str, parser: argparse.ArgumentParser) -> None:
    """Compile the kernels for an architecture, by the NVRTC that would be used and knows it."""
    from fusedlr.backends.gpu import kernels, nvrtc
    from fusedlr.backends.gpu.cache import Cache

    if not nvrtc.found():
        parser.error("argument --compile: there is no NVRTC here: pip install nvidia-cuda-nvrtc")
    # the NVRTC that would be used comes first, and stays where several know an architecture
    known = {
        f"sm_{at}": each for each in reversed(nvrtc.found()) for at in each.archs if at >= kernels.MIN_ARCH
    }
    if arch not in known:
        names = sorted(known, key=lambda name: int(name.removeprefix("sm_")))
        parser.error(f"argument --arch: {arch} is none of {', '.join(names)}")
    using, begun = known[arch], time.perf_counter()
    for size in kernels.SIZES:
        kernels.images(using, arch, size)
    where = Cache.of_user().where()
    print(f"kernels for {arch}, by NVRTC {using}: ready after {time.perf_counter() - begun:.1f} s; {where}")


def _archs_here(parser: argparse.ArgumentParser) -> list[str]:
    """What the kernels have to be compiled for on the GPUs of this machine."""
    import torch

    from fusedlr.backends import compiled
    from fusedlr.backends.gpu import cuda

    if compiled.cuda is None or not torch.cuda.is_available():
        parser.error("argument --compile: torch sees no NVIDIA GPU here: name one with --arch, sm_90 say")
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    archs = {cuda.target_of(device)[1] for device in devices if cuda.why_not([device]) is None}
    if not archs:
        parser.error(f"argument --compile: {cuda.why_not(devices[:1])}")
    return sorted(archs)


def text() -> str:
    """Versions, devices, and for every device which backend runs there and why the others do not."""
    import torch

    from fusedlr import backends
    from fusedlr.backends import cpu
    from fusedlr.backends.gpu import cuda

    lines = [f"fusedlr {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"{name} {installed_version(name) or 'not installed'}" for name in _PACKAGES]
    lines.append(
        f"torch was built for CUDA {torch.version.cuda or 'none'}, ROCm {torch.version.hip or 'none'}"
    )
    lines += [f"{name}={os.environ[name]}" for name in _VARIABLES if name in os.environ]
    lines.append(
        f"CPU threads {torch.get_num_threads()}, OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    )
    devices = [torch.device("cpu")]
    if cpu.why_not(devices) is None:
        threads = "with OpenMP" if cpu.openmp() else "without OpenMP: one thread"
        lines.append(f"C++ kernel {threads}; instruction set {cpu.isa()} of {', '.join(cpu.isas())}")
    for i in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(i)
        capability = f"compute capability {gpu.major}.{gpu.minor}"
        lines.append(f"cuda:{i} {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, {capability}")
        devices.append(torch.device("cuda", i))
        target = cuda.target_of(devices[-1]) if cuda.why_not([devices[-1]]) is None else ""
        if not isinstance(target, str):
            lines.append(f"  its CUDA kernels are compiled for {target[1]} by NVRTC {target[0]}")
    for device in devices:
        try:
            lines.append(f"on {device}: backend {backends.choose('auto', [device]).name}")
        except (RuntimeError, ValueError) as error:
            lines.append(f"on {device}: no backend: {error}")
        lines += [f"  {name}: {why}" for name, why in backends.reasons([device]).items() if why]
    if len(devices) > 1:
        lines.append("float64 tensors on a GPU run through the reference step")
    return "\n".join([*lines, *_kernels()])


def _kernels() -> list[str]:
    """What compiles the CUDA kernels, and what has been compiled."""
    from fusedlr.backends.gpu import nvrtc
    from fusedlr.backends.gpu.cache import Cache

    found, cache = nvrtc.found(), Cache.of_user()
    lines = [f"CUDA kernels are compiled by NVRTC {' or '.join(map(str, found)) or '(there is none)'}"]
    why, count = cache.why_not(), len(cache.entries())
    kept = f"{count} files, {cache.size() / 2**20:.1f} MiB" if why is None else f"not kept: {why}"
    return [*lines, f"compiled kernels: {kept}"]


def installed_version(package: str) -> str | None:
    """The version of a package, None if it is not installed; of torch also which build it is.

    >>> import torch
    >>> installed_version("torch") == torch.__version__
    True
    """
    if package == "torch":
        import torch

        # the metadata of a wheel from an index leaves out the build, such as +cu130
        return str(torch.__version__)
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
