#!/bin/sh
# install a wheel away from the tree and run the tests against it
# usage: check_wheel.sh PYTHON WHEEL   PYTHON has torch and pytest; its other fusedlr, if any, is not used
set -eu
python=$1
wheel=$(realpath "$2")
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT

sites=$("$python" -c 'import sys; print(*(p for p in sys.path if p.endswith(("site-packages", "dist-packages"))), sep="\n")')
"$python" -m venv "$away/venv"
"$away/venv/bin/python" -m pip install -q --no-deps --no-index "$wheel"
# after the install, or pip would find an editable fusedlr there; plain paths, so that an editable's own .pth is not read
purelib=$("$away/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$sites" >"$purelib/parent.pth"

cp -r tests "$away/tests"
# the tree's settings name the tree's folders; these are what the tests need of them
printf '[pytest]\naddopts = --strict-markers\nmarkers =\n    gpu:\n    slow:\n' >"$away/pytest.ini"
cd "$away"
venv/bin/python -c "import fusedlr, sys; print(fusedlr.__file__); sys.exit(not fusedlr.__file__.startswith('$PWD/'))"
venv/bin/fusedlr --help >/dev/null
venv/bin/python -m pytest -q -m "not slow and not gpu" -p no:cacheprovider tests
