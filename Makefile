# make demo   try it: installs what is missing, answers requests with keys in a simulated TPM, ends by itself
# make test   every check: lint, types, tests with branch coverage
# make bench  how fast it is, beside the TPM alone and other programs: minutes; QUICK=1 for a look in less than two
.PHONY: help setup demo test bench lint pin clean

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

bench:
	@scripts/setup bench
	@.venv/bin/python -m bench $(if $(QUICK),--quick)

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

pin:
	scripts/pin

clean:
	rm -rf .venv .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
