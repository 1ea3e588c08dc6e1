"""The CUDA kernels are compiled for the GPU at hand, by an NVRTC that its driver understands, and once."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fusedlr.backends import compiled
from fusedlr.backends.gpu import cache, cuda, kernels, nvrtc
from fusedlr.backends.gpu.cache import Cache
from fusedlr.backends.gpu.nvrtc import Compiled, CompileError

needs_nvrtc = pytest.mark.skipif(not nvrtc.found(), reason="there is no NVRTC")
ENTRY = Compiled(b"\n\0code\n" * 100, {"a<b>": "_Za"}, "")


class Library(NamedTuple):
    """What is asked of an NVRTC before it compiles."""

    version: tuple[int, int]
    archs: list[int]

    def __str__(self) -> str:
        return f"{self.version[0]}.{self.version[1]}"


CUDA_12 = Library((12, 8), [70, 75, 80, 86, 89, 90, 100, 120])
CUDA_13 = Library((13, 0), [75, 80, 86, 89, 90, 100, 120])


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    """An empty cache, which is the user's."""
    monkeypatch.setenv("FUSEDLR_CACHE", str(tmp_path / "kept"))
    return Cache.of_user()


# what is compiled for


@pytest.mark.parametrize(
    ("capability", "driver", "libraries", "expected"),
    (
        (75, 13000, [CUDA_13], "sm_75"),
        (90, 13010, [CUDA_13], "sm_90"),
        # machine code runs on later GPUs of the same major version
        (87, 13000, [CUDA_13], "sm_86"),
        (121, 13000, [CUDA_13], "sm_120"),
        # the driver compiles PTX for a GPU that came later
        (130, 13000, [CUDA_13], "compute_120"),
        # whichever NVRTC the driver can use
        (90, 12040, [CUDA_13, CUDA_12], "sm_90"),
        (90, 12000, [CUDA_12], "sm_90"),
    ),
)
def test_a_gpu_gets_what_it_runs(capability: int, driver: int, libraries: list[Any], expected: str) -> None:
    library, arch = kernels.target(capability, driver, libraries)
    assert arch == expected
    assert library.version[0] <= driver // 1000  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("capability", "driver", "libraries", "words"),
    (
        (90, 13000, [], "there is no NVRTC: torch for CUDA brings one"),
        (70, 13000, [CUDA_12], "this GPU has compute capability 7.0, the kernels need 7.5"),
        (90, 12090, [CUDA_13], "the driver is for CUDA 12.9, which runs nothing that NVRTC 13.0 compiles"),
        # PTX is for drivers as new as what made it
        (130, 12070, [CUDA_12], "no NVRTC here knows compute capability 13.0: 12.8 knows up to 12.0"),
    ),
)
def test_what_cannot_be_compiled_for_is_said(
    capability: int, driver: int, libraries: list[Any], words: str
) -> None:
    found = kernels.target(capability, driver, libraries)
    assert isinstance(found, str) and words in found


@pytest.mark.parametrize(
    ("library", "driver", "many"),
    ((CUDA_13, 13000, True), (CUDA_12, 12010, True), (CUDA_12, 12000, False)),
)
def test_larger_launches_are_for_drivers_that_know_them(library: Any, driver: int, many: bool) -> None:
    assert kernels.launches_many.__wrapped__(library, driver) is many


def test_the_header_names_the_smallest_and_largest_launches() -> None:
    if compiled.cuda is None:
        pytest.skip(str(compiled.cuda_error))
    assert (compiled.cuda.few, compiled.cuda.many) == (492, 4075)


# NVRTC


@needs_nvrtc
def test_what_does_not_compile_is_shown() -> None:
    words = r"(?s)NVRTC \d+\.\d+ could not compile for sm_90: .*identifier \"wrong\""
    with pytest.raises(CompileError, match=words):
        nvrtc.found()[0].compile("wrong x;", "sm_90", (), {})
    with pytest.raises(CompileError, match="invalid value for --gpu-architecture"):
        nvrtc.found()[0].compile("", "sm_1", (), {})


def test_a_file_that_is_no_nvrtc_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "nvidia" / "cu99" / "lib"
    folder.mkdir(parents=True)
    (folder / "libnvrtc.so.99").write_text("no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(folder / "libnvrtc.so.99") in list(nvrtc._paths())
    assert [str(each) for each in nvrtc.found.__wrapped__()] == [str(each) for each in nvrtc.found()]


@needs_nvrtc
def test_the_nvrtc_of_torchs_cuda_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for own in sorted({each.version[0] for each in nvrtc.found()}):
        monkeypatch.setattr(torch.version, "cuda", f"{own}.0")
        assert nvrtc.found.__wrapped__()[0].version[0] == own


def test_all_that_kernels_include_is_part_of_the_key() -> None:
    text, headers = kernels.sources()
    names = {
        "step.h",
        "../adamw.h",
        "../guard.h",
        "schedule.h",
        "../types.h",
        "columns.h",
        "cmath",
        "cstdint",
        "cstring",
    }
    assert set(headers) == names
    key = cache.key_of(text, headers, "sm_90")
    for name in headers:
        assert cache.key_of(text, {**headers, name: headers[name] + " "}, "sm_90") != key
    assert len({key, cache.key_of(text + " ", headers, "sm_90"), cache.key_of(text, headers, "sm_80")}) == 3


# the cache


def test_an_entry_comes_back_as_it_was(kept: Cache) -> None:
    assert kept.read("a") is None and kept.entries() == []
    assert kept.write("a", ENTRY)
    assert kept.read("a") == ENTRY
    assert kept.folder is not None and kept.folder.stat().st_mode & 0o777 == 0o700
    # nothing of the writing is left
    assert [path.name for path in kept.folder.iterdir()] == ["a.kernels"]


@pytest.mark.parametrize("length", (0, 10, 70, 200, -1))
def test_a_damaged_entry_is_not_used(kept: Cache, length: int) -> None:
    kept.write("a", ENTRY)
    (path,) = kept.entries()
    content = path.read_bytes()
    path.write_bytes(content[:length])
    assert kept.read("a") is None
    flipped = bytearray(content)
    flipped[length] ^= 1
    path.write_bytes(bytes(flipped))
    assert kept.read("a") is None
    assert kept.write("a", ENTRY) and kept.read("a") == ENTRY


def test_what_others_may_have_written_is_not_used(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.write("a", ENTRY)
    assert kept.folder is not None
    kept.folder.chmod(0o770)
    assert kept.read("a") is None and not kept.write("b", ENTRY)
    assert kept.where() == "they are not kept: other users can write to its folder"
    kept.folder.chmod(0o700)
    assert kept.read("a") == ENTRY
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert kept.read("a") is None and not kept.write("b", ENTRY)
    assert kept.where() == "they are not kept: its folder belongs to another user"


def test_a_disk_that_takes_nothing_costs_the_cache_alone(
    kept: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        assert not kept.write("a", ENTRY)
    assert kept.folder is not None and list(kept.folder.iterdir()) == []
    blocked = Cache(kept.folder / "file" / "below")
    (kept.folder / "file").write_text("")
    assert not blocked.write("a", ENTRY) and blocked.read("a") is None
    assert Cache(kept.folder / "file").where() == "they are not kept: a file is in the place of its folder"


def test_without_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv("FUSEDLR_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    found = Cache.of_user()
    assert found.read("a") is None and not found.write("a", ENTRY) and found.clear() == 0
    assert "set FUSEDLR_CACHE" in found.where()


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    kept = Cache(tmp_path / "kept", limit=3 * (len(ENTRY.image) + 90))
    for age, name in enumerate("cba"):
        kept.write(name, ENTRY)
        os.utime(tmp_path / "kept" / f"{name}.kernels", (age, age))
    # used again
    assert kept.read("c") == ENTRY
    kept.write("d", ENTRY)
    assert {path.stem for path in kept.entries()} == {"a", "c", "d"}
    (tmp_path / "kept" / "somebody's").write_text("")
    assert kept.clear() == 3
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["somebody's"]


# both together


@needs_nvrtc
def test_kernels_are_compiled_once(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    library = nvrtc.found()[0]
    made = kernels.images(library, "sm_90", "few")
    assert {name: list(one.names) for name, one in made.items()} == {
        name: kernels.kernel_names(name, "few") for name in kernels.TYPES
    }
    assert all(one.image.startswith(b"\x7fELF") for one in made.values())
    monkeypatch.setattr(kernels, "compile_", None)
    again = kernels.images(library, "sm_90", "few")
    assert {name: one[:2] for name, one in again.items()} == {name: one[:2] for name, one in made.items()}


@needs_nvrtc
def test_compiling_that_takes_long_is_announced(
    kept: Cache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels, "_PATIENCE", 0.01)
    monkeypatch.setattr(kernels, "compile_", lambda *given, **named: time.sleep(0.2) or ENTRY)
    kernels.images(nvrtc.found()[0], "sm_90", "few")
    assert caplog.messages == [
        f"fusedlr compiles its CUDA kernels for sm_90 with NVRTC {nvrtc.found()[0]}, once: they are kept in "
        f"{kept.folder}"
    ]
    caplog.clear()
    monkeypatch.setattr(kernels, "_PATIENCE", 60)
    kept.clear()
    kernels.images(nvrtc.found()[0], "sm_90", "few")
    assert caplog.messages == []


def _images(start: Any) -> dict[str, Compiled]:
    start.wait()
    return kernels.images(nvrtc.found()[0], "sm_90", "few")


@needs_nvrtc
@pytest.mark.slow
def test_eight_processes_on_one_cold_cache(kept: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(8) as pool:
        start = manager.Barrier(8)
        first, *others = pool.map(_images, [start] * 8, chunksize=1)
    # whose machine code it is that is kept is left to chance: compilers number what has no name
    for other in others:
        assert {name: one.names for name, one in other.items()} == {
            name: one.names for name, one in first.items()
        }
        assert all(one.image.startswith(b"\x7fELF") for one in other.values())
    assert len(kept.entries()) == 3 and kept.folder is not None
    assert len(list(kept.folder.iterdir())) == 3
    monkeypatch.setattr(kernels, "compile_", None)
    assert len(kernels.images(nvrtc.found()[0], "sm_90", "few")) == 3


def test_a_capture_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "capturing", lambda device: True)
    monkeypatch.setattr(cuda, "_loaded", {})
    with pytest.raises(RuntimeError, match="make one step outside the CUDA graph before capturing it"):
        cuda.functions(torch.device("cuda", 0), "few")


def test_a_driver_that_is_missing_is_said() -> None:
    if compiled.cuda is None:
        pytest.skip(str(compiled.cuda_error))
    code = (
        "from fusedlr.backends.gpu import cuda; import torch\nprint(cuda.why_not([torch.device('cuda', 0)]))"
    )
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a driver")
    said = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert said.startswith("there is no CUDA driver: libcuda.so.1: ")
