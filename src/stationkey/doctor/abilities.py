"""Which certificates a key store can have keys for."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from stationkey.config.settings import PolicyTerms
from stationkey.contract.profiles import PROFILES, Algorithm, CertificateType
from stationkey.doctor.report import Finding, failure, listed, ok, warning


def judge_types(
    types: Collection[CertificateType], policy: PolicyTerms, missing: Mapping[Algorithm, str], way_out: str
) -> Iterator[Finding]:
    """Judge which of the certificate types that are served are possible.

    Args:
        types: whose keys are made in the key store.
        policy: what is served.
        missing: what the device lacks for an algorithm, in words; an empty text if nothing.
        way_out: advice where a type is not possible.
    """
    served, any_works = [one for one in policy.certificate_types if one in types], False
    for certificate_type in served:
        profile = PROFILES[certificate_type]
        allowed = [one for one in policy.algorithms if profile.required_algorithm in {None, one}]
        works = [algorithm for algorithm in allowed if not missing[algorithm]]
        wanted = profile.required_algorithm or profile.preferred_algorithm
        any_works = any_works or bool(works)
        if not works:
            lacks = listed(sorted({missing[one] for one in allowed})) or "[policy] has no algorithm for it"
            told = f"{certificate_type} is never possible here, and requests for it are rejected: {lacks}"
            yield warning("not_possible", told, f"{way_out}; or remove it from [policy] certificate_types")
        elif wanted is not None and wanted not in works:
            told = f"{certificate_type} works with {listed(works)} only, and its profile wants {wanted}"
            yield warning("not_preferred", told, f"does the CA accept it? For {wanted}: {way_out}")
        else:
            yield ok(f"{certificate_type} works, with {listed(works)}")
    if served and not any_works:
        yield failure("none_possible", "no certificate type of [policy] is possible", way_out)
    if not served:
        yield ok("no certificate type that is served has its keys here")
