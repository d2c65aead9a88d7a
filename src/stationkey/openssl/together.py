"""Handshakes several at a time, which tpm2-openssl below 1.3.0 fails: its threads share one connection to the TPM."""

from __future__ import annotations

import re
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

from stationkey.openssl.check import KeyFile, chain_of, holding, shake, use_of
from stationkey.openssl.setups import Setup

AT_A_TIME: Final = 6
HANDSHAKES: Final = 12
"""With tpm2-openssl 1.1.1 and a thread for each connection, more than half of them fail."""
_PATIENCE: Final = 5.0
"""Seconds for OpenSSL to list its providers."""


@dataclass(frozen=True, slots=True)
class Together:
    """What became of handshakes with a server that has a thread for each connection.

    Attributes:
        failed: how many of `HANDSHAKES` failed.
        module: package and version of OpenSSL's module.
    """

    failed: int
    module: str

    def __str__(self) -> str:
        result = "ok"
        if self.failed:
            advice = f"with this {self.module}, give a TLS server one thread and one worker process (docs/tls.md)"
            result = f"warning: {self.failed} failed; {advice}"
        return f"{HANDSHAKES} handshakes, {AT_A_TIME} at a time: {result}"


def check_together(file: KeyFile, *, setup: Setup, password: bytes = b"") -> list[Together]:
    """Make TLS handshakes, `AT_A_TIME` at a time, with a server that has a thread for each connection.

    To be called after `check`, which raises what fails one at a time. A server whose threads break each other's calls
    may crash and leave its key in the TPM, where only a resource manager removes it.

    Returns:
        Nothing for the key of a client, or in a TPM without a resource manager.
    """
    chain = chain_of(file)
    use = use_of(file, chain)
    if use.role == "client" or not setup.shared:
        return []
    with (
        holding(setup, use, file, 0, password, threaded=HANDSHAKES) as holder,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):

        def fails(version: str) -> bool:
            try:
                shake(use, ssl.TLSVersion[version], chain, port, None)
            except (OSError, ValueError):
                return True
            return False

        try:
            holder.expect_loaded()
            port = int(holder.line())
        except ValueError:
            failed = HANDSHAKES
        else:
            failed = sum(pool.map(fails, islice(cycle(use.versions), HANDSHAKES)))
        holder.end()
        version = _provider_version(setup, holder.variables) if failed else ""
    return [Together(failed, f"{setup.package} {version}".rstrip())]


def _provider_version(setup: Setup, variables: dict[str, str]) -> str:
    """Return the version of the provider, as OpenSSL lists it; empty if it does not."""
    try:
        listed = subprocess.run(
            ["openssl", "list", "-providers"],  # noqa: S607 - as PATH has it, for a message
            env=variables,
            capture_output=True,
            text=True,
            timeout=_PATIENCE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(rf"^  {setup.module}\n(?:    .*\n)*?    version: (\S+)", listed.stdout, re.MULTILINE)
    return found[1] if found else ""
