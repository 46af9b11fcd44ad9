BIN := .venv/bin
INSTALLED := .venv/installed
DEV := .venv/dev-installed
DOCS := .venv/docs-installed
OLDEST := build/oldest/installed
NATIVE := hatch_build.py $(wildcard permprune/kernels/*.[ch] permprune/kernels/*/*.[ch])

PYTEST := pytest -n auto --dist worksteal
ONE_THREAD := OMP_NUM_THREADS=1
QUICK := -m "not slow"

.PHONY: demo compare recipes test test-all test-oldest asan docs dist supported clean

MODEL := smollm2-135m

demo: $(INSTALLED)
	rm -rf demo && mkdir demo
	$(BIN)/permprune --verbose prune $(MODEL) --order ria --update admm --train steps=8 \
		--length 128 --windows 16 --pack int8 --head int8 --out demo/pruned
	$(BIN)/permprune verify demo/pruned

compare: $(INSTALLED)
	mkdir -p demo
	$(BIN)/permprune --verbose compare $(MODEL) --methods none,ria,reconstruction,newton,learned --budgets 5 --json demo/long.json

# Hours of one thread; DATA holds the files that benchmarks/recipes.py names, ONLY names some of the recipes.
DATA := data

recipes: $(DEV)
	$(BIN)/python benchmarks/recipes.py --data $(DATA) --work build/recipes --rows docs/results/recipes.jsonl \
		$(if $(ONLY),--only $(ONLY))
	$(BIN)/python docs/figures/tables.py

test: CHOSEN := $(QUICK)

# Types are checked beside the tests, which at times leave a core idle.
test test-all: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@$(BIN)/mypy permprune & types=$$!; \
	$(ONE_THREAD) $(BIN)/$(PYTEST) $(CHOSEN); tests=$$?; \
	wait $$types && exit $$tests

# What the oldest direct dependencies and the newest indirect ones warn each other of is no error here.
test-oldest: $(OLDEST)
	$(ONE_THREAD) build/oldest/bin/$(PYTEST) $(QUICK) -W default --disable-warnings

# The tests of the kernels on a library that AddressSanitizer watches, in a copy of the package; gcc builds it.
asan: $(DEV)
	rm -rf build/asan && mkdir -p build/asan && cp -r permprune tests docs hatch_build.py pyproject.toml build/asan
	cd build/asan && CC=gcc CFLAGS="-g -O1 -fsanitize=address" ../../$(BIN)/python hatch_build.py
	cd build/asan && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 $(ONE_THREAD) \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
		../../$(BIN)/pytest -s tests/kernels tests/inference tests/kv

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The tests run in the unpacked source distribution without its package, so that they import the wheel.
dist: $(DEV)
	rm -rf dist build/wheel build/sdist && mkdir -p build/sdist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(BIN)/python -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet "$$(echo dist/*.whl)[dev]"
	tar -xz -f dist/*.tar.gz -C build/sdist --strip-components 1 --exclude 'permprune-*/permprune'
	cd build/sdist && PYTHONPATH=. $(ONE_THREAD) ../wheel/bin/$(PYTEST) $(QUICK)

supported: $(DEV)
	$(BIN)/python -m tests.coupling.supported

clean:
	rm -rf permprune/kernels/libpermprune.* .venv demo site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find permprune tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml $(NATIVE)
	@python=$$(command -v python3.11 || command -v python3) \
		&& "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "permprune needs Python 3.11 or newer: install it, or put it first in PATH" >&2; exit 1; }; \
	test -x $(BIN)/python || "$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --editable .
	@touch $@

$(DEV): $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'permprune[dev]'
	@touch $@

$(DOCS): $(INSTALLED)
	$(BIN)/python -m pip install --quiet 'permprune[docs]'
	@touch $@

$(OLDEST): pyproject.toml $(NATIVE) | $(DEV)
	rm -rf build/oldest
	$(BIN)/python -m venv build/oldest
	$(BIN)/uv pip install --quiet --python build/oldest/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@
