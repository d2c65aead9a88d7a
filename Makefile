# make demo   try it: installs what is missing, answers requests with keys in a simulated TPM, ends by itself
# make test   every check: lint, types, tests with branch coverage
.PHONY: help setup demo test lint pin clean

help:
	@sed -n 's/^# //p' Makefile

setup:
	@scripts/setup demo

demo:
	@scripts/setup demo
	@.venv/bin/python scripts/demo.py

test:
	@scripts/setup test
	@$(MAKE) --no-print-directory lint
	.venv/bin/python -m pytest

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

pin:
	scripts/pin

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
