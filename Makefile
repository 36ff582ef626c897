# Every target works on a bare clone with only Python (and make) there; a second call skips the install.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.docs-installed
SECONDS_OF_FUZZING ?= 600

.PHONY: run test test-slow test-versions test-package chaos chaos-ray test-pages fuzz audit docs lint types figures notebooks atlas-probes bench bench-long bench-features bench-methods bench-ray bench-cost bench-drift families bench-starts soak clean

run: $(STAMP)
	$(BIN)/fusion-lens run --out runs/atlas --overwrite

# two processes of one thread each: more threads than cores slow small products by orders of magnitude
test: $(STAMP) lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# TransformerLens 4, and the lowest versions that are declared, each in an environment of its own
test-versions:
	PYTHON=$(PYTHON) bash tests/versions/check.sh transformer-lens-4
	PYTHON=$(PYTHON) bash tests/versions/check.sh lowest

# the wheel in a clean environment
test-package: $(STAMP)
	$(BIN)/python -m pytest -m package tests/package

chaos: $(STAMP)
	bash tests/chaos/tools.sh || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m chaos -s tests/chaos

chaos-ray: $(STAMP)
	$(BIN)/python -m pytest -m chaos_ray -s tests/chaos

test-pages: $(STAMP) $(DOCS)
	$(BIN)/python -m pytest -m pages

# SECONDS_OF_FUZZING in all, divided over the readers; atheris where it can be installed, else drawn changes
fuzz: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]" || echo "no atheris here"
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS_OF_FUZZING)

audit: $(STAMP)
	$(BIN)/python tests/audit.py

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy
	$(BIN)/python -m nbqa mypy notebooks

figures: $(STAMP)
	bash figures/chromium.sh
	test -f runs/atlas/summary.json || $(MAKE) run
	$(BIN)/python figures/make.py

notebooks: $(STAMP)
	$(BIN)/python notebooks/execute.py

atlas-probes: $(STAMP)
	$(BIN)/python -m fusion_lens.atlas.probes

bench: $(STAMP)
	$(BIN)/python benchmarks/engine.py

bench-long: $(STAMP)
	$(BIN)/python benchmarks/long.py

bench-features: $(STAMP)
	$(BIN)/python benchmarks/features.py

bench-ray: $(STAMP)
	$(BIN)/python benchmarks/ray_workers.py

bench-cost: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/cost.py

bench-drift: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/drift.py

# every family at every stage, into docs/families.md
families: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/families.py

bench-starts: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/starts.py

soak: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/soak.py

bench-methods: $(STAMP)
	$(BIN)/python benchmarks/methods.py

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[all,dev]"
	touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) .venv-* build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache
