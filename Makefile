# make demo | make demo-vae | make demo-finetune | make test | make test-long | make lint | make bench | make bench-gpu
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.ready
RUNS := runs/demo

.PHONY: setup demo demo-vae demo-finetune test test-long lint bench bench-gpu clean

setup: $(STAMP)

# Compiled bytecode halves the start of every process where writing it at run time is switched off.
$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --constraint constraints.txt --editable '.[all]'
	touch $(STAMP)

demo: setup
	$(BIN)/python launch/demo.py --out $(RUNS)

demo-vae: setup
	$(BIN)/python launch/demo_vae.py --out $(RUNS)

demo-finetune: setup
	$(BIN)/python launch/demo_finetune.py --demo $(RUNS)

test: setup
	$(BIN)/python -m pytest tests -q -n 2 --dist loadfile -m "not long"

test-long: setup
	$(BIN)/python -m pytest tests -q -n 2 --dist loadfile

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python bench/run.py

# With torch alone: uses the interpreter given, so that a machine without the other packages can run it.
bench-gpu:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) bench/gpu.py

clean:
	rm -rf .venv build *.egg-info runs
