"""Chains as CAs make them: odd names and keys above the leaf, in pieces, under names in other encodings.

Certificates are put together here byte for byte, so that each part can be what no library would write.
"""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from unittest import mock

import asn1crypto.x509  # type: ignore[import-untyped]  # ships no type information
import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from parts import Authority, Station, key_id_in, station
from stationkey.ledger.lifecycle import KeyState
from stationkey.system.pem import to_pem
from stationkey.x509.certificate import MAX_CHAIN, read_chain, untrusted
from stationkey.x509.lenient import link
from stationkey.x509.path import MAX_TRIES

PENDING, ACTIVE = KeyState.PRE_ACTIVATION, KeyState.ACTIVE
PLAIN = Authority()


def der(tag: int, *parts: bytes) -> bytes:
    content = b"".join(parts)
    length = bytes([len(content)]) if len(content) < 128 else b"\x82" + len(content).to_bytes(2)
    return bytes([tag]) + length + content


def named(value: bytes, tag: int = 0x13) -> bytes:
    """A name of one CN; a PrintableString by default."""
    return der(0x30, der(0x31, der(0x30, b"\x06\x03\x55\x04\x03", der(tag, value))))


def public(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


V3 = b"\xa0\x03\x02\x01\x02"
YEARS = der(0x30, der(0x17, b"250101000000Z"), der(0x17, b"350101000000Z"))
CA = bytes.fromhex("a3133011300f0603551d130101ff040530030101ff")
UNKNOWN_CRITICAL = bytes.fromhex("a311300f300d06032a03040101ff04030c0178")
BY_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
SM2_SPKI = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf5501822d03420004") + b"\x07" * 64
UNKNOWN_CURVE_SPKI = bytes.fromhex("3059301306072a8648ce3d020106082a811ccf55018f7f03420004") + b"\x07" * 64
ED448_SPKI = bytes.fromhex("3043300506032b6571033a00") + b"\x09" * 57
UNKNOWN_SPKI = bytes.fromhex("3016300b060960864801650304036303070005060708090a")  # in the arc of ML-DSA


@dataclass
class Made:
    """A CA's key and name, and what it signs."""

    name: bytes = named(b"CPO Sub-CA 2")
    key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP256R1()))

    def sign(  # one for each part of a certificate
        self,
        subject: bytes,
        spki: bytes,
        extensions: bytes = CA,
        *,
        version: bytes = V3,
        serial: bytes = b"\x02\x01\x05",
        validity: bytes = YEARS,
    ) -> bytes:
        tbs = der(0x30, version, serial, BY_SHA256, self.name, validity, subject, spki, extensions)
        signature = self.key.sign(tbs, ec.ECDSA(hashes.SHA256()))
        return der(0x30, tbs, BY_SHA256, der(0x03, b"\0", signature))

    def leaf(self, csr: str, *, subject: bytes = b"", serial: bytes = b"\x02\x01\x05") -> bytes:
        """What the CSR asks for."""
        usual = asn1crypto.x509.Certificate.load(PLAIN.sign(csr).public_bytes(serialization.Encoding.DER))
        tbs = usual["tbs_certificate"]
        extensions = der(0xA3, tbs["extensions"].untag().dump())
        spki = tbs["subject_public_key_info"].dump()
        own = [der(0x30, tbs["validity"].dump()[2:]), subject or tbs["subject"].dump()]
        return self.sign(own[1], spki, extensions, serial=serial, validity=own[0])

    def below(self, other: Made, *, name: bytes | None = None, **parts: bytes) -> bytes:
        """The certificate of this CA, signed by another."""
        return other.sign(name or self.name, parts.pop("spki", public(self.key)), **parts)


def pem(*certificates: bytes) -> bytes:
    return b"".join(to_pem("CERTIFICATE", each) for each in certificates)


def verify_with_openssl(folder: Path, root: bytes, chain: list[bytes]) -> None:
    """Have OpenSSL find a chain of leaf and Sub-CA right."""
    for name, content in {"root": root, "leaf": chain[0], "sub": chain[1]}.items():
        (folder / f"{name}.pem").write_bytes(pem(content))
    options = ["-no_check_time", "-CAfile", "root.pem", "-untrusted", "sub.pem", "leaf.pem"]
    subprocess.run(["openssl", "verify", *options], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Where Josev installs to."""
    path = tmp_path / "certificates"
    path.mkdir()
    return path


@pytest.fixture
async def here(tmp_path: Path, directory: Path) -> AsyncIterator[Station]:
    """A station that sees it."""
    async with station(tmp_path / "state", certificate_dir=directory) as made:
        yield made


def shown(here: Station) -> bytes:
    """The chain under ``active/``."""
    content = (here.active_dir / "v2g_certificate.pem").read_bytes()
    return content[content.index(b"-----BEGIN CERTIFICATE-----") :]


# What is odd above the leaf hides nothing.

ODD_NAMES = {
    "an underscore in a PrintableString": named(b"CPO_Sub_CA_2"),
    "an at sign and an umlaut in a PrintableString": named(b"CA@\xfc"),
    "a TeletexString": named(b"CPO_Sub\xe9", 0x14),
    "a BMPString": named("CPO Sub".encode("utf-16-be"), 0x1E),
    "a BMPString cut in half": named(b"\0C\0", 0x1E),
    "UTF-8 that is none": named(b"\xff\xfe", 0x0C),
    "an empty PrintableString": named(b""),
    "an empty name": der(0x30),
    "a BIT STRING": named(b"\0ab", 0x03),
    "a control character": named(b"CA\x1b[31m\n", 0x0C),
}


@pytest.mark.parametrize("place", ["one file", "a reversed file", "DER"])
@pytest.mark.parametrize("name", ODD_NAMES.values(), ids=ODD_NAMES)
async def test_a_leaf_is_seen_whatever_its_issuer_is_called(
    here: Station, directory: Path, name: bytes, place: str, caplog: pytest.LogCaptureFixture
) -> None:
    csr, root, sub = await here.csr(), Made(named(b"root")), Made(name)
    leaf, above = sub.leaf(csr), sub.below(root)
    arranged = {"one file": pem(leaf, above), "a reversed file": pem(above, leaf), "DER": leaf}
    (directory / "secc").write_bytes(arranged[place])
    if place == "DER":
        (directory / "sub.der").write_bytes(above)

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert shown(here).startswith(pem(leaf))
    assert "\x1b" not in caplog.text


async def test_what_openssl_verifies_becomes_active_as_it_came(here: Station, directory: Path, tmp_path: Path) -> None:
    csr, root, sub = await here.csr(), Made(named(b"V2G_Root")), Made(named(b"CPO_Sub_CA_2"))
    chain = [sub.leaf(csr), sub.below(root)]
    (directory / "secc.pem").write_bytes(pem(*chain))
    verify_with_openssl(tmp_path, root.below(root), chain)

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert shown(here) == pem(*chain)
    assert here.counts["certificate_differs"] == 0


ODD_ISSUERS = {
    "SM2": {"spki": SM2_SPKI},
    "a curve that nobody knows": {"spki": UNKNOWN_CURVE_SPKI},
    "Ed448": {"spki": ED448_SPKI},
    "an algorithm that nobody knows": {"spki": UNKNOWN_SPKI},
    "a negative serial number": {"serial": b"\x02\x01\xfb"},
    "an empty serial number": {"serial": b"\x02\x00"},
    "version 1": {"version": b"", "extensions": b""},
    "version 1 spelled out": {"version": b"\xa0\x03\x02\x01\x00", "extensions": b""},
    "a month 13": {"validity": der(0x30, der(0x17, b"251399000000Z"), der(0x17, b"350101000000Z"))},
    "a time with its zone": {"validity": der(0x30, der(0x17, b"2501010000+0100"), der(0x17, b"350101000000Z"))},
    "an unknown critical extension": {"extensions": UNKNOWN_CRITICAL},
    "an extension that is none": {"extensions": b"\xa3\x04\x30\x02\x05\x00"},
}


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("parts", ODD_ISSUERS.values(), ids=ODD_ISSUERS)
async def test_a_leaf_is_seen_whatever_its_issuer_is_made_of(
    here: Station, directory: Path, parts: dict[str, bytes]
) -> None:
    """With a second key pending, which an unreadable file might be for."""
    csr, _, root, sub = await here.csr(), await here.csr(), Made(named(b"root")), Made()
    content = pem(sub.leaf(csr), sub.below(root, **parts))
    (directory / "secc.pem").write_bytes(content)

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert shown(here) == content


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@pytest.mark.parametrize("serial", [b"\x02\x01\xfb", b"\x02\x00", b"\x02\x16" + b"\x7f" * 22])
async def test_a_leaf_is_seen_whatever_its_own_serial_number_is(here: Station, directory: Path, serial: bytes) -> None:
    csr = await here.csr()
    (directory / "secc.pem").write_bytes(pem(Made().leaf(csr, serial=serial)))

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]


async def test_a_leaf_whose_own_subject_is_odd_is_used_and_differs(here: Station, directory: Path) -> None:
    csr, sub = await here.csr(), Made()
    (directory / "secc.pem").write_bytes(pem(sub.leaf(csr, subject=named(b"CS_1")), sub.below(Made(named(b"root")))))

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert here.counts["certificate_differs"] == 1


async def test_an_odd_certificate_that_is_there_still_keeps_its_key_from_deleted(
    here: Station, directory: Path
) -> None:
    """What is seen now is not doubted any more: without the file, `deleted` takes the key."""
    csr, sub = await here.csr(), Made(named(b"CPO_Sub_CA_2"))
    file = directory / "secc.pem"
    file.write_bytes(pem(sub.leaf(csr)))
    await here.told("installed")

    await here.told("deleted")
    assert here.states(key_id_in(csr)) == [ACTIVE]

    file.unlink()
    await here.told("deleted")
    assert here.states(key_id_in(csr)) == [KeyState.DESTROYED]


async def test_a_file_that_cannot_be_read_is_told_with_its_cause(
    here: Station, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await here.csr()
    (directory / "secc.pem").write_bytes(pem(b"\0\0\0"))

    await here.told("installed")

    assert f"1 file could not be read: {directory}/secc.pem, because: " in caplog.text
    assert "ParseError" not in caplog.text


TRUST = {
    "sound": ({}, True),
    "no CA": ({"extensions": b""}, False),
    "an unknown critical extension": ({"extensions": UNKNOWN_CRITICAL}, False),
    "expired": ({"validity": der(0x30, der(0x17, b"200101000000Z"), der(0x17, b"210101000000Z"))}, False),
    "another key": ({"spki": public(Made().key)}, False),
}


@pytest.mark.parametrize("anchored", [True, False])
@pytest.mark.parametrize(("parts", "sound"), TRUST.values(), ids=TRUST)
def test_a_chain_with_an_odd_name_is_trusted_if_it_leads_to_an_anchor(
    parts: dict[str, bytes], sound: bool, anchored: bool
) -> None:
    """By its links, since cryptography's verifier does not read such a name."""
    root, sub = Made(named(b"V2G_Root")), Made(named(b"CPO_Sub_CA_2"))
    leaf = sub.sign(named(b"leaf", 0x0C), public(Made().key), b"")
    chain = read_chain(pem(leaf, sub.below(root, **parts)))
    assert chain is not None
    other = Made(named(b"V2G_Root"))

    why = untrusted(chain, pem(root.below(root) if anchored else other.below(other)))

    assert (why == "") is (sound and anchored)


# Names are compared by value.

SAME = {
    "UTF8String": named(b"CPO Sub-CA 2", 0x0C),
    "BMPString": named("CPO Sub-CA 2".encode("utf-16-be"), 0x1E),
    "another case": named(b"cpo SUB-ca 2"),
    "more white space": named(b"  CPO  Sub-CA 2 ", 0x0C),
}


@pytest.mark.parametrize("subject", SAME.values(), ids=SAME)
async def test_a_chain_whose_names_differ_by_their_encoding_is_in_order(
    here: Station, directory: Path, subject: bytes, tmp_path: Path
) -> None:
    """[RFC 5280 7.1]."""
    csr, root, sub = await here.csr(), Made(named(b"root")), Made()
    chain = [sub.leaf(csr), sub.below(root, name=subject)]
    (directory / "secc.pem").write_bytes(pem(*chain))
    verify_with_openssl(tmp_path, root.below(root), chain)

    await here.told("installed")

    assert here.counts["certificate_differs"] == 0


@pytest.mark.parametrize(
    ("subject", "key", "cause"),
    [
        pytest.param(named(b"CPO Sub-CA 3"), None, "CN=CPO Sub-CA 3", id="another name"),
        pytest.param(named(b"CPO Sub-CA 2"), Made().key, "does not verify", id="another key"),
        pytest.param(named(b"CPO Sub-CA 2"), SM2_SPKI, "cannot be verified", id="a key that is not known"),
    ],
)
async def test_where_an_issuer_does_not_fit_its_cause_is_named(
    here: Station,
    directory: Path,
    subject: bytes,
    key: ec.EllipticCurvePrivateKey | bytes | None,
    cause: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    csr, sub = await here.csr(), Made()
    spki = key if isinstance(key, bytes) else public(key or sub.key)
    (directory / "secc.pem").write_bytes(pem(sub.leaf(csr), sub.below(Made(named(b"root")), name=subject, spki=spki)))

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert here.counts["certificate_differs"] == 1
    assert cause in caplog.text


# A chain in pieces.


@dataclass
class Pki:
    """A root, two Sub-CAs below one another, and what they sign."""

    root: Made = field(default_factory=lambda: Made(named(b"V2G Root")))
    one: Made = field(default_factory=lambda: Made(named(b"CPO Sub-CA 1")))
    two: Made = field(default_factory=Made)

    def files(self, csr: str) -> dict[str, bytes]:
        """Each certificate of a chain by its name."""
        return {
            "leaf": self.two.leaf(csr),
            "two": self.two.below(self.one),
            "one": self.one.below(self.root),
            "root": self.root.below(self.root),
        }


PIECES = {
    "each in a file": (["leaf"], ["two"], ["one"]),
    "the leaf by itself": (["leaf"], ["two", "one"]),
    "the upper one by itself": (["leaf", "two"], ["one"]),
    "the middle one by itself": (["leaf", "one"], ["two"]),
    "in reverse": (["one", "two", "leaf"],),
    "the root by itself": (["leaf"], ["root"], ["one", "two"]),
    "a bundle with the root": (["leaf"], ["root", "one", "two"]),
}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
async def test_a_chain_in_pieces_is_put_together_in_order_and_without_its_root(
    here: Station, directory: Path, pieces: tuple[list[str], ...], caplog: pytest.LogCaptureFixture
) -> None:
    """[RFC 5246 7.4.2, RFC 8446 4.4.2]."""
    csr = await here.csr()
    files = Pki().files(csr)
    for piece in pieces:
        (directory / f"{'-'.join(piece)}.pem").write_bytes(pem(*(files[name] for name in piece)))

    await here.told("installed")

    assert shown(here) == pem(files["leaf"], files["two"], files["one"])
    assert not reasons(caplog)


def reasons(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.reason for record in caplog.records if hasattr(record, "reason")]


async def test_a_root_that_is_in_the_file_stays(here: Station, directory: Path) -> None:
    csr = await here.csr()
    files = Pki().files(csr)
    (directory / "secc.pem").write_bytes(pem(*files.values()))

    await here.told("installed")

    assert shown(here) == pem(*files.values())


@pytest.mark.parametrize("others", [[], ["one"], ["one", "root"]], ids=["nothing", "the next one", "all others"])
async def test_a_leaf_without_its_issuer_is_active_with_a_warning(
    here: Station, directory: Path, others: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    csr = await here.csr()
    files = Pki().files(csr)
    (directory / "secc.pem").write_bytes(pem(files["leaf"]))
    for name in others:
        (directory / f"{name}.pem").write_bytes(pem(files[name]))

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert shown(here) == pem(files["leaf"])
    assert reasons(caplog) == ["issuer_missing"]
    assert "CN=CPO Sub-CA 2" in caplog.text


async def test_a_leaf_that_a_root_signed_is_complete(
    here: Station, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    csr, root = await here.csr(), Made(named(b"root"))
    (directory / "secc.pem").write_bytes(pem(root.leaf(csr)))
    (directory / "root.pem").write_bytes(pem(root.below(root)))

    await here.told("installed")

    assert here.states(key_id_in(csr)) == [ACTIVE]
    assert not reasons(caplog)


async def test_sub_cas_of_an_older_hierarchy_with_the_same_names_are_not_taken(here: Station, directory: Path) -> None:
    csr, old, new = await here.csr(), Pki(), Pki()
    files = new.files(csr)
    (directory / "a.pem").write_bytes(pem(old.two.below(old.one), old.one.below(old.root)))
    (directory / "b.pem").write_bytes(pem(files["leaf"]))
    (directory / "c.pem").write_bytes(pem(files["two"], files["one"]))

    await here.told("installed")

    assert shown(here) == pem(files["leaf"], files["two"], files["one"])


async def test_of_two_certificates_for_an_issuer_the_one_that_leads_on_is_taken(here: Station, directory: Path) -> None:
    """Its key has been certified by a CA that is not here, for longer, and by one that is."""
    csr, pki = await here.csr(), Pki()
    files = pki.files(csr)
    gone = Made(named(b"gone"))
    for_ever = der(0x30, der(0x17, b"250101000000Z"), der(0x17, b"450101000000Z"))
    (directory / "a.pem").write_bytes(pem(files["leaf"]))
    (directory / "b.pem").write_bytes(pem(pki.two.below(gone, validity=for_ever), files["two"], files["one"]))

    await here.told("installed")

    assert shown(here) == pem(files["leaf"], files["two"], files["one"])


async def test_issuers_in_a_circle_end(here: Station, directory: Path) -> None:
    csr, one, two = await here.csr(), Made(named(b"one")), Made(named(b"two"))
    chain = [one.leaf(csr), one.below(two), two.below(one)]
    for number, certificate in enumerate(chain):
        (directory / f"{number}.pem").write_bytes(pem(certificate))

    await here.told("installed")

    assert shown(here) == pem(*chain)


async def test_an_endless_line_of_issuers_and_many_of_one_name_cost_a_bounded_time(
    here: Station, directory: Path
) -> None:
    csr = await here.csr()
    makers = [Made(named(b"CA %d" % number)) for number in range(3 * MAX_CHAIN)]
    line = [lower.below(upper) for lower, upper in pairwise(makers)]
    impostors = [Made().below(makers[0], name=named(b"CA 0")) for _ in range(3 * MAX_TRIES)]
    (directory / "secc.pem").write_bytes(pem(makers[0].leaf(csr), line[0]))
    (directory / "line.pem").write_bytes(pem(*line))
    (directory / "impostors.pem").write_bytes(pem(*impostors))

    with mock.patch("stationkey.x509.path.link", wraps=link) as verified:
        await here.told("installed")

    assert verified.call_count <= MAX_TRIES
    assert shown(here).count(b"BEGIN CERTIFICATE") == MAX_CHAIN


async def test_an_issuer_whose_signature_cannot_be_verified_is_not_taken_for_its_name_alone(
    here: Station, directory: Path
) -> None:
    csr, sub = await here.csr(), Made()
    leaf = sub.leaf(csr)
    (directory / "secc.pem").write_bytes(pem(leaf))
    (directory / "sub.pem").write_bytes(pem(sub.below(Made(named(b"root")), spki=SM2_SPKI)))

    await here.told("installed")

    assert shown(here) == pem(leaf)
