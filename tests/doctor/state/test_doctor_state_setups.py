"""The doctor on state directories broken in real ways."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import tempfile
from contextlib import closing
from pathlib import Path

import pytest
from doctors import NOBODY, as_nobody, look, used, write_config
from peers import Daemon, Mosquitto, Swtpm

from stationkey.doctor.report import Level
from stationkey.errors import StationKeyError
from stationkey.system.state_dir import DATABASE_NAME, StateDirectory


class TestState:
    def test_a_damaged_ledger_is_a_failure(self, tmp_path: Path) -> None:
        database = used(tmp_path) / DATABASE_NAME
        content = bytearray(database.read_bytes())
        content[4096:8192] = bytes(4096)
        database.write_bytes(content)
        found = look(tmp_path)
        assert found.level("state.ledger") is Level.FAILURE
        assert found.reasons("state.ledger") == {"ledger_damaged"}

    @pytest.mark.parametrize(
        ("content", "level"), [(b"", Level.WARNING), (b"no database", Level.FAILURE), (None, Level.FAILURE)]
    )
    def test_what_is_no_ledger_is_told(self, tmp_path: Path, content: bytes | None, level: Level) -> None:
        (tmp_path / "state").mkdir(mode=0o700)
        if content is None:
            (tmp_path / "state" / DATABASE_NAME).mkdir()
        else:
            (tmp_path / "state" / DATABASE_NAME).write_bytes(content)
        assert look(tmp_path).level("state.ledger") is level

    def test_a_ledger_that_is_held_by_another_program_keeps_no_check_waiting(self, tmp_path: Path) -> None:
        database = used(tmp_path) / DATABASE_NAME
        with closing(sqlite3.connect(database, isolation_level=None)) as holder:
            holder.execute("PRAGMA journal_mode=DELETE")
            holder.execute("BEGIN EXCLUSIVE")
            holder.execute("UPDATE meta SET value = value")
            found = look(tmp_path)
        assert found.level("clock.time") is Level.OK
        assert found.level("state.directory") is Level.OK

    def test_a_daemon_with_other_settings_than_those_examined_is_told(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        config = write_config(tmp_path, f'broker = "{mosquitto.url}"\nkeystore = "{swtpm.uri}"\n')
        options = {"broker": None, "keystore": None, "config_file": config}
        with Daemon(tmp_path / "daemon", "--config", str(config), "--state-dir", str(tmp_path / "state")):
            assert look(tmp_path, **options).level("state.settings") is Level.OK
            os.utime(config, (2**32, 2**32))
            assert look(tmp_path, **options).reasons("state.settings") == {"changed"}
            assert f"--config {config}" in look(tmp_path).text("state.settings")

    def test_a_daemon_that_was_stopped_is_a_failure_with_the_way_out(
        self, tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm
    ) -> None:
        """It has the state directory, its session at the broker and the TPM, and answers nothing."""
        options = {"broker": mosquitto.url, "keystore": swtpm.uri}
        given = [word for name, value in options.items() for word in (f"--{name}", value)]
        with Daemon(tmp_path / "daemon", *given, "--state-dir", str(tmp_path / "state")) as daemon:
            daemon.freeze()
            found = look(tmp_path, **options)
            assert found.level("state.daemon") is Level.FAILURE
            assert daemon.process is not None
            assert f"kill -CONT {daemon.process.pid}" in found.text("state.daemon")
            daemon.thaw()

    def test_a_ledger_of_a_newer_version_is_a_failure(self, tmp_path: Path) -> None:
        with closing(sqlite3.connect(used(tmp_path) / DATABASE_NAME)) as database:
            database.execute("PRAGMA user_version=99")
        assert look(tmp_path).reasons("state.ledger") == {"ledger_newer"}

    @pytest.mark.parametrize(
        ("mode", "level"), [(0o700, Level.OK), (0o755, Level.WARNING), (0o777, Level.FAILURE), (0o770, Level.FAILURE)]
    )
    def test_who_may_enter_the_state_directory_is_told(self, tmp_path: Path, mode: int, level: Level) -> None:
        used(tmp_path).chmod(mode)
        assert look(tmp_path).level("state.directory") is level

    @pytest.mark.parametrize(
        ("harm", "name", "reason"),
        [
            pytest.param("hard link", "state.files", "state_file_foreign", id="the ledger has a second name"),
            pytest.param(
                "group", "state.directory", "state_dir_exchangeable", id="a group may write in the directory above"
            ),
            pytest.param("shared", "state.directory", "state_dir_open", id="it is open, and not of its own"),
            pytest.param("loop", "state.directory", "state_dir_unusable", id="a link to itself"),
            pytest.param("file", "state.directory", "state_dir_unusable", id="below a file"),
            pytest.param("long", "state.directory", "state_dir_unusable", id="a name that is too long"),
        ],
    )
    def test_what_the_daemon_would_not_take_at_its_start_is_a_failure(
        self, tmp_path: Path, harm: str, name: str, reason: str
    ) -> None:
        """The daemon is asked by the same rules, on the same directory: the two must not disagree."""
        above = tmp_path / "above"
        above.mkdir()
        path = above / "state"
        match harm:
            case "hard link":
                path = used(above)
                os.link(path / DATABASE_NAME, tmp_path / "second")
            case "group":
                path.mkdir(mode=0o700)
                above.chmod(0o775)
                if os.geteuid() == 0:  # the own group of a user may be his alone, and so be no other
                    os.chown(above, 0, 4711)
                else:
                    above.chmod(0o777)
            case "shared":
                path.mkdir(mode=0o755)
                (path / "README").touch()
            case "loop":
                path.symlink_to(path)
            case "file":
                (above / "file").touch()
                path = above / "file" / "state"
            case "long":
                path = above / ("x" * 300)
        with pytest.raises(StationKeyError):
            StateDirectory(path)
        found = look(tmp_path, state_dir=path)
        assert found.level(name) is Level.FAILURE
        assert found.reasons(name) == {reason}

    @pytest.mark.skipif(os.geteuid() != 0, reason="to give a directory away takes root")
    @pytest.mark.parametrize("which", ["the directory above", "a link on the way"])
    def test_what_belongs_to_another_user_on_the_way_is_a_failure_with_the_way_out(
        self, tmp_path: Path, which: str
    ) -> None:
        above = tmp_path / "above"
        above.mkdir()
        path = above / "state"
        if which == "the directory above":
            path.mkdir(mode=0o700)
            os.chown(above, NOBODY, NOBODY)
        else:
            (tmp_path / "real").mkdir(mode=0o700)
            path.symlink_to(tmp_path / "real")
            os.lchown(path, NOBODY, NOBODY)
        found = look(tmp_path, state_dir=path)
        assert found.level("state.directory") is Level.FAILURE
        (advice,) = (finding.advice for finding in found["state.directory"])
        subprocess.run(advice.split(",")[0].split(), check=True)
        assert look(tmp_path, state_dir=path).level("state.directory") is Level.OK

    def test_links_in_the_state_directory_are_a_failure(self, tmp_path: Path) -> None:
        state = used(tmp_path)
        (state / "lock").unlink(missing_ok=True)
        (state / "lock").symlink_to("/etc/passwd")
        found = look(tmp_path)
        assert found.level("state.files") is Level.FAILURE
        assert found.reasons("state.files") == {"state_file_foreign"}

    def test_a_ledger_that_is_a_link_is_not_followed(self, tmp_path: Path) -> None:
        state = used(tmp_path)
        (state / DATABASE_NAME).rename(tmp_path / "elsewhere")
        (state / DATABASE_NAME).symlink_to(tmp_path / "elsewhere")
        assert look(tmp_path).level("state.ledger") is Level.FAILURE

    @pytest.mark.parametrize(
        ("harm", "level", "reason"),
        [
            ("replaced", Level.FAILURE, "differs"),
            ("removed", Level.FAILURE, "missing"),
            ("added", Level.WARNING, "unknown_file"),
        ],
    )
    def test_what_active_has_is_held_against_the_ledger(
        self, tmp_path: Path, harm: str, level: Level, reason: str
    ) -> None:
        active = used(tmp_path) / "active"
        (file,) = active.glob("*.pem")
        match harm:
            case "replaced":
                file.write_text("another key")
            case "removed":
                file.unlink()
            case _:
                (active / "\x1b[31mstray").touch()
        found = look(tmp_path)
        assert found.level("state.active") is level
        assert found.reasons("state.active") == {reason}
        assert harm != "added" or "\\u001b[31mstray" in found.text("state.active")

    @pytest.mark.skipif(os.geteuid() != 0, reason="to be another user takes root")
    @pytest.mark.parametrize(("above", "mode"), [(0o755, 0o700), (0o755, 0o755), (0o700, 0o700)])
    def test_another_user_sees_less_and_gets_no_advice_that_would_harm(self, above: int, mode: int) -> None:
        """What the state directory of a daemon needs is not known to a user who may not look into it."""
        with tempfile.TemporaryDirectory(prefix="stationkey-") as name:  # where others may go, too
            used(Path(name)).chmod(mode)
            Path(name).chmod(above)
            found = as_nobody(Path(name))
        assert found.reasons("machine.user") == found.reasons("state.ledger") == {"hidden"}
        assert found.reasons("state.directory") <= {"hidden", "others_read"}
        assert found.level("clock.time") is Level.OK
        said = " ".join(
            finding.advice for name in ("directory", "files", "active") for finding in found[f"state.{name}"]
        )
        assert "chown" not in said

    def test_no_check_that_fails_takes_another_with_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> object:
            raise ZeroDivisionError("hunter2")

        monkeypatch.setattr("stationkey.doctor.state.checks._place", broken)
        found = look(tmp_path)
        assert "ZeroDivisionError" in found.text("state.disk")
        assert "hunter2" not in found.text("state.disk")
        assert found.level("state.disk") is Level.NOT_CHECKED
        assert found.level("state.directory") is Level.WARNING
