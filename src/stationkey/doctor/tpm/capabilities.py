"""What a TPM is and can do: maker, firmware, algorithms, and so which certificates can be had with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from stationkey.contract.profiles import ALGORITHMS, PROFILES, SECP256R1, Algorithm, EllipticCurve
from stationkey.doctor.report import Verdict, failure, listed, ok, warning
from stationkey.doctor.tpm import facts
from stationkey.doctor.tpm.facts import CURVES, HASHES, Seen, text_of


def judge_version(seen: Seen) -> Verdict:
    """Judge family and revision of the specification."""
    family, revision = seen.probe.numbers(*facts.VERSION)
    if (text := text_of(family)) != "2.0":
        return failure(f"this is a TPM {text}", "stationkey needs a TPM 2.0")
    return ok(f"TPM 2.0, revision {revision // 100}.{revision % 100:02d} of the specification")


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


def judge_firmware(seen: Seen) -> Verdict:
    """Judge maker and firmware, and whether that is known to be weak."""
    maker, *vendor, first, second = seen.probe.numbers(*facts.MAKER, *facts.PT_FIRMWARE)
    version = (first >> 16, first & 0xFFFF)
    what = f"{text_of(maker)} {text_of(*vendor)}, firmware {version[0]}.{version[1]}.{second >> 16}.{second & 0xFFFF}"
    for weakness in WEAKNESSES:
        if text_of(maker) == weakness.manufacturer and any(low <= version <= high for low, high in weakness.versions):
            return failure(
                f"{what}: known to be weak ({weakness.name}): {weakness.means}",
                "get the update from the maker of the board; then make new keys, and revoke the old certificates",
            )
    return ok(what)


def judge_simulated(seen: Seen) -> Verdict:
    """Judge whether it is a program and not a chip."""
    maker, *vendor = seen.probe.numbers(*facts.MAKER)
    if seen.way.is_simulator or (text_of(maker) == "IBM" and text_of(*vendor).startswith("SW")):
        return warning(
            "this TPM is simulated: its keys are in a file, for whoever can read that",
            'for trying only; on a station, keystore = "tpm2:device:/dev/tpmrm0"',
        )
    return ok("nothing says that this TPM is simulated")


def missing_for(algorithm: Algorithm, seen: Seen) -> str:
    """Say what the TPM lacks for an algorithm; an empty text if nothing."""
    profile = ALGORITHMS[algorithm]
    algorithms, curves, sizes = (seen.probe.values[part] for part in facts.ALGORITHMS)
    if HASHES[profile.hash_name] not in algorithms:
        return profile.hash_name.upper().replace("SHA", "SHA-")
    lacking = []
    for kind in profile.key_types:
        if isinstance(kind, EllipticCurve):
            here, scheme, name = CURVES[kind] in curves, facts.ALG_ECDSA, "ECDSA"
        else:
            here, scheme, name = kind.bits in sizes, facts.ALG_RSASSA, "RSASSA"
        if here and scheme in algorithms:
            return ""
        lacking.append(name if here else str(kind))
    return " and ".join(lacking)


def judge_algorithms(seen: Seen) -> Verdict:
    """Judge curves, hashes and sizes."""
    algorithms, curves = seen.probe.values["algorithms"], seen.probe.values["curves"]
    needed = {"elliptic curves": facts.ALG_ECC, "AES": facts.ALG_AES, "CFB": facts.ALG_CFB}
    storage = [words for words, number in needed.items() if number not in algorithms]
    storage += [] if CURVES[SECP256R1] in curves else ["secp256r1"]
    if storage:
        return failure(
            f"this TPM lacks {listed(storage)}, and so cannot have the storage root key",
            "stationkey needs an ECC P-256 storage root key; another TPM is needed",
        )
    lacking = [f"{algorithm} (no {missing})" for algorithm in Algorithm if (missing := missing_for(algorithm, seen))]
    if lacking:
        return ok(f"of the algorithms of the contract this TPM lacks {listed(lacking)}: requests for it are rejected")
    return ok(f"this TPM has all of {listed(Algorithm)}")


def judge_certificate_types(seen: Seen) -> Iterator[Verdict]:
    """Judge which of the certificates that are served are possible with this TPM."""
    policy, any_works = seen.settings.policy, False
    for certificate_type in policy.certificate_types:
        profile = PROFILES[certificate_type]
        allowed = [one for one in policy.algorithms if profile.required_algorithm in {None, one}]
        works = [algorithm for algorithm in allowed if not missing_for(algorithm, seen)]
        wanted = profile.required_algorithm or profile.preferred_algorithm
        any_works = any_works or bool(works)
        if not works:
            lacks = listed(sorted({missing_for(one, seen) for one in allowed})) or "an algorithm to be served"
            yield warning(
                f"{certificate_type} is not possible: the TPM lacks {lacks}, and requests for it are rejected",
                f"if the station needs it, use another TPM; else remove {certificate_type} from [policy] "
                "certificate_types",
            )
        elif wanted is not None and wanted not in works:
            yield warning(
                f"{certificate_type} works with {listed(works)} only, and its profile wants {wanted}",
                f"see whether the CA accepts it; for {wanted} the station needs another TPM",
            )
        else:
            yield ok(f"{certificate_type} works, with {listed(works)}")
    if not any_works:
        yield failure("none of the certificate types that are served is possible", "another TPM is needed")
