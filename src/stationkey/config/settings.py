"""How long keys and records last, and how many there may be. Values only; `stationkey.config.file` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from stationkey.config.secrets import SecretReference
from stationkey.contract.profiles import Algorithm, CertificateType

DAY: Final = 86_400_000
"""Milliseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How many.

    Attributes:
        pending_limit: pending keys for one certificate type and EVSE. A CSMS may answer the first CSR after later ones
            were sent (OCTT TC_A_23), so it is more than one; eight are more than any retry scheme sends in a row.
        pending_total: pending keys in all. EVSE IDs come over MQTT, and there are many of them. Keys made
            ahead are none.
        active_limit: active keys in all: one for each certificate type and EVSE, and EVSE IDs come over MQTT.
        history_limit: destroyed keys that stay on record: years of renewals, in a MiB or two.
    """

    pending_limit: int = 8
    pending_total: int = 256
    active_limit: int = 256
    history_limit: int = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTerms:
    """Keys made ahead.

    Attributes:
        ec: how many of each elliptic curve; 0 for none.
        rsa: how many of the RSA size that the TPM makes; 0 for none.
        idle: seconds that nobody must have wanted anything of the key store, before it is made to work ahead.
        age: how long an unused one is kept, in milliseconds of running time.
    """

    ec: int = 0
    rsa: int = 0
    idle: float = 30.0
    age: int = 30 * DAY


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """How long, in milliseconds of running time: a station's clock may be years off until it has been set.

    Attributes:
        pending: of a key whose certificate does not come. A CSMS that lets a person sign takes days.
        failed: of a key after its certificate failed to install: time for another try.
        grace: of a key after it was replaced or retired: TLS sessions may still use it.
        answers: how long an id is remembered, or longer while its key is pending; nobody retries for so long.
        bounds: see `Bounds`.
    """

    pending: int = 30 * DAY
    failed: int = 1 * DAY
    grace: int = 7 * DAY
    answers: int = 90 * DAY
    bounds: Bounds = field(default_factory=Bounds)


@dataclass(frozen=True, slots=True, kw_only=True)
class MqttTerms:
    """How the broker is spoken to, beside its URL.

    Attributes:
        ca_file: certificates, in PEM, that the broker's must lead to; None for those that this machine trusts.
        certificate_file: where the client's certificate and its chain are, in PEM, or None.
        key_file: where its private key is, in PEM, a ``TSS2 PRIVATE KEY`` included; None where it is in
            `certificate_file`.
        tcti: of the TPM that such a key is in; None for that of the environment, ``TPM2OPENSSL_TCTI``.
        server_name: the name in the broker's certificate where it is another than the URL's host, or None.
        username: user name, or None.
        password: where the password is, or None.
        availability_topic: where the broker keeps ``online`` or ``offline`` for whoever asks; None for nowhere.
    """

    ca_file: Path | None = None
    certificate_file: SecretReference | None = None
    key_file: SecretReference | None = None
    tcti: str | None = None
    server_name: str | None = None
    username: str | SecretReference | None = None
    password: SecretReference | None = None
    availability_topic: str | None = None


Severity = Literal["off", "warn", "refuse"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTerms:
    """What may be asked for, and how often. An empty tuple of names or patterns lets all through.

    Attributes:
        certificate_types: those that are served.
        algorithms: those that are served.
        organization_names: O, each in full.
        country_names: C, each in full, in either case.
        common_names: patterns of CN, see `stationkey.service.policy`.
        evse_ids: patterns of the EVSE ID.
        secc_id: what is done where a certificate type wants a SECC ID for its CN, and it is none.
        off_profile: what is done where the profile wants another algorithm.
        requests_per_minute: how fast the allowance of a certificate type grows again; 0 for no limit.
        burst: how large the allowance is at most.
        queue: how many messages are in hand at a time; the broker holds the rest.
        payload_bytes: how large a message may be.
    """

    certificate_types: tuple[CertificateType, ...] = tuple(CertificateType)
    algorithms: tuple[Algorithm, ...] = tuple(Algorithm)
    organization_names: tuple[str, ...] = ()
    country_names: tuple[str, ...] = ()
    common_names: tuple[str, ...] = ()
    evse_ids: tuple[str, ...] = ()
    secc_id: Severity = "warn"
    off_profile: Severity = "warn"
    requests_per_minute: float = 60.0
    burst: int = 600
    queue: int = 64
    payload_bytes: int = 64 * 1024


TpmSession = Literal["none", "hmac", "encrypted"]

SRK_HANDLE: Final = 0x81000001
"""Where the SRK persists [TCG TPM v2.0 Provisioning Guidance 7.5.1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TpmTerms:
    """How the TPM is used, and what keys in it are protected by besides.

    Attributes:
        srk_handle: persistent handle of the storage root key.
        owner_auth: where the authorisation value of the owner hierarchy is, or None where it has none.
        srk_auth: the same of the storage root key.
        endorsement_auth: the same of the endorsement hierarchy.
        key_auth: where the authorisation value of the keys is; ``generated`` for a random one that the TPM seals; None
            for none.
        pcrs: platform configuration registers whose values, as they are when a key is made, must be the same when it
            is used; empty for no such policy.
        pcr_bank: hash of the bank that they are of.
        session: how what crosses the bus is protected.
        ak_handle: persistent handle of the attestation key; None for one derived from the endorsement seed.
    """

    srk_handle: int = SRK_HANDLE
    owner_auth: SecretReference | None = None
    srk_auth: SecretReference | None = None
    endorsement_auth: SecretReference | None = None
    key_auth: SecretReference | Literal["generated"] | None = None
    pcrs: tuple[int, ...] = ()
    pcr_bank: str = "sha256"
    session: TpmSession = "none"
    ak_handle: int | None = None
