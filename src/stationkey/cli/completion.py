"""``stationkey completion``."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script for the shell.

    For bash: stationkey completion bash > /etc/bash_completion.d/stationkey
    """
    complete = get_completion_class(shell)
    assert complete is not None  # the argument's choice
    click.echo(
        complete(click.get_current_context().find_root().command, {}, "stationkey", "_STATIONKEY_COMPLETE").source()
    )
