"""What a TPM answered to `stationkey.doctor.tpm.probe`, and the numbers in it by their names in the standard."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from stationkey.config.settings import Settings, TpmTerms
from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType
from stationkey.doctor.runner import Answer
from stationkey.doctor.tpm.device import Way
from stationkey.keystore.tpm2 import return_codes as rc

# TPM_PT [TPM 2.0 part 2, 6.13].
_PT_FAMILY: Final = 0x100
_PT_REVISION: Final = 0x102
_PT_MANUFACTURER: Final = 0x105
_PT_VENDOR: Final = (0x106, 0x107, 0x108, 0x109)
PT_FIRMWARE: Final = (0x10B, 0x10C)
PT_PERMANENT: Final = 0x200
PT_STARTUP_CLEAR: Final = 0x201
_PT_LOADED_SESSIONS_AVAIL: Final = 0x204
_PT_ACTIVE_SESSIONS_AVAIL: Final = 0x206
PT_TRANSIENT_AVAIL: Final = 0x207
_PT_PERSISTENT_AVAIL: Final = 0x209
_PT_LOCKOUT_COUNTER: Final = 0x20E
_PT_MAX_AUTH_FAIL: Final = 0x20F
_PT_LOCKOUT_INTERVAL: Final = 0x210
_PT_LOCKOUT_RECOVERY: Final = 0x211

# What several judges look at together.
VERSION: Final = (_PT_FAMILY, _PT_REVISION)
MAKER: Final = (_PT_MANUFACTURER, *_PT_VENDOR)
ALGORITHMS: Final = ("algorithms", "curves", "rsa")
ROOM_FOR_SRK: Final = (PT_PERMANENT, _PT_PERSISTENT_AVAIL)
LOCKOUT: Final = (PT_PERMANENT, _PT_LOCKOUT_COUNTER, _PT_MAX_AUTH_FAIL, _PT_LOCKOUT_INTERVAL, _PT_LOCKOUT_RECOVERY)
SESSIONS: Final = (_PT_LOADED_SESSIONS_AVAIL, _PT_ACTIVE_SESSIONS_AVAIL)

# TPMA_PERMANENT and TPMA_STARTUP_CLEAR [TPM 2.0 part 2, 8.6 and 8.7].
OWNER_AUTH_SET: Final = 1 << 0
ENDORSEMENT_AUTH_SET: Final = 1 << 1
LOCKOUT_AUTH_SET: Final = 1 << 2
DISABLE_CLEAR: Final = 1 << 8
IN_LOCKOUT: Final = 1 << 9
STORAGE_ENABLED: Final = 1 << 1
ENDORSEMENT_ENABLED: Final = 1 << 2

# TPM_ALG_ID and TPM_ECC_CURVE [TPM 2.0 part 2, 6.3 and 6.4].
ALG_RSA: Final = 0x01
ALG_AES: Final = 0x06
ALG_RSASSA: Final = 0x14
ALG_ECDSA: Final = 0x18
ALG_ECC: Final = 0x23
ALG_CFB: Final = 0x43
HASHES: Final = MappingProxyType({"sha1": 0x04, "sha256": 0x0B, "sha384": 0x0C, "sha512": 0x0D})
CURVES: Final[Mapping[KeyType, int]] = MappingProxyType({SECP256R1: 0x03, SECP521R1: 0x05})

# TPMA_OBJECT [TPM 2.0 part 2, 8.3].
NODA: Final = 1 << 10
RESTRICTED: Final = 1 << 16
DECRYPT: Final = 1 << 17
SIGN: Final = 1 << 18
SRK_NEEDED: Final = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 6 | RESTRICTED | DECRYPT
FAILURE_MODE: Final = 0x101
NEEDS_TEST: Final = 0x153
MANAGER_ADVICE: Final = 'keystore = "tpm2:device:/dev/tpmrm0", or tpm2-abrmd and "tpm2:tabrmd"'


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a TPM answered.

    Attributes:
        values: by part; see `stationkey.doctor.tpm.probe`.
        errors: the return code of each part that the TPM refused.
        hung: whether an answer did not come.
        said: what the program itself complained about.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    errors: Mapping[str, int] = field(default_factory=dict)
    hung: bool = False
    said: str = ""

    @classmethod
    def read(cls, answer: Answer) -> Probe:
        """From what the program printed."""
        values, errors = dict[str, Any](), dict[str, int]()
        for line in answer.out.splitlines():
            try:
                part = json.loads(line)
            except ValueError:
                continue
            if "value" in part:
                values[part["part"]] = part["value"]
            elif "error" in part:
                errors[part["part"]] = part["error"]
        lines = [line for line in answer.error.splitlines() if line.strip()]
        return cls(values=values, errors=errors, hung=answer.status is None, said=lines[-1] if lines else "")

    def lacks(self, *wanted: str | int) -> str:
        """Return why a part or a property is not there, or an empty text. In failure mode a TPM tells few."""
        known = self.values.get("properties", {})
        parts = ["properties" if isinstance(one, int) else one for one in wanted]
        lacking = [part for part in parts if part not in self.values]
        if not lacking:
            there = all(str(one) in known for one in wanted if isinstance(one, int))
            return "" if there else "the TPM did not tell"
        if self.errors.get("properties") == rc.INITIALIZE:
            return "the TPM waits for TPM2_Startup"
        code = next((self.errors[part] for part in lacking if part in self.errors), None)
        return "the TPM did not tell" if code is None else f"the TPM refuses to tell ({code:#x})"

    def numbers(self, *wanted: int) -> list[int]:
        """Return properties by number."""
        return [self.values["properties"][str(number)] for number in wanted]


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A TPM that was asked, the way to it, and what is wanted of it."""

    probe: Probe
    way: Way
    settings: Settings
    daemon_running: bool = False
    keys: Mapping[str, str] = field(default_factory=dict)
    """What each key that was tried is for, by its name."""

    @property
    def tpm(self) -> TpmTerms:
        """How it is to be used."""
        return self.settings.tpm


def may_try_keys(tpm: TpmTerms, way: Way, *, daemon_running: bool) -> bool:
    """Whether keys may be loaded, to see whether the TPM takes them.

    Not where that would send the storage root key's authorisation value over the bus in the clear; nor where it might
    take the last slot from a daemon at work.
    """
    return tpm.srk_auth is None and (way.is_managed or not daemon_running)


def text_of(*words: int) -> str:
    """Properties that are text, four characters each."""
    octets = b"".join(word.to_bytes(4, "big") for word in words).rstrip(b"\0")
    return "".join(chr(octet) if 0x20 <= octet < 0x7F else "?" for octet in octets).strip()  # noqa: PLR2004 - ASCII
