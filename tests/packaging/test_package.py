"""What can be told of the Debian package without building it; ``make deb-check`` installs, starts and purges it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from unit import ROOT, Unit

DEBIAN = ROOT / "packaging/debian"
BUILD = (ROOT / "scripts/deb").read_text()
SCRIPTS = ("postinst", "prerm", "postrm")


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_maintainer_script_is_a_program_for_any_shell(name: str) -> None:
    """/bin/sh is dash on Debian, and it is asked here."""
    script = DEBIAN / name
    assert script.read_text().startswith("#!/bin/sh\n")
    assert "\nset -e\n" in script.read_text()
    subprocess.run(["/bin/sh", "-n", str(script)], check=True)


@pytest.mark.parametrize("name", ["deb", "deb-check", "deb-site-check", "setup", "pin"])
def test_a_script_that_builds_is_a_program_for_bash(name: str) -> None:
    script = ROOT / "scripts" / name
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_dpkg_takes_the_control_file_and_the_scripts(tmp_path: Path) -> None:
    """With values in place of those that the build computes."""
    control = tmp_path / "root/DEBIAN"
    control.mkdir(parents=True)
    values = {"VERSION": "0.1.0", "ARCHITECTURE": "all", "SIZE": "1", "DEPENDS": "libc6 (>= 2.34)"}
    text = (DEBIAN / "control.in").read_text()
    assert set(re.findall(r"@(\w+)@", text)) == values.keys()
    for name, value in values.items():
        text = text.replace(f"@{name}@", value)
    (control / "control").write_text(text)
    for name in SCRIPTS:
        (control / name).write_text((DEBIAN / name).read_text())
        (control / name).chmod(0o755)
    package = tmp_path / "stationkey.deb"
    subprocess.run(["dpkg-deb", "--build", str(tmp_path / "root"), str(package)], check=True, capture_output=True)
    depends = subprocess.run(
        ["dpkg-deb", "--field", str(package), "Depends"], check=True, capture_output=True, text=True
    )
    assert depends.stdout.strip() == "libc6 (>= 2.34), adduser, tpm-udev"


def test_the_user_and_the_rights_are_those_of_the_unit() -> None:
    unit, postinst = Unit(), (DEBIAN / "postinst").read_text()
    user, group = unit.one("User"), unit.one("Group")
    assert f"addgroup --quiet --system {group}\n" in postinst
    assert re.search(rf"adduser --quiet --system --ingroup {group} .*?{user}\n", postinst, re.DOTALL)
    assert f"adduser --quiet {user} {unit.one('SupplementaryGroups')}\n" in postinst
    state = f"-m {unit.one('StateDirectoryMode')} -o {user} -g {group} /var/lib/{unit.one('StateDirectory')}\n"
    assert state in postinst
    configuration = f"/etc/{unit.one('ConfigurationDirectory')}"
    assert f"rights {configuration} root:{group} {unit.one('ConfigurationDirectoryMode')}\n" in postinst
    assert f"rights {configuration}/stationkey.toml root:{group} 0640\n" in postinst


def test_the_command_is_where_the_unit_starts_it_and_listens_to_no_environment() -> None:
    command = (DEBIAN / "stationkey").read_text()
    assert command.startswith("#!/usr/lib/stationkey/bin/python3 -I\n")
    assert "home=$root/usr/lib/stationkey\n" in BUILD
    assert f'"$root{Unit().words("ExecStart")[0]}"' in BUILD
    compile(command, "stationkey", "exec")


def test_only_purging_destroys_keys_and_only_where_they_were_put() -> None:
    postrm = (DEBIAN / "postrm").read_text()
    removals = [line.strip() for line in postrm.splitlines() if line.strip().startswith("rm ")]
    assert removals == ["rm -rf --one-file-system /var/lib/stationkey"]
    purge = postrm.index('if [ "$1" = purge ]')
    assert postrm.index(removals[0]) > postrm.index("! -L /var/lib/stationkey") > purge
    for name in ("postinst", "prerm"):
        assert not re.search(r"^\s*rm ", (DEBIAN / name).read_text(), re.MULTILINE)


def test_it_is_built_of_what_is_pinned_for_a_station_and_without_fapi() -> None:
    assert "scripts/without-fapi" in BUILD
    assert "--require-hashes" in BUILD
    assert "requirements/station.txt" in BUILD
    assert "requirements/runtime.txt" not in BUILD


def test_that_of_a_site_has_the_same_versions_and_what_reaches_postgresql_and_tokens() -> None:
    site, runtime = (pins_of(ROOT / "requirements" / name) for name in ("site.txt", "runtime.txt"))
    assert pins_of(ROOT / "requirements/station.txt") <= site <= runtime
    assert {pin.partition("==")[0] for pin in site} >= {"psycopg", "python-pkcs11"}
    assert {pin.partition("==")[0] for pin in site}.isdisjoint({"ocpp", "websockets"})
    assert "more=libpq5" in BUILD  # which psycopg loads by its name


def pins_of(file: Path) -> set[str]:
    return set(re.findall(r"^[\w.-]+==[\w.]+", file.read_text(), re.MULTILINE))
