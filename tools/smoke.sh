#!/bin/sh
# install a wheel or sdist into a fresh environment for every Python and torch named, and train ten steps there
# usage: smoke.sh PACKAGE "PYTHON..." "TORCH..."   as in: smoke.sh dist/*.tar.gz "python3.10 python3.13" "2.10.0 own"
#   own is the torch that a Python has; of others only CPU builds are installed, which are a tenth of the rest
set -eu
package=$(realpath "$1")
script=$(realpath "$(dirname "$0")/smoke.py")
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
cd "$away"
# not the modules of the folder that make was called in
unset PYTHONPATH

for python in $2; do
    if ! "$python" -c 'import venv' 2>/dev/null; then
        echo "$python: is not to be had"
        continue
    fi
    for torch in $3; do
        rm -rf venv
        "$python" -m venv venv
        pip="venv/bin/python -m pip --disable-pip-version-check -q install"
        if [ "$torch" = own ]; then
            sites=$("$python" -c 'import sys, torch; print(*(p for p in sys.path if "-packages" in p), sep="\n")' \
                2>/dev/null) || echo "$python: has no torch of its own"
            # read after the environment's own packages
            echo "${sites:-}" >"$(echo venv/lib/python3*/site-packages)/parent.pth"
        else
            $pip --only-binary torch "torch==$torch+cpu" 2>/dev/null ||
                echo "$python: there is no CPU build of torch $torch for it"
        fi
        # --ignore-installed: a torch's own Python may have a fusedlr, which is not the one to try
        $pip --no-deps --ignore-installed "$package"
        venv/bin/fusedlr --version
        venv/bin/python "$script"
    done
done
