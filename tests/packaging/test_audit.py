"""``make audit`` says that all is well only where each package was asked about."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import audit
import pytest
from unit import ROOT

HASH = "sha256:" + "0" * 64


class Service(ThreadingHTTPServer):
    """A vulnerability service, as OSV is: who is asked about, and what is known."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: dict[str, str] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.failing = False

    @property
    def options(self) -> list[str]:
        return ["--vulnerability-service", "osv", "--osv-url", f"http://127.0.0.1:{self.server_port}/v1/query"]


class Answer(BaseHTTPRequestHandler):
    server: Service

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = query["package"]["name"]
        self.server.asked[name] = query["version"]
        found = self.server.known.get(name)
        body = json.dumps({"vulns": [found]} if found else {}).encode()
        self.send_response(503 if self.server.failing else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class's name
        """Nothing."""


@pytest.fixture
def service() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A requirements file of two packages."""
    path = tmp_path / "two.txt"
    path.write_text(f"click==8.5.1 --hash={HASH}\nrich==15.0.0 --hash={HASH}\n")
    return path


def test_a_clean_result_is_that_each_package_was_asked_about(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    runtime = ROOT / "requirements/runtime.txt"
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", runtime.read_text(), re.MULTILINE))

    assert audit.main([str(runtime), "--", *service.options]) == 0
    assert service.asked == pinned
    assert f"nothing known against {len(pinned)} packages" in capsys.readouterr().out


def test_what_only_another_platform_needs_is_asked_about_too(tmp_path: Path, service: Service) -> None:
    path = tmp_path / "elsewhere.txt"
    path.write_text(
        f"click==8.5.1 ; python_full_version < '3' \\\n    --hash={HASH}\n"
        f"rich==15.0.0 ; sys_platform == 'win32' and implementation_name != 'PyPy' \\\n    --hash={HASH}\n"
    )

    assert audit.main([str(path), "--", *service.options]) == 0
    assert service.asked == {"click": "8.5.1", "rich": "15.0.0"}


def test_what_is_known_is_named_with_the_version_that_mends_it(
    two: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.known["click"] = {
        "id": "PYSEC-2099-1",
        "affected": [
            {
                "package": {"name": "click", "ecosystem": "PyPI"},
                "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.0"}]}],
            }
        ],
    }

    assert audit.main([str(two), "--", *service.options]) == audit.EXIT_KNOWN
    said = capsys.readouterr().out
    assert all(datum in said for datum in ("click 8.5.1", "PYSEC-2099-1", "9.0"))  # words: which, by what, until when


def test_a_service_that_fails_is_no_clean_result(
    two: Path, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.failing = True

    assert audit.main([str(two), "--", *service.options]) == audit.EXIT_NOT_SAID
    assert "no clean result" in capsys.readouterr().err  # words: not to be taken for one


def test_a_service_that_is_not_there_is_no_clean_result(two: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Service() as gone:
        options = gone.options

    assert audit.main([str(two), "--", *options]) == audit.EXIT_NOT_SAID
    assert "NOT ASKED  pip-audit" in capsys.readouterr().out  # words: who was not, and that it is no clean result


@pytest.mark.parametrize(
    ("report", "clean", "not_said"),
    [
        pytest.param({"dependencies": [{"name": "a", "skip_reason": "not found"}]}, 0, ["not found"], id="skipped"),
        pytest.param(
            {"dependencies": [{"name": "a", "skip_reason": "x"}, {"name": "b", "version": "1", "vulns": []}]},
            1,
            ["x"],
            id="one of two skipped",
        ),
        pytest.param({"dependencies": []}, 0, ["the report has no packages in it"], id="empty"),
    ],
)
def test_a_package_that_was_passed_over_is_not_clean(report: dict[str, Any], clean: int, not_said: list[str]) -> None:
    verdict = audit.judge(report)

    assert (verdict.clean, verdict.known, verdict.not_said) == (clean, [], not_said)


def test_every_file_that_pins_packages_is_audited() -> None:
    """station.txt and supply.txt have no package that is not in one of these."""
    pins = {path.name: set(re.findall(r"^[\w.-]+==[\w.]+", path.read_text(), re.MULTILINE)) for path in pinned_files()}
    audited = set().union(*(pins[name] for name in audit.FILES))

    assert {name for name, packages in pins.items() if packages - audited} == set()


def pinned_files() -> list[Path]:
    return sorted((ROOT / "requirements").glob("*.txt"))
