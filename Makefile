# Everything runs from a clone with Python 3.11+, make and a package index; the first target makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

RETEST = $(BIN)/python -m pytest --last-failed --last-failed-no-failures none --exitfirst

.PHONY: install demo test check bench clean

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard serving/proto/*.proto) $(wildcard model/kernels/*.c model/kernels/*.h)
	@echo "installing into $(VENV): minutes, the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@PYTHONWARNINGS="ignore:Editable installation" \
		$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/moesaic demo

# What fails beside another worker runs once more with the machine for itself: a fault fails twice, and ends the second
# run at once. What fails only beside others is in the first run's summary: mend it.
test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder || { [ $$? -eq 1 ] && $(RETEST); }

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_docs.py

bench: $(STAMP)
	$(BIN)/python benchmarks/run_all.py

clean:
	rm -rf $(VENV) build *.egg-info serving/proto/*_pb2* model/kernels/*.so
