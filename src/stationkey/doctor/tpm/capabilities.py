"""What a TPM is and can do: maker, firmware, algorithms, and so which certificates can be had with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stationkey.contract.profiles import ALGORITHMS, PROFILES, SECP256R1, Algorithm, EllipticCurve
from stationkey.doctor.report import Finding, failure, listed, ok, warning
from stationkey.doctor.tpm.facts import (
    ALG_AES,
    ALG_CFB,
    ALG_ECC,
    ALG_ECDSA,
    ALG_RSASSA,
    CURVES,
    HASHES,
    PT_FAMILY,
    PT_FIRMWARE,
    PT_MANUFACTURER,
    PT_REVISION,
    PT_VENDOR,
    Seen,
    text_of,
)


def judge_version(seen: Seen) -> Iterator[Finding]:
    """Family and revision of the specification."""
    name = "tpm.version"
    family, revision = seen.probe.properties(PT_FAMILY, PT_REVISION)
    text = text_of(family)
    if text != "2.0":
        yield failure(name, f"this is a TPM {text}", "stationkey needs a TPM 2.0")
    else:
        yield ok(name, f"TPM 2.0, revision {revision // 100}.{revision % 100:02d} of the specification")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weakness:
    """Firmware that is known to be weak.

    Attributes:
        manufacturer: as the TPM gives it.
        versions: from and to, both included.
        name: of the weakness.
        means: what follows from it here.
    """

    manufacturer: str
    versions: tuple[tuple[tuple[int, int], tuple[int, int]], ...]
    name: str
    means: str


WEAKNESSES: Final = (
    Weakness(
        manufacturer="IFX",
        # Infineon and Microsoft, ADV170012; the ranges that both give.
        versions=(
            ((4, 0), (4, 33)),
            ((4, 40), (4, 42)),
            ((5, 0), (5, 61)),
            ((6, 0), (6, 42)),
            ((7, 0), (7, 61)),
            ((133, 0), (133, 32)),
        ),
        name="CVE-2017-15361, ROCA",
        means="RSA keys that it makes can be computed from the public key; elliptic-curve keys are not affected",
    ),
    Weakness(
        manufacturer="STM",
        # STMicroelectronics' own table, "TPM firmware update - ECDSA signature generation".
        versions=tuple(
            ((major, minor), (major, minor))
            for major, minors in ((71, (0, 4, 12)), (73, (0, 4, 5, 8, 9)), (74, (0, 4, 5, 8, 9, 16)))
            for minor in minors
        ),
        name="CVE-2019-16863, TPM-Fail",
        means="its ECDSA keys can be computed from the time that many signatures take",
    ),
)
"""Only what the maker itself, or an advisory that it has a part in, has published."""


def judge_firmware(seen: Seen) -> Iterator[Finding]:
    """Maker and firmware, and whether that is known to be weak."""
    name = "tpm.firmware"
    maker, *vendor, first, second = seen.probe.properties(PT_MANUFACTURER, *PT_VENDOR, *PT_FIRMWARE)
    version = (first >> 16, first & 0xFFFF)
    what = f"{text_of(maker)} {text_of(*vendor)}, firmware {version[0]}.{version[1]}.{second >> 16}.{second & 0xFFFF}"
    for weakness in WEAKNESSES:
        if text_of(maker) == weakness.manufacturer and any(low <= version <= high for low, high in weakness.versions):
            yield failure(
                name,
                f"{what}: known to be weak ({weakness.name}): {weakness.means}",
                "get the firmware update from the maker of the board; then have new keys made, and the certificates "
                "of the old ones revoked",
            )
            return
    yield ok(name, what)


def judge_simulated(seen: Seen) -> Iterator[Finding]:
    """Whether it is a program and no chip."""
    name = "tpm.simulated"
    maker, *vendor = seen.probe.properties(PT_MANUFACTURER, *PT_VENDOR)
    software = text_of(maker) == "IBM" and text_of(*vendor).startswith("SW")
    if software or seen.way.is_simulator:
        yield warning(
            name,
            "this TPM is simulated: its keys are in a file, for whoever can read that",
            'for trying only; on a station, keystore = "tpm2:device:/dev/tpmrm0"',
        )
    else:
        yield ok(name, "nothing says that this TPM is simulated")


def missing_for(algorithm: Algorithm, seen: Seen) -> str:
    """What the TPM lacks for an algorithm, in words; empty where it lacks nothing."""
    profile = ALGORITHMS[algorithm]
    algorithms, curves, sizes = (set(seen.probe.get(part)) for part in ("algorithms", "curves", "rsa"))
    if HASHES[profile.hash_name] not in algorithms:
        return profile.hash_name.upper().replace("SHA", "SHA-")
    lacking = []
    for kind in profile.key_types:
        if isinstance(kind, EllipticCurve):
            here, scheme = CURVES[kind] in curves, ALG_ECDSA
        else:
            here, scheme = kind.bits in sizes, ALG_RSASSA
        if here and scheme in algorithms:
            return ""
        lacking.append(str(kind) if not here else "ECDSA" if scheme == ALG_ECDSA else "RSASSA")
    return " and ".join(lacking)


def judge_algorithms(seen: Seen) -> Iterator[Finding]:
    """Curves, hashes and sizes."""
    name = "tpm.algorithms"
    lacking = {algorithm: missing for algorithm in Algorithm if (missing := missing_for(algorithm, seen))}
    storage = [
        words
        for words, known, number in (
            ("elliptic curves", seen.probe.get("algorithms"), ALG_ECC),
            ("AES", seen.probe.get("algorithms"), ALG_AES),
            ("CFB", seen.probe.get("algorithms"), ALG_CFB),
            ("secp256r1", seen.probe.get("curves"), CURVES[SECP256R1]),
        )
        if number not in known
    ]
    if storage:
        yield failure(
            name,
            f"this TPM has no {listed(storage)}, and so can have no storage root key of the kind that is wanted",
            "stationkey needs an ECC P-256 storage root key; another TPM is needed",
        )
    elif lacking:
        words = listed(f"{algorithm} (no {missing})" for algorithm, missing in lacking.items())
        yield ok(name, f"of the algorithms of the contract this TPM lacks {words}: requests for it are rejected")
    else:
        yield ok(name, f"this TPM has all of {listed(Algorithm)}")


def judge_certificate_types(seen: Seen) -> Iterator[Finding]:
    """Which of the certificates that are served can be had with this TPM."""
    name, policy, found, any_works = "tpm.certificate_types", seen.settings.policy, list[Finding](), False
    for certificate_type in policy.certificate_types:
        profile = PROFILES[certificate_type]
        allowed = [one for one in policy.algorithms if profile.required_algorithm in {None, one}]
        works = [algorithm for algorithm in allowed if not missing_for(algorithm, seen)]
        wanted = profile.required_algorithm or profile.preferred_algorithm
        any_works = any_works or bool(works)
        if not works:
            lacks = (
                listed(sorted({missing_for(algorithm, seen) for algorithm in allowed})) or "an algorithm to be served"
            )
            found.append(
                warning(
                    name,
                    f"{certificate_type} cannot be had: the TPM lacks {lacks}, and requests for it are rejected",
                    f"if the station needs it, it takes another TPM; else take {certificate_type} out of [policy] "
                    "certificate_types",
                )
            )
        elif wanted is not None and wanted not in works:
            found.append(
                warning(
                    name,
                    f"{certificate_type} works with {listed(works)} only, and its profile wants {wanted}",
                    f"see whether the CA takes it; for {wanted} the station takes another TPM",
                )
            )
        else:
            found.append(ok(name, f"{certificate_type} works, with {listed(works)}"))
    if not any_works:
        yield failure(
            name, "none of the certificate types that are served can be had with this TPM", "another TPM is needed"
        )
    yield from found
