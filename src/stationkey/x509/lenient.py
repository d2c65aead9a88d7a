"""Parse a certificate in parts, so that a fault in one part hides no other. Pure: bytes in.

cryptography refuses a whole certificate for an underscore in a PrintableString of its issuer; OpenSSL does not, and
some CAs issue such certificates. So a certificate is split here, and cryptography parses the parts.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from contextlib import suppress
from enum import StrEnum
from itertools import chain, combinations
from typing import Any, Final, NamedTuple

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.exceptions import UnsupportedAlgorithm as CryptographyUnsupported
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from msgspec import Struct

from stationkey.system.text import printable

MALFORMED: Final = (ValueError, TypeError, CryptographyUnsupported, x509.InvalidVersion)
"""The exceptions of cryptography for unreadable certificates."""

_SEQUENCE, _VERSION, _LONG = 0x30, 0xA0, 0x80
_MAX_NAME_TEXT: Final = 128
_LABELS: Final = {
    b"\x55\x04\x03": "CN",
    b"\x55\x04\x06": "C",
    b"\x55\x04\x0a": "O",
    b"\x55\x04\x0b": "OU",
    b"\x09\x92\x26\x89\x93\xf2\x2c\x64\x01\x19": "DC",
}
_ENCODINGS: Final = {
    0x0C: "utf-8",
    0x12: "latin-1",  # NumericString
    0x13: "latin-1",  # PrintableString, whatever is in it
    0x14: "latin-1",  # TeletexString, as everybody writes it
    0x16: "latin-1",  # IA5String
    0x1A: "latin-1",  # VisibleString
    0x1C: "utf-32-be",  # UniversalString
    0x1E: "utf-16-be",  # BMPString
}


class Element(NamedTuple):
    """A value in DER: tag, content, and all of its bytes."""

    tag: int
    content: bytes
    whole: bytes


def elements(der: bytes) -> list[Element]:
    """Return the values that follow one another in `der`.

    Raises:
        ValueError: one is incomplete, or is not in DER.
    """
    found, at = [], 0
    while at < len(der):
        start, header = at, der[at : at + 2]
        at += 2
        length = header[-1]
        if length & _LONG:
            size = length & 0x7F
            length = int.from_bytes(der[at : at + size])
            at += size
            if size not in range(1, 5):
                raise ValueError("a length that is not DER")
        if start + 2 > len(der) or at + length > len(der):
            raise ValueError("incomplete")
        found.append(Element(header[0], der[at : at + length], der[start : at + length]))
        at += length
    return found


def _encoded(tag: int, content: bytes) -> bytes:
    size = len(content)
    length = bytes([size]) if size < _LONG else size.to_bytes((size.bit_length() + 7) // 8)
    return bytes([tag]) + (length if size < _LONG else bytes([_LONG | len(length)]) + length) + content


class Certificate(Struct, frozen=True):
    """A certificate by its parts, each in DER.

    Attributes:
        der: the unchanged certificate.
        signed: the bytes that the issuer signed.
        issuer: the issuer's name.
        subject: its own name.
        key: subjectPublicKeyInfo.
        signature: of the issuer.
        loaded: cryptography's certificate, with an empty value for each part that it refuses; None if it reads nothing.
        odd: the parts that cryptography refuses.
    """

    der: bytes
    signed: bytes
    issuer: bytes
    subject: bytes
    key: bytes
    signature: bytes
    loaded: x509.Certificate | None
    odd: tuple[str, ...] = ()

    @property
    def public(self) -> bytes:
        """SubjectPublicKeyInfo as cryptography encodes it.

        Raises:
            ValueError: the key is invalid.
            UnsupportedAlgorithm: the key is of a kind that cryptography does not know.
        """
        return serialization.load_der_public_key(self.key).public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @property
    def self_issued(self) -> bool:
        """Whether issuer and subject are the same name, as in a root [RFC 5280 3.2]."""
        return same_name(self.issuer, self.subject)

    def extension(self, kind: type[x509.ExtensionType]) -> Any | None:
        """Return the value of an extension; None if it is absent or cannot be read."""
        try:
            return None if self.loaded is None else self.loaded.extensions.get_extension_for_class(kind).value
        except (x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, *MALFORMED):
            return None


def read_certificate(der: bytes) -> Certificate:
    """Split a certificate into its parts [RFC 5280 4.1].

    Raises:
        ValueError: it does not have the parts of a certificate.
    """
    (outer,) = elements(der)
    signed, algorithm, signature = elements(outer.content)
    fields = elements(signed.content)
    first = 1 if fields and fields[0].tag == _VERSION else 0
    _serial, _algorithm, issuer, validity, subject, key = fields[first : first + 6]
    if {part.tag for part in (outer, signed, algorithm, issuer, validity, subject, key)} != {_SEQUENCE}:
        raise ValueError("not a certificate")
    empty = {
        "issuer": (first + 2, b"\x30\x00"),
        "subject": (first + 4, b"\x30\x00"),
        "serial number": (first, b"\x02\x01\x01"),
    }
    for odd in chain.from_iterable(combinations(empty, count) for count in range(len(empty) + 1)):
        parts = [field.whole for field in fields]
        for name in odd:
            number, parts[number] = empty[name]
        loaded = _loaded(_encoded(_SEQUENCE, b"".join(parts)) + algorithm.whole + signature.whole)
        if loaded is not None:
            break
    return Certificate(
        der, signed.whole, issuer.whole, subject.whole, key.whole, signature.content[1:], loaded, odd if loaded else ()
    )


def _loaded(content: bytes) -> x509.Certificate | None:
    """Return cryptography's certificate; None if it refuses the certificate or a name in it."""
    with suppress(*MALFORMED):
        certificate = x509.load_der_x509_certificate(_encoded(_SEQUENCE, content))
        _ = certificate.issuer, certificate.subject  # the parser puts these off
        return certificate
    return None


def same_name(one: bytes, other: bytes) -> bool:
    """Whether two names, in DER, are the same by value [RFC 5280 7.1]."""
    return one == other or comparable(one) == comparable(other)


def comparable(name: bytes) -> object:
    """Return a value that is equal for equal names (DER): strings are compared by content [RFC 5280 7.1]."""
    return _attributes(name, lambda text: " ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def name_text(name: bytes) -> str:
    """Return a name, in DER, for a person: ``C=DE, CN=CPO Sub-CA 2``, in the order of the encoding."""
    attributes = _attributes(name, str)
    if isinstance(attributes, bytes):
        return "an unreadable name"
    said = [
        f"{_LABELS.get(oid, 'another attribute')}={value if isinstance(value, str) else value.hex()}"
        for attribute_set in attributes
        for oid, value in sorted(attribute_set, key=str)
    ]
    return printable(", ".join(said))[:_MAX_NAME_TEXT] or "an empty name"


_Attribute = tuple[bytes, str | bytes]


def _attributes(name: bytes, prepare: Callable[[str], str]) -> tuple[frozenset[_Attribute], ...] | bytes:
    """Return each RDN of a name; the name itself if it cannot be parsed."""
    try:
        (whole,) = elements(name)
        return tuple(
            frozenset(_attribute(each, prepare) for each in elements(rdn.content)) for rdn in elements(whole.content)
        )
    except ValueError:
        return name


def _attribute(attribute: Element, prepare: Callable[[str], str]) -> _Attribute:
    oid, value = elements(attribute.content)
    encoding = _ENCODINGS.get(value.tag)
    try:
        return oid.content, value.whole if encoding is None else prepare(value.content.decode(encoding))
    except UnicodeDecodeError:
        return oid.content, value.whole


class Link(StrEnum):
    """Whether a certificate was issued by another one."""

    PROVED = "proved"
    UNPROVED = "unproved"
    """By its name; the signature is of a kind that is unknown here."""
    NAME = "name"
    """No: the issuer has another name."""
    SIGNATURE = "signature"
    """No: the issuer has the name, and the signature was made with another key."""


def link(certificate: Certificate, issuer: Certificate) -> Link:
    """Tell whether `issuer` issued a certificate: by its name and by the signature. Costs one verification."""
    if not same_name(certificate.issuer, issuer.subject):
        return Link.NAME
    loaded = certificate.loaded
    if loaded is None:
        return Link.UNPROVED
    try:
        key: Any = serialization.load_der_public_key(issuer.key)
        signed = certificate.signature, certificate.signed
        parameters: Any = loaded.signature_algorithm_parameters
        if isinstance(key, rsa.RSAPublicKey):
            assert loaded.signature_hash_algorithm is not None
            key.verify(*signed, parameters, loaded.signature_hash_algorithm)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            key.verify(*signed, parameters)
        else:
            key.verify(*signed)
    except CryptographyUnsupported:
        return Link.UNPROVED
    except (InvalidSignature, ValueError, TypeError, AttributeError, AssertionError):
        return Link.SIGNATURE
    return Link.PROVED
