"""``scripts/setup``, with programs in place of apt's and Python's that only say that they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
INSTALLED: Final = "#!/bin/sh\necho install ok installed\n"
PIP: Final = "#!/bin/sh\ntrap 'exit 2' INT\necho pip was called >&2\nwhile :; do sleep 0.1; done\n"
"""Ends as pip does when Ctrl-C cancels it: like one that failed."""
PYTHON: Final = """#!/bin/sh
case "$*" in
  *sysconfig*) echo "/usr as Debian's" ;;
  *venv*--clear*) mkdir -p .venv/bin && cp "$(dirname "$0")/pip" .venv/bin/python ;;
  *venv\\ *) exit 1 ;;
esac
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A tree with what set-up reads, and the programs that it calls in bin/."""
    for name in ("requirements", "pyproject.toml", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("scripts", "bin"):
        (tmp_path / name).mkdir()
    for name in ("setup", "without-fapi"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts")
    for name, text in {"dpkg-query": INSTALLED, "python3": PYTHON, "pip": PIP}.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


@contextmanager
def start(tree: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """Start set-up as a shell does, in a group of processes of its own, which ends with the block."""
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    command = [str(tree / "scripts/setup"), what]
    environment = os.environ | {"PATH": path}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True) as setup:
        try:
            yield setup
        finally:
            with suppress(ProcessLookupError):
                os.killpg(setup.pid, signal.SIGKILL)


def test_ctrl_c_in_pip_is_not_a_package_index_that_fails(tree: Path) -> None:
    with start(tree, "demo") as setup:
        assert setup.stderr is not None
        while "pip was called" not in (line := setup.stderr.readline()):
            assert line, "it ended before"
        os.killpg(setup.pid, signal.SIGINT)
        said = setup.stderr.read()
        setup.wait()
    assert (setup.returncode, said) == (130, "")


def test_what_builds_the_package_leaves_the_virtual_environment_alone(tree: Path) -> None:
    stamp = tree / ".venv/.stamp"
    stamp.parent.mkdir()
    stamp.write_text("of another target")
    (tree / "bin/pip").write_text("#!/bin/sh\nexit 1\n")
    with start(tree, "package") as setup:
        setup.communicate()
    assert setup.returncode == 0
    assert [path.name for path in stamp.parent.iterdir()] == [stamp.name]
    assert stamp.read_text() == "of another target"
    (deb,) = (line for line in (ROOT / "Makefile").read_text().split("\n\n") if line.startswith("deb:"))
    assert deb.split() == ["deb:", "@scripts/setup", "package", "@scripts/deb"]
    assert ".venv" not in (ROOT / "scripts/deb").read_text()
