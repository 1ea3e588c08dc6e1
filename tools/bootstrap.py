"""Make .venv ready for a make target: bootstrap.py gpu|demo|dev|docs [--python]. Each holds those before it.

Torch comes first and pinned: any package that needs it would pull its newest CUDA build. A Python that has a
torch new enough lends it to .venv. Pythons too old for fusedlr must parse this file: it turns them away.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
VENV = os.path.join(ROOT, ".venv")
PYTHON = os.path.join(VENV, "bin", "python")
PINS = os.path.join(ROOT, "tools", "constraints.txt")
MADE = os.path.join(VENV, ".made")  # what .venv was made with; written once it has a torch
# there while .venv is being changed: whoever finds it later knows that the change was killed
BUSY = os.path.join(VENV, ".busy")
# inherited by pip: a second make waits, also for a pip that outlived the first
LOCK = open(__file__)  # noqa: SIM115
LEVELS = {"gpu": "", "demo": "[demo]", "dev": "[dev]", "docs": "[dev,docs]"}
OLDEST_PYTHON, NEWEST_PYTHON = (3, 10), (3, 13)
OLDEST_TORCH = (2, 10)

# prints the version of torch and the directories it and its dependencies may come from
PROBE = """
import json, sys, torch
sites = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
print(json.dumps([torch.__version__, sites]))
"""


def main():
    level, given = sys.argv[1], "--python" in sys.argv
    if is_ready(level, given):
        return
    try:
        fcntl.flock(LOCK, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        say("waiting for another make that is setting up .venv")
        fcntl.flock(LOCK, fcntl.LOCK_EX)
    if is_ready(level, given):
        return
    if not is_made(given):
        make_venv()
    install(level)


def is_ready(level, given):
    """The level asked for, or one that holds it, was installed from these very files."""
    names = list(LEVELS)
    return is_made(given) and any(read(stamp(name)) == digest() for name in names[names.index(level) :])


def is_made(given):
    """.venv is whole, in its place, and made with the interpreter asked for if one was (`given`)."""
    if os.path.exists(BUSY) or not os.access(PYTHON, os.X_OK):
        return False
    made = read(MADE)
    if not made:
        return False
    made = json.loads(made)
    # a venv does not survive being copied elsewhere: its scripts and its editable install name the old tree
    if made["root"] != ROOT or (made["pin"] is not None and made["pin"] != pinned_torch()):
        return False
    return not given or is_active() or made["python"] == interpreter()


def make_venv():
    if is_active():
        # about to go: carry on with the interpreter under it
        os.execv(sys._base_executable, [sys._base_executable, *sys.argv])
    if not OLDEST_PYTHON <= sys.version_info[:2] <= NEWEST_PYTHON:
        needed = f"needs Python {dotted(OLDEST_PYTHON)} to {dotted(NEWEST_PYTHON)}"
        fail(f"{needed}, but {sys.executable} is {interpreter()[1]}: name another with make PYTHON=...")
    if os.path.lexists(VENV):
        if not (os.path.exists(MADE) or os.path.exists(BUSY)):
            fail(".venv was not made by make, so make won't replace it: move it away")
        shutil.rmtree(VENV)
    say(f"making .venv with Python {interpreter()[1]} ({sys.executable})")
    os.mkdir(VENV)
    write(BUSY, "")
    run([sys.executable, "-m", "venv", VENV], "venv failed (on Debian and Ubuntu, install python3-venv)")
    torch, sites = torch_of(sys.executable)
    reuse = torch is not None and release(torch) >= OLDEST_TORCH
    if reuse:
        say(f"using its torch {torch}: nothing of that to download")
        lend(sites)
    else:
        say(f"to download: {pinned_torch()}, 0.2 GB if a CPU build, up to 3 GB if a CUDA build")
        say("(to use a torch you have, interrupt and name the Python that imports it: make PYTHON=...)")
        pip(pinned_torch())
    write(MADE, json.dumps({"root": ROOT, "python": interpreter(), "pin": None if reuse else pinned_torch()}))
    os.remove(BUSY)


def lend(sites):
    """Let .venv import what the given interpreter can.

    --system-site-packages would do for a system's Python; from a venv it means the Python beneath.
    """
    command = [PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.check_output(command, text=True).strip()
    lines = [f"import site; site.addsitedir({path!r})\n" for path in sites]
    # sorts after pip's own files, so that what is installed in .venv is found first
    write(os.path.join(purelib, "parent.pth"), "".join(lines))


def install(level):
    torch, _ = torch_of(PYTHON)
    if torch is None:
        fail("torch does not import in .venv: rm -rf .venv and try again")
    if level != "gpu":
        say(f"to download unless cached: what .{LEVELS[level]} in pyproject.toml needs, about 0.2 GB")
    # nothing that is installed from here on may replace torch
    constraints = os.path.join(VENV, "constraints.txt")
    kept = [line for line in read(PINS).splitlines() if not line.startswith("torch==")]
    write(constraints, "\n".join([*kept, "torch==" + torch, ""]))
    # the build's needs go into .venv, not into an isolated one: quicker, and works offline if they are there
    requires = re.search(r"^requires = \[(.*)\]", read(os.path.join(ROOT, "pyproject.toml")), re.M).group(1)
    write(BUSY, "")
    pip("-c", constraints, *re.findall(r'"(.*?)"', requires))
    pip("-c", constraints, "--no-build-isolation", "-e", ROOT + LEVELS[level])
    write(stamp(level), digest())
    os.remove(BUSY)


def pip(*arguments):
    # progress bars for people, errors alone for logs
    quiet = [] if sys.stdout.isatty() else ["-qq"]
    options = ["--disable-pip-version-check", "--no-input", *quiet]
    run([PYTHON, "-m", "pip", "install", *options, *arguments], "pip failed (see above); make again to retry")


def run(command, hint):
    code = subprocess.call(command, pass_fds=[LOCK.fileno()])
    if code > 0 and os.path.exists(MADE):
        # it said no and cleaned up after itself; had it been killed, .venv would have to be made anew
        os.remove(BUSY)
    if code:
        fail(hint)


def torch_of(python):
    """Version and site directories of the torch that `python` imports, (None, []) if it imports none."""
    found = subprocess.run([python, "-c", PROBE], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=VENV)
    return json.loads(found.stdout.decode().splitlines()[-1]) if found.returncode == 0 else (None, [])


def release(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def pinned_torch():
    return re.search(r"^torch==\S+", read(PINS), re.M).group()


def interpreter():
    return [sys.prefix, dotted(sys.version_info[:3])]


def is_active():
    """This script is run by .venv's own Python."""
    return os.path.exists(VENV) and os.path.samefile(sys.prefix, VENV)


def dotted(version):
    return ".".join(map(str, version))


def stamp(level):
    return os.path.join(VENV, ".ready-" + level)


def digest():
    """Of everything an editable install is made from; Python files are read in place and don't count."""
    paths = [os.path.join(ROOT, name) for name in ("pyproject.toml", "setup.py", "csrc")]
    files = [PINS, os.path.abspath(__file__)]
    for path in paths:
        files += [os.path.join(path, name) for name in os.listdir(path)] if os.path.isdir(path) else [path]
    total = hashlib.sha256()
    for path in sorted(filter(os.path.isfile, files)):
        with open(path, "rb") as file:
            total.update(path.encode() + b"\0" + file.read() + b"\0")
    return total.hexdigest()


def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def write(path, text):
    with open(path, "w") as file:
        file.write(text)


def say(text):
    print("fusedlr: " + text, flush=True)


def fail(text):
    sys.exit("fusedlr: " + text)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        fail("interrupted; `make` again to start over")
