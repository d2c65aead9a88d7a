"""The software beside Python that is needed: tpm2-tss, OpenSSL and its provider."""

from __future__ import annotations

import ctypes
import os
import re
import ssl
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stationkey.doctor.host.context import Context
from stationkey.doctor.report import Verdict, failure, not_checked, ok, warning
from stationkey.doctor.runner import ask

_PATIENCE: Final = 2.0
_LOADING: Final = 4.0
"""Seconds. On a slow board, the libraries under a TPM stack take their time."""
_OLD_TSS: Final = (3, 0)
_PROVIDERS: Final = ("tpm2.so",)


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
    """tpm2-tss, its binding and the way to the TPM. `tcti`: its kind, and whether its library can be loaded."""
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
        version: of the command; empty where there is none.
        modules: where its providers are; empty where that is not known.
        provider: whether the tpm2 provider is there.
        loads: whether it can be loaded; the TPM is not asked for that.
        complaint: why not.
    """

    version: str = ""
    modules: str = ""
    provider: bool = False
    loads: bool = False
    complaint: str = ""


def look_at_openssl(_: Context) -> tuple[OpenSsl]:
    """Ask for the version, and load the provider in a process of its own."""
    status = ask(["openssl", "version", "-v", "-m"], seconds=_PATIENCE)
    return (_openssl(status.out if status.status == 0 else ""),)


def _openssl(said: str) -> OpenSsl:
    version = said.splitlines()[0].split()[1] if said.startswith("OpenSSL ") else ""
    found = re.search(r'MODULESDIR: "([^"]*)"', said)
    modules = os.environ.get("OPENSSL_MODULES") or (found[1] if found else "")
    for library in _PROVIDERS:
        path = Path(modules, library)
        if not modules or not path.is_file():
            continue
        program = "import ctypes, os, sys; ctypes.CDLL(sys.argv[1], mode=os.RTLD_NOW).OSSL_provider_init"
        answer = ask([sys.executable, "-I", "-c", program, str(path)], seconds=_PATIENCE)
        lines = answer.error.strip().splitlines()
        return OpenSsl(
            version=version,
            modules=modules,
            provider=True,
            loads=answer.status == 0,
            complaint=lines[-1] if lines else "",
        )
    return OpenSsl(version=version, modules=modules)


def judge_openssl(seen: OpenSsl) -> Verdict:
    """Whether a TLS service can use the active keys. The daemon itself needs nothing of it."""
    library = ssl.OPENSSL_VERSION.split()[1]
    only = "only services that use an active key need it, not the daemon"
    if not seen.version:
        return warning(f"there is no command openssl (Python has {library})", f"apt-get install openssl; {only}")
    if _numbers(seen.version) < (3,):
        return warning(f"OpenSSL {seen.version} has no providers", f"3.0 is needed; {only}")
    if not seen.provider:
        return warning(
            f"OpenSSL {seen.version} has no tpm2 provider ({seen.modules or 'directory not known'})",
            f"apt-get install tpm2-openssl; {only}",
        )
    if not seen.loads:
        return warning(f"the tpm2 provider cannot be loaded: {seen.complaint}", f"install tpm2-openssl anew; {only}")
    return ok(f"OpenSSL {seen.version} has the tpm2 provider, and it can be loaded")
