"""``stationkey serve``, for a command line that `stationkey.serving` does not read itself."""

from __future__ import annotations

import gc
import sys

import click

from stationkey.cli._options import Configured, configured, option
from stationkey.serving import PLACES, run


@click.command()
@option("--site", "site", is_flag=True, help="Refuse to start without [site] stations in the configuration.")
@configured(*PLACES, serves=True)
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
    sys.exit(run(settings(), site=site))
