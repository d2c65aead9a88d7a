"""``stationkey serve``. The daemon and its libraries are imported when it starts, not for ``--help``."""

from __future__ import annotations

import gc
import signal
import sys

import click

from stationkey.cli._options import Configured, configured, option
from stationkey.errors import ConfigurationError
from stationkey.system import logs
from stationkey.system.interrupts import EXIT_INTERRUPTED


@click.command()
@option("--site", "site", is_flag=True, help="Refuse to start without [site] stations in the configuration.")
@configured("broker", "keystore", "allow_software_keys", "state_dir", "topic_prefix", "log_format", serves=True)
def serve(settings: Configured, *, site: bool) -> None:
    """Run the daemon: answer generate_csr until stopped.

    With [site] in the configuration it serves many stations; on PostgreSQL it
    shares them with other daemons.

    Options on the command line win over the environment, which wins over the configuration file.

    \b
    Exit status: 0 after SIGTERM, 130 after Ctrl-C, 2 wrong usage,
    1 anything else.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    gc.disable()  # nothing is garbage yet; `daemon` enables it when it is ready
    settled = settings()
    if site and not settled.site.stations:
        raise ConfigurationError(
            "no site is configured: [site] stations is missing",
            reason="site_missing",
            hint="add it to the configuration file, or leave out --site",
        )
    from stationkey import daemon  # noqa: PLC0415 - see the module's docstring

    logs.set_up(settled.log_format)
    if settled.ledger:
        from stationkey.site.site import run  # noqa: PLC0415 - same

        received = run(settled)
    else:
        received = daemon.run(settled)
    if received is signal.SIGINT:
        sys.exit(EXIT_INTERRUPTED)
