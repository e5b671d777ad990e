# `make demo`, `make test` and `make docs` need Python ≥ 3.10 and make, nothing else.
PYTHON ?= python3
BIN := .venv/bin
# Interpreters of the venv come first, so that what a test starts is what was installed.
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Threads that sleep instead of spinning while they wait: the machine may be doing something else too.
export OMP_WAIT_POLICY ?= PASSIVE

demo: .venv/ready
	fastrecipes demo

test: .venv/ready
	ruff check fastrecipes tests nbs docs bench
	@if pyright --version >/dev/null 2>&1; then pyright; else echo 'pyright is not to be had here: types are not checked'; fi
	pytest -n auto --dist loadfile
	nbdev-test

# The site, into build/site: nothing is fetched for it.
docs: .venv/ready
	python docs/make_site.py

# Every benchmark, each into its part of bench/RESULTS.md: a day of a machine that has nothing else to do. Those that train for long go on where they were cut off; one that
# fails does not stop the others. `make bench BENCHES="loop footprint"` runs some.
BENCHES ?= footprint loop defects loading serving transfer gpu cifar_time imbalance effects ensembles self_training compression compress_cifar ablation_honesty ablation_ray kills mutations serving_fuzz
bench: .venv/ready
	@for name in $(BENCHES); do echo "bench/$$name.py"; python -W ignore bench/$$name.py --write || failed="$$failed $$name"; done; \
	if [ -n "$$failed" ]; then echo "failed:$$failed"; exit 1; fi

# uv where there is one; else a plain venv whose pip brings uv: what pip it starts from no longer matters.
.venv/ready: setup.cfg pyproject.toml
	@if command -v uv >/dev/null; then uv venv --quiet --allow-existing --python $(PYTHON) .venv && uv pip install --compile-bytecode --python $(BIN)/python -e '.[dev,docs,serve,weights]'; \
	else $(PYTHON) -m venv .venv && $(BIN)/python -m pip install --quiet -U pip uv && $(BIN)/uv pip install --compile-bytecode --python $(BIN)/python -e '.[dev,docs,serve,weights]'; fi
	@touch $@

clean:
	rm -rf .venv runs nbs/runs build dist *.egg-info

.PHONY: demo test docs bench clean
