"""What all tests share: a broker and a TPM, each real, each alone in its own folder; and the option ``--quick``."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
from peers import Mosquitto, Swtpm

if TYPE_CHECKING:
    from protection import Openers

# Modules that test modules take fixtures from, as a plugin, and other names, by an import before that.
pytest.register_assert_rewrite("attested_tpms", "config_files", "csmss", "gateways", "josevs", "keys_told", "pools")
pytest.register_assert_rewrite("ledgers", "store_threads", "tls_brokers", "tpm2_stores", "postgresql", "depots")


# jsonschema loads it for one format that no schema here has, and it takes more than a second: it makes a parser.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment] # as the documentation of `import` has it


class _Patient:
    """`sys` for `threading`, which sets the trace function of coverage in each new thread.

    Python 3.11 refuses that by RuntimeError where another thread is just doing the same, and the new one ends unborn.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(sys, name)

    @staticmethod
    def settrace(function: Any) -> None:
        while True:
            try:
                return sys.settrace(function)
            except RuntimeError:
                time.sleep(0)  # lets the other thread finish


threading._sys = _Patient()  # type: ignore[attr-defined] # noqa: SLF001 - there is no other place between the two


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="skip every test that starts a process, when it starts it")


STARTED: Final = frozenset({"mosquitto", "swtpm", "session_swtpm", "session_postgresql"})
"""Fixtures that start a process, whatever else a test does."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the longest tests first: a worker that began one of them last would be waited for.

    With ``--quick``, leave out what would be skipped in its setup: a skip takes as long as a short test.
    """
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if config.getoption("--quick"):
        left_out = [item for item in items if not STARTED.isdisjoint(getattr(item, "fixturenames", ()))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if STARTED.isdisjoint(getattr(item, "fixturenames", ()))]


MEMORY: Final = Path("/dev/shm")
ROOM: Final = 2 * 1024**3
"""Bytes; a whole run takes a quarter of it at a time."""


def _keep_files_in_memory() -> None:
    """Let temporary files be in memory, where there is room: brokers, TPMs and databases sync theirs all the time.

    What a killed process leaves is the same there as on a disk. The variable is passed on to the workers and to what
    the tests start; set to a folder on a disk, it has the tests run there.
    """
    if "TMPDIR" in os.environ or not os.access(MEMORY, os.W_OK):
        return
    system = os.statvfs(MEMORY)
    if system.f_bavail * system.f_frsize >= ROOM and not system.f_flag & os.ST_NOEXEC:
        tempfile.tempdir = os.environ["TMPDIR"] = str(MEMORY)


def pytest_configure(config: pytest.Config) -> None:
    _keep_files_in_memory()
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what runs in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["STATIONKEY_CONFIG"] = ""  # that of the machine on which the tests run is none of their business
    if config.getoption("--quick"):
        config.pluginmanager.register(_Quick())


class _Quick:
    """Skips a test at the moment that it starts a process, so that no list of such tests has to be kept.

    The events are those of PEP 578 for every way that Python has to start one.
    """

    STARTS = frozenset({"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.system"})

    def __init__(self) -> None:
        self._in_test = False
        self._refused = False
        sys.addaudithook(self._refuse)

    def _refuse(self, event: str, _: tuple[object, ...]) -> None:
        if self._in_test and event in self.STARTS:
            self._refused = True
            self._skip()

    @staticmethod
    def _skip() -> None:
        pytest.skip("starts a process")

    def _watch(self) -> Generator[None, object, object]:
        self._in_test, self._refused = True, False
        try:
            return (yield)
        finally:
            self._in_test = False
            if self._refused:  # again: what is tested may have caught the first, or made another error of it
                self._skip()

    pytest_runtest_setup = pytest.hookimpl(wrapper=True)(_watch)
    pytest_runtest_call = pytest.hookimpl(wrapper=True)(_watch)


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running broker of this test's own."""
    with Mosquitto(tmp_path / "mosquitto") as broker:
        yield broker


@pytest.fixture
def swtpm(tmp_path: Path) -> Iterator[Swtpm]:
    """A running TPM of this test's own: to be killed, frozen and filled."""
    with Swtpm(tmp_path / "swtpm") as tpm:
        yield tpm


@pytest.fixture(scope="session")
def session_swtpm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    """A running TPM that many tests share: to be used and left as it was found."""
    with Swtpm(tmp_path_factory.mktemp("swtpm")) as tpm:
        yield tpm


@pytest.fixture
def opened(swtpm: Swtpm, tmp_path: Path) -> Iterator[Openers]:
    """Opens ``tpm2:`` stores in this test's TPM."""
    from protection import Openers  # noqa: PLC0415 - most tests need no TPM stack

    with closing(Openers(swtpm, tmp_path)) as openers:
        yield openers


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulator taken for a TPM that one program at a time can open, as ``/dev/tpm0`` is."""
    monkeypatch.setattr("stationkey.keystore.tpm2.device.serves_one_program", lambda _: True)
