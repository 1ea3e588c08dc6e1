#!/bin/sh
# what is in a wheel, and the tests against it, installed away from the tree
# usage: check_wheel.sh PYTHON WHEEL [PYTEST ARGUMENTS]
#   PYTHON has torch and pytest; its other fusedlr, if any, is not used
set -eu
python=$1
wheel=$(realpath "$2")
shift 2
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT

# a file of the package is in git, or is a module: nothing of an earlier build; no OpenMP runtime but torch's
"$python" -m zipfile -l "$wheel" | sed -n 's/^\(fusedlr[^ ]*\) .*/\1/p' | sort >"$away/found"
{ git ls-files fusedlr; git ls-files 'bench/*.py' csrc/schedule.h csrc/adamw.h csrc/guard.h csrc/types.h csrc/cuda/step.h csrc/cuda/step.cu | sed 's|^|fusedlr/|'; grep -E '^fusedlr/_(host|cpu|cuda)\.[^/]*\.so$|^fusedlr-[^/]*\.dist-info/' "$away/found"; } |
    sort >"$away/expected"
diff "$away/expected" "$away/found"
# the CUDA kernels are in it as source
size=$(wc -c <"$wheel")
echo "wheel: $size bytes"
test "$size" -lt 1000000

sites=$("$python" -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")')
"$python" -m venv "$away/venv"
"$away/venv/bin/python" -m pip install -q --no-deps --no-index "$wheel"
# after the install, or pip would find an editable fusedlr there; plain paths, so that an editable's own .pth is not read
purelib=$("$away/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$sites" >"$purelib/parent.pth"

cp -r tests "$away/tests"
# the tree's settings name the tree's folders; these are what the tests need of them
printf '[pytest]\naddopts = --strict-markers\nmarkers =\n    gpu:\n    interpreter:\n    slow:\n    tools:\npythonpath = tests\n' >"$away/pytest.ini"
cd "$away"
venv/bin/python -c "import fusedlr, sys; print(fusedlr.__file__); sys.exit(not fusedlr.__file__.startswith('$PWD/'))"
venv/bin/fusedlr info
venv/bin/python -m pytest -q -m "not slow and not gpu" -p no:cacheprovider tests "$@"
