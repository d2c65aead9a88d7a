"""The daemon between peers of a test's own, on a state directory that outlives it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from asker import Asker
from peers import Daemon, Mosquitto, Swtpm

CONFIG: Final = """\
[policy]
requests_per_minute = 0
[deadlines]
ec = 2.0
rsa = 20.0
[lifecycle]
pending_limit = 100
pending_total = 10000
"""
"""Bounds so wide that no key of a test has to make room for another, a deadline that a test can wait for, and no limit
on how often a test may ask."""
SOFTWARE: Final = "software:"


class Scene:
    """A broker, a TPM where one is wanted, an asker, and a daemon that the test starts and ends as it likes.

    Args:
        folder: where all of it keeps its files.
        tpm: whether the keys are in a TPM; else they are software keys, for what has nothing to do with where they are.
    """

    def __init__(self, folder: Path, *, tpm: bool) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.config = folder / "config.toml"
        self.config.write_text(CONFIG)
        self.broker = Mosquitto(folder / "broker")
        self.tpm = Swtpm(folder / "tpm")
        self.has_tpm = tpm
        self.keystore = self.tpm.uri if tpm else SOFTWARE
        self.daemon = Daemon(folder / "daemon", *self.options())
        self.asker = Asker(self.broker)
        self._open = contextlib.ExitStack()

    def options(self, *, broker: str | None = None) -> list[str]:
        """The options of a daemon in this scene."""
        options = ["--broker", broker or self.broker.url, "--state-dir", str(self.state_dir)]
        options += ["--config", str(self.config), "--keystore", self.keystore]
        return options if self.has_tpm else [*options, "--allow-software-keys"]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            opening.enter_context(self.broker)
            if self.has_tpm:
                opening.enter_context(self.tpm)
            opening.enter_context(self.asker)
            opening.callback(self._kill)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def _kill(self) -> None:
        self.daemon.kill()  # the one that is there then: a test may have put another in its place
