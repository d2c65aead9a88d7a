"""Build a chain: the station's certificate, followed by each issuer. Pure; bounded.

A TLS peer needs every certificate between the leaf and its root, in order [RFC 5246 7.4.2, RFC 8446 4.4.2]; CAs and
Josev may store them in separate files.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Final

from cryptography import x509

from stationkey.x509.certificate import MAX_CHAIN, Chain
from stationkey.x509.lenient import Certificate, Link, comparable, link, name_text, same_name

MAX_TRIES: Final = 32
"""Most signatures that are verified for one chain, because there may be many certificates of one name."""


def complete(chain: Chain, known: Iterable[Certificate]) -> tuple[Chain, str]:
    """Order a chain, and add its missing certificates from `known`.

    No root is added: peers have it. Certificates of the file that do not belong to the chain stay at its end.

    Args:
        chain: as in its file.
        known: other certificates, among them those of its issuers.

    Returns:
        The chain, and the name of the issuer if its certificate is missing for certain: that of a leaf alone. The
        issuer of a Sub-CA may be a root.
    """
    in_file = {certificate.der for certificate in chain.certificates}
    by_name: defaultdict[object, dict[bytes, Certificate]] = defaultdict(dict)
    for certificate in (*chain.certificates, *known):
        by_name[comparable(certificate.subject)][certificate.der] = certificate

    def rank(issuer: Certificate) -> tuple[bool, bool, bool, bool, float]:
        leads_on = issuer.self_issued or comparable(issuer.issuer) in by_name
        ends = 0.0 if issuer.loaded is None else issuer.loaded.not_valid_after_utc.timestamp()
        return issuer.der in in_file, _identifies(path[-1], issuer), issuer.self_issued, leads_on, ends

    path, tries = [chain.own], MAX_TRIES
    while len(path) < MAX_CHAIN and not path[-1].self_issued:
        issuers = [each for each in by_name.get(comparable(path[-1].issuer), {}).values() if each not in path]
        issuers = sorted(issuers, key=rank, reverse=True)[:tries]
        for issuer in issuers:
            tries -= 1
            if (found := link(path[-1], issuer)) is Link.PROVED:
                break
            if found is Link.UNPROVED and (issuer.der in in_file or _identifies(path[-1], issuer)):
                break
        else:
            break
        path.append(issuer)
    missing = name_text(path[0].issuer) if len(path) == 1 and not path[0].self_issued else ""
    if path[-1].self_issued and path[-1].der not in in_file:
        del path[-1]
    return Chain((*path, *(each for each in chain.certificates if each not in path))), missing


def root_of(chain: Chain) -> str:
    """Return a short text that is the same for all complete chains below one root: 16 hexadecimal digits.

    It is a hash of the issuer's name and key identifier, if any [RFC 5280 4.2.1.1], in the topmost certificate below
    the root. So it is the same whether or not the root is in the chain.

    Args:
        chain: in order, as `complete` returns it.
    """
    top = chain.own
    for certificate in chain.certificates:
        if not certificate.self_issued and same_name(certificate.subject, top.issuer):
            top = certificate
    authority = top.extension(x509.AuthorityKeyIdentifier)
    identifier = b"" if authority is None else authority.key_identifier or b""
    return hashlib.sha256(top.issuer + identifier).hexdigest()[:16]


def _identifies(certificate: Certificate, issuer: Certificate) -> bool:
    """Whether a certificate names its issuer's key by its identifier [RFC 5280 4.2.1.1]."""
    authority = certificate.extension(x509.AuthorityKeyIdentifier)
    own = issuer.extension(x509.SubjectKeyIdentifier)
    return authority is not None and own is not None and bool(authority.key_identifier == own.digest)
