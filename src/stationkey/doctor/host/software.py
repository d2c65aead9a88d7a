"""The software beside Python that is needed: tpm2-tss, OpenSSL and its provider."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.doctor.host.context import Context
from stationkey.doctor.report import Verdict, failure, not_checked, ok, warning
from stationkey.doctor.runner import ask

_PATIENCE: Final = 2.0
_LOADING: Final = 4.0
"""Seconds. On a slow board, the libraries under a TPM stack take their time."""
_OLD_TSS: Final = (3, 0)
_PROVIDER: Final = "tpm2.so"
_PROVIDER_VERSION: Final = re.compile(rb"\0(\d+\.\d+\.\d+)\0")
"""In the file. The provider tells its version only once it has opened the TPM, which a doctor does not have it do."""
_CONCURRENT: Final = (1, 3, 0)
"""The first tpm2-openssl that several threads and workers can use at once."""


def look_at_tss(context: Context) -> tuple[tuple[int, ...] | None, tuple[str, bool] | None] | Verdict:
    """Load tpm2-tss in a process of its own, and the library of the TCTI."""
    program = "from tpm2_pytss.internal.versions import _versions; print(_versions.get('tss2-esys', '0'))"
    answer = ask([sys.executable, "-P", "-c", program], seconds=_LOADING)
    if answer.status is None:
        return not_checked(f"tpm2-pytss was not loaded within {_LOADING:g} s: this machine is busy, or slow")
    version = _numbers(answer.out) if answer.status == 0 and answer.out.strip() else None
    return version, _tcti_library(context.configured.keystore or "")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _tcti_library(keystore: str) -> tuple[str, bool] | None:
    kind = keystore.split(":")[1]
    if not re.fullmatch(r"[a-z0-9-]+", kind):
        return None
    try:
        ctypes.CDLL(f"libtss2-tcti-{kind}.so.0")
    except OSError:
        return kind, False
    return kind, True


def judge_tss(version: tuple[int, ...] | None, tcti: tuple[str, bool] | None) -> Verdict:
    """Judge tpm2-tss, its binding and the way to the TPM. `tcti`: its kind, and whether its library can be loaded."""
    if version is None:
        return failure(
            "tpm2-pytss, or the tpm2-tss that it stands on, cannot be loaded", "see the README, Install: libtss2-esys"
        )
    text = ".".join(map(str, version))
    if tcti is not None and not tcti[1]:
        return failure(
            f"tpm2-tss {text} has no TCTI {tcti[0]}", f"apt-get install libtss2-tcti-{tcti[0]}0, or correct keystore"
        )
    if version < _OLD_TSS:
        return warning(f"tpm2-tss {text} is old, and was never tried", "Debian 12 has 3.2.1")
    return ok(f"tpm2-tss {text}" + (f" with the TCTI {tcti[0]}" if tcti else ""))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSsl:
    """The OpenSSL that services on this machine use.

    Attributes:
        version: of the command; empty if there is none.
        modules: where its providers are; empty if that is not known.
        complaint: why the tpm2 provider cannot be loaded, empty if it can; None if it is not there.
        provider: its version; empty if that is not known.
        serves: whether there is an active key for a TLS server.
    """

    version: str = ""
    modules: str = ""
    complaint: str | None = None
    provider: str = ""
    serves: bool = False


def look_at_openssl(context: Context) -> tuple[OpenSsl]:
    """Ask for the version, and load the provider in a process of its own. The TPM is not asked for that."""
    said = ask(["openssl", "version", "-v", "-m"], seconds=_PATIENCE).out
    version = said.splitlines()[0].split()[1] if said.startswith("OpenSSL ") else ""
    found = re.search(r'MODULESDIR: "([^"]*)"', said)
    modules = os.environ.get("OPENSSL_MODULES") or (found[1] if found else "")
    path, complaint, provider = Path(modules, _PROVIDER), None, None
    if modules and path.is_file():
        program = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW).OSSL_provider_init"
        answer = ask([sys.executable, "-I", "-c", program, str(path)], seconds=_PATIENCE)
        complaint = "" if answer.status == 0 else [*answer.error.strip().splitlines(), "no reason given"][-1]
        with suppress(OSError):
            provider = _PROVIDER_VERSION.search(path.read_bytes())
    seen = OpenSsl(
        version=version,
        modules=modules,
        complaint=complaint,
        provider=provider[1].decode() if provider else "",
        serves=any(Path(context.settings.state_dir, DIRECTORY_NAME).glob("v2g*.pem")),
    )
    return (seen,)


def judge_openssl(seen: OpenSsl) -> Verdict:
    """Judge whether a TLS service can use the active keys. The daemon itself does not need it."""
    what = f"OpenSSL {seen.version}"
    if not seen.version:
        told, advice = "there is no command openssl", "apt-get install openssl"
    elif _numbers(seen.version) < (3,):
        told, advice = f"{what} has no providers", "3.0 is needed"
    elif seen.complaint is None:
        told, advice = (
            f"{what} has no tpm2 provider ({seen.modules or 'directory not known'})",
            "apt-get install tpm2-openssl",
        )
    elif seen.complaint:
        told, advice = f"the tpm2 provider cannot be loaded: {seen.complaint}", "reinstall tpm2-openssl"
    elif seen.serves and seen.provider and _numbers(seen.provider) < _CONCURRENT:
        told = (
            f"tpm2-openssl {seen.provider} fails where a TLS server uses the key in several threads or workers at once"
        )
        advice = "give the server one thread and one worker (docs/tls.md), or install 1.3.0 or newer"
    else:
        provider = f"tpm2 provider {seen.provider}".rstrip()
        return ok(f"{what} has the {provider}, and it can be loaded")
    return warning(told, f"{advice}; only services that use an active key need it, not the daemon")
