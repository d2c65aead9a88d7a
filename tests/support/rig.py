"""The daemon between its peers: what tests of the running program have in common."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Final, Self

from peers import Daemon, Mosquitto, Swtpm

SOFTWARE: Final = "software:"


class Rig:
    """A broker, a TPM where one is wanted, and a daemon that the test starts and ends; the state directory outlives it.

    Args:
        folder: where all of it keeps its files.
        tpm: whether the keys are in a TPM; else they are software keys, for what has nothing to do with where they are.
        keystore: URI of another key store than these, which the test has made.
        config: the content of the configuration file.
        broker: another than a plain Mosquitto.

    Attributes:
        daemon: ended with the rig; a test may put another in its place.
    """

    def __init__(
        self, folder: Path, *, tpm: bool, keystore: str = "", config: str = "", broker: Mosquitto | None = None
    ) -> None:
        self.folder = folder
        self.state_dir = folder / "state"
        self.config = folder / "stationkey.toml"
        self.config.write_text(config)
        self.broker = broker or Mosquitto(folder / "broker")
        self.tpm = Swtpm(folder / "tpm")
        self.has_tpm = tpm
        self.keystore = keystore or (self.tpm.uri if tpm else SOFTWARE)
        self.daemon = Daemon(folder / "daemon", *self.options())
        self._open = contextlib.ExitStack()

    def options(self, *, broker: str | None = None) -> list[str]:
        """The options of a daemon in this rig."""
        options = ["--broker", broker or self.broker.url, "--state-dir", str(self.state_dir)]
        options += ["--config", str(self.config), "--keystore", self.keystore]
        return [*options, "--allow-software-keys"] if self.keystore == SOFTWARE else options

    def peers(self) -> list[contextlib.AbstractContextManager[Any]]:
        """What is started with the rig, in this order, and ended with it."""
        return [self.broker, self.tpm] if self.has_tpm else [self.broker]

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as opening:
            for peer in self.peers():
                opening.enter_context(peer)
            opening.callback(self._kill)
            self._open = opening.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def _kill(self) -> None:
        self.daemon.kill()  # the one that is there then: a test may have put another in its place
