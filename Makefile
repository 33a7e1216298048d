# The developer's commands. PYTHON names the interpreter that has the package with its extras.
PYTHON ?= $(if $(wildcard .venv/bin/python),.venv/bin/python,python)
CLANG_FORMAT ?= $(if $(wildcard .venv/bin/clang-format),.venv/bin/clang-format,clang-format)
C_FILES = $(wildcard maqd_hf/kernels/csrc/*.[ch] maqd_hf/kernels/csrc/*.inc tests/support/*.c)

.DEFAULT_GOAL := help
.PHONY: help check fix test test-slow sanitize fuzz valgrind arm docs tables

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1: /p' Makefile

check: ## lint, format and types
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(CLANG_FORMAT) --dry-run -Werror $(C_FILES)

fix: ## what the linters can put right themselves
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .
	$(CLANG_FORMAT) -i $(C_FILES)

test: ## the tests
	$(PYTHON) -m pytest -n auto --dist worksteal

test-slow: ## the tests that take more than a quarter of a minute each
	$(PYTHON) -m pytest -m slow

sanitize: ## the compiled library under the sanitizers
	PYTHON=$(PYTHON) .ci/sanitize

fuzz: ## 200,000 damaged and forged checkpoints on the library under the sanitizers, for an hour or two
	PYTHON=$(PYTHON) .ci/sanitize-fuzz --processes 2

valgrind: ## the compiled library under memcheck
	.ci/valgrind

arm: ## the compiled library on an emulated Arm processor
	.ci/arm

docs: ## the site in build/site, warnings as errors
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict

tables: ## README's table, docs/results.md and the plots, from results/
	$(PYTHON) -m scripts.bench.report.plots
	$(PYTHON) -m scripts.bench.report.render
