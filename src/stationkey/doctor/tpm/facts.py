"""What a TPM answers to `stationkey.doctor.tpm.probe`, and the numbers in it by their names in the standard."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import Settings, TpmTerms
from stationkey.contract.profiles import CertificateType
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.probes import Answers, ask_device
from stationkey.doctor.report import Finding, unknown
from stationkey.doctor.state.checks import contents_soon
from stationkey.errors import ConfigurationError
from stationkey.keystore.tpm2 import return_codes as rc

# TPM_PT [TPM 2.0 part 2, 6.13].
PT_FAMILY: Final = 0x100
PT_REVISION: Final = 0x102
PT_MAKER: Final = (0x105, 0x106, 0x107, 0x108, 0x109)
"""Manufacturer, and vendor strings."""
PT_FIRMWARE: Final = (0x10B, 0x10C)
PT_PERMANENT: Final = 0x200
PT_STARTUP_CLEAR: Final = 0x201
PT_SESSIONS_AVAIL: Final = (0x204, 0x206)
"""Loaded, and active."""
PT_TRANSIENT_AVAIL: Final = 0x207
PT_PERSISTENT_AVAIL: Final = 0x209
PT_LOCKOUT: Final = (0x20E, 0x20F, 0x210, 0x211)
"""Tries used, tries allowed, seconds until one is forgotten, seconds of a lockout."""

# TPMA_PERMANENT and TPMA_STARTUP_CLEAR [TPM 2.0 part 2, 8.6 and 8.7].
OWNER_AUTH_SET: Final = 1 << 0
ENDORSEMENT_AUTH_SET: Final = 1 << 1
LOCKOUT_AUTH_SET: Final = 1 << 2
DISABLE_CLEAR: Final = 1 << 8
IN_LOCKOUT: Final = 1 << 9
STORAGE_ENABLED: Final = 1 << 1
ENDORSEMENT_ENABLED: Final = 1 << 2

# TPM_ALG_ID and TPM_ECC_CURVE [TPM 2.0 part 2, 6.3 and 6.4].
ALG_AES: Final = 0x06
ALG_ECC: Final = 0x23
ALG_CFB: Final = 0x43
HASHES: Final = {"sha1": 0x04, "sha256": 0x0B, "sha384": 0x0C, "sha512": 0x0D}
P256: Final = 0x03

# TPMA_OBJECT [TPM 2.0 part 2, 8.3].
NODA: Final = 1 << 10
RESTRICTED: Final = 1 << 16
SIGN: Final = 1 << 18
FAILURE_MODE: Final = 0x101
NEEDS_TEST: Final = 0x153
MANAGED: Final = re.compile(r"/dev/tpmrm\d+")
BARE: Final = re.compile(r"/dev/tpm\d+")
PATIENCE: Final = 5.0
"""Seconds for all questions together. The slowest of them takes a chip some tens of milliseconds."""
_MAX_KEYS: Final = 16
MANAGER_ADVICE: Final = 'keystore = "tpm2:device:/dev/tpmrm0", or tpm2-abrmd and "tpm2:tabrmd"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """A TCTI, taken apart.

    Attributes:
        name: the kind: ``device``, ``swtpm``, ``tabrmd`` and others.
        path: of the device, or of a socket of a simulator.
    """

    tcti: str
    name: str
    path: Path | None = None
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, tcti: str) -> Way:
        """Take a TCTI apart as tpm2-tss does, its defaults filled in."""
        name, _, rest = tcti.partition(":")
        short = name.removeprefix("libtss2-tcti-").partition(".")[0]
        if short == "device":
            return cls(tcti=tcti, name=short, path=Path(rest) if rest else None)
        if short not in {"swtpm", "mssim"}:
            return cls(tcti=tcti, name=short)
        options = dict(option.split("=", 1) for option in rest.split(",") if "=" in option)
        path = Path(options["path"]) if "path" in options else None
        number = re.fullmatch(r"[0-9]{1,5}", options.get("port", "2321"))
        host = options.get("host", "localhost")
        return cls(tcti=tcti, name=short, path=path, host=host, port=int(number[0]) if number else 0)

    @property
    def is_simulator(self) -> bool:
        """Whether what is at its end is a program, by its kind."""
        return self.name in {"swtpm", "mssim", "libtpms"}

    @property
    def is_managed(self) -> bool:
        """Whether a resource manager is in between, so that several programs can use the TPM."""
        return self.name == "tabrmd" or (self.path is not None and MANAGED.fullmatch(str(self.path)) is not None)


def way_of(context: Context) -> Way:
    """Return the way to the TPM that is configured."""
    return Way.parse(context.stores("tpm2")[0].uri.partition(":")[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A TPM that was asked, the way to it, and what is wanted of it.

    Attributes:
        answers: see `stationkey.doctor.tpm.probe`; an error is a return code.
        keys: what each key that was tried is for, by its name.
    """

    way: Way
    settings: Settings
    daemon_running: bool = False
    answers: Answers = field(default_factory=Answers)
    keys: Mapping[str, str] = field(default_factory=dict)

    @property
    def values(self) -> dict[str | int, Any]:
        """Return what it answered: parts by name, and properties by number."""
        properties = self.answers.values.get("properties") or {}
        return self.answers.values | {int(number): value for number, value in properties.items()}

    @property
    def errors(self) -> dict[str, int]:
        """Return the return code of each part that the TPM refused."""
        return self.answers.errors

    @property
    def types(self) -> frozenset[CertificateType]:
        """Return the certificate types whose keys are made in it."""
        stores = [store for store in self.settings.stores if store.uri.startswith("tpm2:")]
        return frozenset[CertificateType]().union(*(store.types for store in stores))

    @property
    def tpm(self) -> TpmTerms:
        """How it is to be used."""
        return self.settings.tpm

    @property
    def may_try_keys(self) -> bool:
        """Whether keys, and so the storage root key, may be loaded, to see whether the TPM takes them.

        Not where that would send the storage root key's authorisation value over the bus in the clear; nor where it
        might take the last slot from a daemon at work.
        """
        return self.tpm.srk_auth is None and (self.way.is_managed or not self.daemon_running)

    def lacks(self, *wanted: str | int) -> str:
        """Return why a part or a property is not there, or an empty text. In failure mode a TPM tells few."""
        if self.values.keys() >= set(wanted):
            return ""
        if self.errors.get("properties") == rc.INITIALIZE:
            return "the TPM waits for TPM2_Startup"
        parts = ["properties" if isinstance(one, int) else one for one in wanted]
        code = next((self.errors[part] for part in parts if part in self.errors), None)
        return "the TPM did not tell" if code is None else f"the TPM refuses to tell ({code:#x})"

    def told(self, *wanted: str | int) -> tuple[Any, ...] | Finding:
        """Return parts by name and properties by number, this first; or that one is not there."""
        if why := self.lacks(*wanted):
            return unknown(why)
        return (self, *(self.values[one] for one in wanted))


def ask_tpm(context: Context) -> Seen:
    """Ask the TPM in a process of its own, `stationkey.doctor.tpm.probe`."""
    keys, purposes = _active_keys(context)
    running, tpm = context.daemon.running, context.settings.tpm
    seen = Seen(way=way_of(context), settings=context.settings, daemon_running=running, keys=purposes)
    asked = {
        "tcti": seen.way.tcti,
        "srk": tpm.srk_handle,
        "ak": tpm.ak_handle,
        "keys": keys if seen.may_try_keys else {},
        "owner_auth": _owner_auth(tpm),
        "try_srk": seen.may_try_keys,
    }
    answers = ask_device("stationkey.doctor.tpm.probe", asked, seconds=PATIENCE)
    return replace(seen, answers=answers)


def _owner_auth(settings: TpmTerms) -> str | None:
    """Return the owner's authorisation value in base64, but not if it must not cross the bus in the clear."""
    path = None if settings.owner_auth is None or settings.session != "none" else path_of(settings.owner_auth)
    try:
        return None if path is None else base64.b64encode(SecretReference(str(path)).read()).decode("ascii")
    except ConfigurationError:
        return None  # config.secrets says why


def _active_keys(context: Context) -> tuple[dict[str, str], dict[str, str]]:
    """Return the active keys, wrapped, in base64, and what each is for; nothing if the ledger cannot be read."""
    contents = contents_soon(context)
    if contents is None:
        return {}, {}
    wrapped = dict(list(contents.wrapped.items())[:_MAX_KEYS])
    purposes = {
        key.key_id: f"{key.certificate_type} {key.evse_id or ''}".strip()
        for key in contents.keys
        if key.key_id in wrapped
    }
    return {name: base64.b64encode(key).decode("ascii") for name, key in wrapped.items()}, purposes


def text_of(*words: int) -> str:
    """Properties that are text, four characters each."""
    octets = b"".join(word.to_bytes(4, "big") for word in words).rstrip(b"\0")
    return "".join(chr(octet) if 0x20 <= octet < 0x7F else "?" for octet in octets).strip()  # noqa: PLR2004 - ASCII
