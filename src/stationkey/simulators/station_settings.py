"""Who the simulated station is, and whom it talks to."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from stationkey.config.settings import MqttTerms
from stationkey.contract.profiles import PROFILES, CertificateProfile, CertificateType
from stationkey.mqtt.connection import PLAIN
from stationkey.mqtt.url import Broker
from stationkey.simulators.client_certificate import ClientCertificate
from stationkey.simulators.ocpp import OcppVersion


class StationSettings(Struct, frozen=True, kw_only=True):
    """Who the station is, and whom it talks to.

    Attributes:
        csms: URL of the CSMS without the station's identity, ``ws://`` or ``wss://``.
        identity: the station's identity, the last part of the URL.
        versions: OCPP versions to offer, best first.
        broker: where the charging station's side listens.
        mqtt: TLS and credentials for it.
        topic_prefix: see `stationkey.mqtt.topics.topics`.
        station: its name in a site; empty for a single station.
        common_name: CN of the CSRs.
        organization_name: O, as the CSMS has it configured [A00.FR.509].
        country_name: C.
        evse_id: EVSE that the V2G keys are for, or None.
        state_dir: where pending CSRs are written down.
        certificate_dir: where installed certificates go.
        trust_anchors: PEM file of the roots that a signed certificate must lead to; None to trust what the CSMS sends.
        wait_minimum: ``CertSigningWaitMinimum``, seconds before the same CSR is sent again; doubled each time.
        repeat_times: ``CertSigningRepeatTimes``, how often it is sent again at the most.
        password: for HTTP basic authentication (security profiles 1 and 2), or None.
        tls: for ``wss://``: whom to trust.
        client: with security profile 3, instead of `tls`: the certificates to connect with.
        renew_before: days before its end from which a certificate is renewed [A03.FR.02], or for the last third of its
            life if that is shorter; 0 for never.
    """

    csms: str
    identity: str
    broker: Broker
    common_name: str
    organization_name: str
    country_name: str
    state_dir: Path
    certificate_dir: Path
    versions: tuple[OcppVersion, ...] = (OcppVersion.V201,)
    topic_prefix: str = ""
    station: str = ""
    mqtt: MqttTerms = PLAIN
    evse_id: str | None = None
    trust_anchors: Path | None = None
    wait_minimum: float = 30.0
    repeat_times: int = 3
    password: str | None = None
    tls: ssl.SSLContext | None = None
    client: ClientCertificate | None = None
    renew_before: float = 0.0
    profiles: Mapping[CertificateType, CertificateProfile] = PROFILES
