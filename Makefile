BIN := .venv/bin
STAMP := .venv/installed
DOCS := .venv/docs-installed

.PHONY: demo docs test supported clean

demo: $(STAMP)
	mkdir -p demo
	$(BIN)/permprune --verbose compare smollm2-135m --minutes 5 --json demo/compare.json --picture demo/compare.png

test: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy permprune
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto

docs: $(DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

supported: $(STAMP)
	$(BIN)/python -m tests.coupling.supported

clean:
	rm -rf permprune/kernels/libpermprune.* .venv demo site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find permprune tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): pyproject.toml hatch_build.py $(wildcard permprune/kernels/csrc/*)
	@python=$$(command -v python3.11 || command -v python3) \
		&& "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "permprune needs Python 3.11 or newer: install it, or put it first in PATH" >&2; exit 1; }; \
	test -x $(BIN)/python || "$$python" -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

$(DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet 'permprune[docs]'
	@touch $@
