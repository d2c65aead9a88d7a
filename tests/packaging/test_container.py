"""The container file, as text: what it runs, as whom, and that nothing it names is missing."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
LINES: Final = [
    line
    for line in (ROOT / "packaging/container/Dockerfile").read_text().replace("\\\n", " ").splitlines()
    if line and not line.startswith("#")
]
DOCUMENT: Final = (ROOT / "docs/container.md").read_text()


def instructions(name: str) -> list[str]:
    return [line.removeprefix(name).strip() for line in LINES if line.split()[0] == name]


def test_both_stages_are_debian_slim_of_one_release() -> None:
    assert [line.split()[0] for line in instructions("FROM")] == ["debian:${DEBIAN}-slim"] * 2
    assert instructions("ARG") == ["DEBIAN=13"]


def test_it_runs_as_a_user_other_than_root_who_owns_the_volume() -> None:
    [user] = instructions("USER")
    uid, gid = user.split(":")
    [volume] = instructions("VOLUME")

    assert "0" not in {uid, gid}
    assert any(f"install -d -m 0700 -o {uid} -g {gid} {volume}" in line for line in instructions("RUN"))


def test_the_state_directory_is_one_in_the_volume() -> None:
    variables = dict(pair.split("=", 1) for line in instructions("ENV") for pair in shlex.split(line))
    [volume] = instructions("VOLUME")

    assert Path(variables["STATIONKEY_STATE_DIR"]).parent == Path(volume)


def test_its_variables_are_ones_that_the_daemon_reads() -> None:
    text = subprocess.run(
        [ROOT / ".venv/bin/stationkey", "serve", "--help"], capture_output=True, text=True, check=True
    ).stdout
    named = set(re.findall(r"\bSTATIONKEY_[A-Z_]+", "\n".join(LINES) + DOCUMENT))

    assert named
    assert {name for name in named if name not in text} == set()


def test_what_it_builds_is_the_package_of_the_makefile() -> None:
    assert "make deb" in instructions("RUN")
    assert re.search(r"^deb:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert all("curl" not in line and "ADD" not in line for line in LINES), "nothing comes from elsewhere"


def test_the_document_and_the_container_file_name_the_same_user_and_directory() -> None:
    [user] = instructions("USER")
    assert f"--user {user}" in DOCUMENT
    assert "/data/stationkey" in DOCUMENT
    assert "/dev/tpmrm0" in DOCUMENT


def test_the_script_refuses_in_words_where_there_is_no_builder(tmp_path: Path) -> None:
    (tmp_path / "bash").symlink_to("/bin/bash")
    (tmp_path / "dirname").symlink_to("/usr/bin/dirname")
    done = subprocess.run(
        ["/bin/bash", ROOT / "scripts/container"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "podman" in done.stderr
