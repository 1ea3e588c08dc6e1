# every target makes .venv ready by itself: python3 (3.10 to 3.13, with venv and pip) is all it takes
# PYTHON=...  the interpreter to make .venv with; if it has torch, that torch is used
# ARGS=...    passed on, as in: make test ARGS="-k cosine -x"
# JOBS=...    processes that share the tests (default 2); 0 for one, as a debugger wants it
PYTHON ?= python3
OUT ?= bench/results/gpu
PYTHONS ?= $(PYTHON)
TORCHES ?= own
JOBS ?= 2
RUN := .venv/bin/python
CSRC = $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h tests/*.cpp tests/*/*.cpp tests/*/*.cu tests/ptx/machine/*)

.PHONY: help demo test ptx lint bench wheel smoke gpu format docs clean env-gpu env-demo env-dev env-docs

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: env-demo  ## fine-tune a small model and compare with stock AdamW and scheduler
	$(RUN) -m fusedlr demo $(ARGS)

# the tests run in two processes, whose idle OpenMP threads take each other's cores when they spin: 650 tests on
# 2 busy cores took 176 and 165 s with the default policy, and 153 and 125 s with this one (2026-11-26)
test wheel: export OMP_WAIT_POLICY ?= PASSIVE

test: env-dev  ## all tests that this machine can run
	$(RUN) -m pytest -n $(JOBS) $(ARGS)

ptx: env-dev  ## the GPU kernels' PTX on the CPU: numbers, bounds, races; ARGS=--help, see tests/ptx/README.md
	PYTHONPATH=tests $(RUN) -m ptx $(ARGS)

lint: env-dev  ## ruff, mypy, clang-format: check only
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) -m mypy
	$(if $(CSRC),.venv/bin/clang-format --dry-run -Werror $(CSRC))

bench: env-demo  ## time this machine against stock torch, all of it into bench/results; ARGS=tiny, say, for less
	$(RUN) -m fusedlr bench $(or $(ARGS),host --all --sweep --wait-policy both --out bench/results)

wheel: env-dev  ## sdist and wheel into dist/, and tests against the wheel
	rm -rf dist
	FUSEDLR_CPU=$${FUSEDLR_CPU:-1} $(RUN) -m build
	sh tools/check_wheel.sh $(RUN) dist/*.whl $(ARGS)

smoke: env-dev  ## install the sdist afresh and train ten steps: PYTHONS="python3.10 python3.13" TORCHES="own 2.10.0"
	rm -f dist/*.tar.gz
	$(RUN) -m build --sdist
	sh tools/smoke.sh dist/*.tar.gz "$(PYTHONS)" "$(TORCHES)"

gpu: env-gpu  ## the GPU suite, results into OUT=bench/results/gpu
	$(RUN) -m bench.gpu_suite --out $(OUT) $(ARGS)

format: env-dev  ## ruff and clang-format: rewrite
	$(RUN) -m ruff check --fix
	$(RUN) -m ruff format
	$(if $(CSRC),.venv/bin/clang-format -i $(CSRC))

docs: env-docs node_modules/.package-lock.json  ## the pages of docs/ as a site in build/site, links checked
	$(RUN) docs/make_pictures.py
	$(RUN) tools/readme_numbers.py --check
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict $(ARGS)
	@echo "build/site/index.html; to explore schedules too: python3 -m http.server -d build/site"

# what the page docs/explore.md runs, from npm: downloaded once, and again where the pinned versions change
node_modules/.package-lock.json: package.json package-lock.json
	@command -v npm >/dev/null || { echo "make docs needs npm, which comes with Node.js" >&2; exit 1; }
	npm ci --ignore-scripts --no-audit --no-fund
	@touch $@

clean:  ## remove what was built and cached, except .venv and node_modules
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks fusedlr/*.so .venv/.ready-*
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# an existing .venv is kept unless the caller names an interpreter
env-gpu env-demo env-dev env-docs:
	@$(PYTHON) tools/bootstrap.py $(@:env-%=%) $(if $(filter file,$(origin PYTHON)),,--python)
