"""Handshakes several at a time, which tpm2-openssl below 1.3.0 fails: its threads share one connection to the TPM."""

from __future__ import annotations

import os
import re
import ssl
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Final

from stationkey.keystore.tpm2.device import is_shared
from stationkey.openssl.check import KeyFile, chain_of, environment, holding, shake, use_of

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
        provider: version of tpm2-openssl; empty if it is not known, or nothing failed.
    """

    failed: int
    provider: str = ""

    def __str__(self) -> str:
        result = "ok"
        if self.failed:
            provider = f"tpm2-openssl {self.provider}".rstrip()
            advice = f"with this {provider}, give a TLS server one thread and one worker process (docs/tls.md)"
            result = f"warning: {self.failed} failed; {advice}"
        return f"{HANDSHAKES} handshakes, {AT_A_TIME} at a time: {result}"


def check_together(file: KeyFile, *, configuration: Path, tcti: str, password: bytes = b"") -> list[Together]:
    """Make TLS handshakes, `AT_A_TIME` at a time, with a server that has a thread for each connection.

    To be called after `check`, which raises what fails one at a time. A server whose threads break each other's calls
    may crash and leave its key in the TPM, where only a resource manager removes it.

    Returns:
        Nothing for the key of a client, or without a resource manager.
    """
    chain = chain_of(file)
    use = use_of(file, chain)
    if use.role == "client" or not is_shared(tcti):
        return []
    variables = {**os.environ, **environment(configuration, tcti=tcti)}
    with (
        holding(use, file, 0, variables, password, threaded=HANDSHAKES) as holder,
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
    return [Together(failed, _provider_version(variables) if failed else "")]


def _provider_version(variables: dict[str, str]) -> str:
    """The version of tpm2-openssl, as OpenSSL lists it; empty if it does not."""
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
    found = re.search(r"^  tpm2\n(?:    .*\n)*?    version: (\S+)", listed.stdout, re.MULTILINE)
    return found[1] if found else ""
