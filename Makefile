# make demo   try it: installs what is missing, answers requests with keys in a simulated TPM, ends by itself
# make test   every check: lint, types, tests with branch coverage
# make bench  how fast it is, beside the TPM alone and other programs: minutes; QUICK=1 for a look in less than two
# make fuzz   fuzz what reads messages, files and names: SECONDS=600 for ten minutes; what it finds is kept in tests/abuse/corpus
# make deb    what a station installs: dist/stationkey_VERSION_ARCH.deb
# make deb-check  builds it, installs it in a bare Debian, starts it in a chroot and under systemd, purges it; as root
# make alerts  tries the alerts by Prometheus' promtool, if that is installed (Debian: prometheus; PROMTOOL=FILE names another)
# make sbom   what it is made of: dist/stationkey.cdx.json, CycloneDX
# make audit  whether anything is known against what is pinned
.PHONY: help setup demo test bench fuzz deb deb-check alerts sbom audit lint pin clean

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

fuzz:
	@scripts/setup test
	@PYTHONPATH=tests .venv/bin/python tests/abuse/fuzz.py $(if $(SECONDS),--seconds $(SECONDS))

deb:
	@scripts/setup deb
	@scripts/deb

deb-check: deb
	@scripts/setup deb-check
	@scripts/deb-check

alerts: PROMTOOL ?= promtool
alerts:
	@command -v $(PROMTOOL) >/dev/null || { echo "promtool is missing: Debian has it in the package prometheus, whose server can be disabled" >&2; exit 1; }
	@$(PROMTOOL) check rules packaging/prometheus/alerts.yml
	@$(PROMTOOL) test rules tests/packaging/alerts.yml

sbom:
	@scripts/setup deb
	@.venv/bin/python scripts/sbom.py dist/stationkey.cdx.json
	@echo dist/stationkey.cdx.json

audit:
	@scripts/setup deb
	@.venv/bin/python scripts/audit.py $(if $(AUDIT),-- $(AUDIT))

lint:
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

pin:
	scripts/pin

clean:
	rm -rf --one-file-system .venv .bench build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage
