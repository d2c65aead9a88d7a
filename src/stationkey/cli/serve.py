"""``stationkey serve``. The daemon and its libraries are imported when it starts, not for ``--help``."""

from __future__ import annotations

import gc
import signal
import sys

import click

from stationkey.cli._options import Configured, configured
from stationkey.system import logs
from stationkey.system.interrupts import EXIT_INTERRUPTED


@click.command()
@configured("broker", "keystore", "allow_software_keys", "state_dir", "topic_prefix", "log_format", serves=True)
def serve(settings: Configured) -> None:
    """Run the daemon: answer generate_csr until stopped.

    Options on the command line win over the environment, which wins over the configuration file.

    \b
    Exit status: 0 after SIGTERM, 130 after Ctrl-C, 2 wrong usage,
    1 anything else.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    gc.disable()  # nothing is garbage yet; `daemon` enables it when it is ready
    settled = settings()
    from stationkey import daemon  # noqa: PLC0415 - see the module's docstring

    logs.set_up(settled.log_format)
    if daemon.run(settled) is signal.SIGINT:
        sys.exit(EXIT_INTERRUPTED)
