# make demo: from nothing to a trained classifier on simulated caps.  make test: the one check.
VENV := .venv
BIN := $(VENV)/bin
CANDIDATES := $(PYTHON) python3.13 python3.12 python3.11 python3 python

.DEFAULT_GOAL := help
.PHONY: help demo test faults fuzz interop bench format clean

help:
	@echo "make demo    install, simulate caps, train a classifier on them (runs/demo/)"
	@echo "make test    ruff, mypy and pytest"
	@echo "make faults  kill the ETL 50 and the pipeline 100 times at random moments, compare reruns"
	@echo "make fuzz    20,000 damaged inputs through the ETL, 10,000 settings through the dry run"
	@echo "make interop exported models in other Kerases and in Capfinder 0.4.3 (11 GB the first time)"
	@echo "make bench   ours beside Capfinder 0.4.3 and at scale (benchmarks/; two hours)"
	@echo "make format  apply ruff's formatting and fixes"
	@echo "make clean   remove .venv and caches (runs/ stays)"

$(VENV)/.made:
	@for python in $(CANDIDATES); do \
	  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	    2>/dev/null; then exec $$python -m venv $(VENV); fi; \
	done; echo "error: no Python 3.11 to 3.13 found; set PYTHON=/path/to/python3.12" >&2; exit 2
	@touch $@

$(VENV)/.installed: $(VENV)/.made pyproject.toml requirements.txt
	@echo "Installing (a few minutes the first time) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: $(VENV)/.installed
	@$(BIN)/capfinder simulate --output_dir runs/demo_caps \
	  --reads_per_class 1000 --num_classes 4 --runs_per_class 2 --seed 1
	@$(BIN)/python launch.py --config=configs/demo.py

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 3 --dist loadfile --no-loadscope-reorder

faults: $(VENV)/.installed-dev
	$(BIN)/python tests/faults/etl_kills.py --kills 50
	$(BIN)/python tests/faults/pipeline_kills.py --kills 100

fuzz: $(VENV)/.installed-dev
	$(BIN)/python tests/fuzz/etl_fuzz.py --cases 20000
	$(BIN)/python tests/fuzz/config_fuzz.py --cases 10000

interop: $(VENV)/.installed-dev
	$(BIN)/python tests/interop/matrix.py

bench: $(VENV)/.installed-dev
	$(BIN)/python benchmarks/models.py --rounds 5 --steps 20
	$(BIN)/python benchmarks/start_up.py --rounds 3
	$(BIN)/python benchmarks/whole_job.py --reads_per_class 5000
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/fine_tune.py
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/residency.py
	$(BIN)/python benchmarks/etl.py --reads_per_class 10000 --rounds 5
	$(BIN)/python benchmarks/etl_scale.py --gigabytes 0.5 5 --tiny_reads 20000000

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
