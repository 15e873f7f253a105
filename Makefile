# Everything a newcomer needs: `make demo`, `make test`, `make check`. The first call makes .venv and installs into it.

PYTHON ?= python3
BIN := .venv/bin
RUN := runs/demo
# A file of tests is run by one process, for what it trains serves all of them.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-all check docs clean

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lmtrain needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; choose another: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: .venv/.ready  ## train a small model on real text, score it, let it write
	$(BIN)/lmtrain train demo run.dir=$(RUN)
	$(BIN)/lmtrain eval $(RUN)
	$(BIN)/lmtrain generate $(RUN) --prompt 'def ' --length 400 --temperature 0.8 --seed 1
	@echo
	@echo "run folder:  $(RUN)"
	@echo "TensorBoard: $(BIN)/tensorboard --logdir runs"

test: .venv/.ready  ## all tests but those marked slow
	$(BIN)/python -m pytest $(PARALLEL) -m 'not slow'

test-all: .venv/.ready  ## the slow ones too
	$(BIN)/python -m pytest $(PARALLEL)

check: .venv/.ready  ## style and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy attention data parallel lmtrain launch

docs: .venv/.ready  ## what is generated from the code and from results
	$(BIN)/python -m tests.faults > docs/reliability.md
	$(BIN)/python -m lmtrain.config.reference > docs/config.md
	$(BIN)/python benchmarks/fill.py

clean:  ## remove what this file made, but no runs
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
