"""Configuration: a TOML file, the environment and the command line, to frozen values.

Precedence: command line, environment, file, default. The command line and the environment are read by `stationkey.cli`
(each option has its ``STATIONKEY_…`` variable); this module reads the file and puts the rest over it.

What a CA may want otherwise than the standards' profiles can be overridden for each certificate type. What no
station's certificate may have (CA:true, a subject without C, O or CN, a uncritical keyUsage) cannot, and is refused at
start rather than when a certificate is due.
"""

from __future__ import annotations

import codecs
import dataclasses
import os
import stat
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from stationkey.config.secrets import SecretReference
from stationkey.config.settings import (
    DAY,
    SRK_HANDLE,
    Bounds,
    MqttTerms,
    PolicyTerms,
    PoolTerms,
    Severity,
    Terms,
    TpmSession,
    TpmTerms,
)
from stationkey.contract.profiles import (
    NAME_MAX_LENGTH,
    PROFILES,
    Algorithm,
    CertificateProfile,
    CertificateType,
    EvseIdPlacement,
    ExtendedKeyUsage,
    KeyUsage,
)
from stationkey.errors import ConfigurationError
from stationkey.system.text import printable

DEFAULT_BROKER: Final = "mqtt://127.0.0.1:1883"
DEFAULT_STATE_DIR: Final = "/var/lib/stationkey"
DEFAULT_DEVICE: Final = "/dev/tpmrm0"
"""The kernel's resource manager: the one TPM device that several programs can share."""
MAX_FILE: Final = 1024 * 1024
MAX_SAID: Final = 200
"""Characters of what is said of a wrong file."""

T = TypeVar("T")
LogFormat = Literal["text", "json"]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Days = Annotated[float, Meta(gt=0, le=36_500)]


class _Section(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file; a name that it does not know is a mistake to be told, not to be passed over."""


class Deadlines(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[deadlines]``: seconds within which a request is answered, one way or the other.

    30 s is as long as a hung TPM may keep Josev waiting. RSA gets 60 s, because a hardware TPM searches for primes for
    tens of seconds.
    """

    ec: Seconds = 30.0
    rsa: Seconds = 60.0


class CsrOverrides(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[csr.CERTIFICATE_TYPE]``: what this operator's CA wants otherwise than the profile."""

    domain_component: Annotated[str, Meta(max_length=64, pattern=r"^[\x20-\x7e]*\Z")] | UnsetType = UNSET
    key_usage: list[KeyUsage] | UnsetType = UNSET
    extended_key_usage: list[ExtendedKeyUsage] | UnsetType = UNSET
    extended_key_usage_critical: bool | UnsetType = UNSET
    evse_id: EvseIdPlacement | UnsetType = UNSET


class Lifecycle(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[lifecycle]``: how long keys and records last, and how many there may be.

    Days are days of the daemon's running time, all its runs together: a clock that is set right by years ends no key.
    """

    pending_days: Days = 30.0
    failed_days: Days = 1.0
    grace_days: Days = 7.0
    answer_days: Days = 90.0
    pending_limit: Annotated[int, Meta(ge=1, le=100)] = 8
    pending_total: Annotated[int, Meta(ge=1, le=10_000)] = 256
    active_limit: Annotated[int, Meta(ge=1, le=10_000)] = 256
    history_limit: Annotated[int, Meta(ge=0, le=100_000)] = 1000

    def terms(self) -> Terms:
        """The same, as the service takes it."""
        return Terms(
            pending=int(self.pending_days * DAY),
            failed=int(self.failed_days * DAY),
            grace=int(self.grace_days * DAY),
            answers=int(self.answer_days * DAY),
            bounds=Bounds(
                pending_limit=self.pending_limit,
                pending_total=self.pending_total,
                active_limit=self.active_limit,
                history_limit=self.history_limit,
            ),
        )


class Pool(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[pool]``: keys made ahead, while the TPM has nothing else to do."""

    ec: Annotated[int, Meta(ge=0, le=64)] = 0
    rsa: Annotated[int, Meta(ge=0, le=16)] = 1
    idle_seconds: Annotated[float, Meta(ge=0, le=3600)] = 30.0
    max_age_days: Days = 30.0

    def terms(self) -> PoolTerms:
        """The same, as the service takes it."""
        return PoolTerms(ec=self.ec, rsa=self.rsa, idle=self.idle_seconds, age=int(self.max_age_days * DAY))


class Josev(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[josev]``: what is known of the Josev beside us."""

    certificate_dir: str | None = None
    """Where it puts the certificates that it installs: a status is then held against them."""


_Text = Annotated[str, Meta(max_length=4096)]
_Names = Annotated[list[Annotated[str, Meta(min_length=1, max_length=NAME_MAX_LENGTH)]], Meta(max_length=256)]
_Countries = Annotated[list[Annotated[str, Meta(pattern=r"^[A-Za-z]{2}\Z")]], Meta(max_length=256)]
_Patterns = Annotated[list[Annotated[str, Meta(min_length=1, max_length=2 * NAME_MAX_LENGTH)]], Meta(max_length=256)]
_FIRST_PERSISTENT: Final = 0x81000000
_PersistentHandle = Annotated[int, Meta(ge=_FIRST_PERSISTENT, le=0x81FFFFFF)]


def _secret(source: str) -> SecretReference | None:
    return SecretReference(source) if source else None


class Mqtt(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[mqtt]``: how the broker is spoken to, beside its URL. An empty text is the same as none."""

    ca_file: _Text = ""
    certificate_file: _Text = ""
    key_file: _Text = ""
    server_name: _Text = ""
    username: _Text = ""
    username_file: _Text = ""
    password_file: _Text = ""
    availability_topic: _Text = ""

    def terms(self, *, keystore: str = "") -> MqttTerms:
        """The same, as the edge takes it.

        Args:
            keystore: URI of the key store; where it is a TPM, a key of the client's that is in a TPM is in this one.

        Raises:
            ConfigurationError: it says two things that exclude each other.
        """
        if self.username and self.username_file:
            raise ConfigurationError(
                "[mqtt] has a username and a username_file: one of them is enough", reason="config_invalid"
            )
        if self.password_file and not (self.username or self.username_file):
            raise ConfigurationError("[mqtt] has a password_file and no username", reason="config_invalid")
        if self.key_file and not self.certificate_file:
            raise ConfigurationError("[mqtt] has a key_file and no certificate_file", reason="config_invalid")
        return MqttTerms(
            ca_file=Path(self.ca_file) if self.ca_file else None,
            certificate_file=_secret(self.certificate_file),
            key_file=_secret(self.key_file),
            tcti=keystore.removeprefix("tpm2:") if keystore.startswith("tpm2:") else None,
            server_name=self.server_name or None,
            username=self.username or _secret(self.username_file),
            password=_secret(self.password_file),
            availability_topic=self.availability_topic or None,
        )


class Policy(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[policy]``: what may be asked for, and how often."""

    certificate_types: list[CertificateType] = msgspec.field(default_factory=lambda: list(CertificateType))
    algorithms: list[Algorithm] = msgspec.field(default_factory=lambda: list(Algorithm))
    organization_names: _Names = msgspec.field(default_factory=list)
    country_names: _Countries = msgspec.field(default_factory=list)
    common_names: _Patterns = msgspec.field(default_factory=list)
    evse_ids: _Patterns = msgspec.field(default_factory=list)
    secc_id: Severity = "warn"
    off_profile: Severity = "warn"
    requests_per_minute: Annotated[float, Meta(ge=0, le=60_000)] = 60.0
    burst: Annotated[int, Meta(ge=1, le=100_000)] = 600
    queue: Annotated[int, Meta(ge=1, le=1024)] = 64
    payload_bytes: Annotated[int, Meta(ge=1024, le=1024 * 1024)] = 64 * 1024

    def terms(self) -> PolicyTerms:
        """The same, as the service takes it."""
        return PolicyTerms(
            certificate_types=tuple(self.certificate_types),
            algorithms=tuple(self.algorithms),
            organization_names=tuple(self.organization_names),
            country_names=tuple(self.country_names),
            common_names=tuple(self.common_names),
            evse_ids=tuple(self.evse_ids),
            secc_id=self.secc_id,
            off_profile=self.off_profile,
            requests_per_minute=self.requests_per_minute,
            burst=self.burst,
            queue=self.queue,
            payload_bytes=self.payload_bytes,
        )


class Tpm(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[tpm]``: how the TPM is used, and what keys in it are protected by besides. Secrets are named, never said."""

    srk_handle: _PersistentHandle = SRK_HANDLE
    owner_auth: _Text = ""
    srk_auth: _Text = ""
    endorsement_auth: _Text = ""
    key_auth: _Text = ""
    pcrs: Annotated[list[Annotated[int, Meta(ge=0, le=23)]], Meta(max_length=24)] = msgspec.field(default_factory=list)
    pcr_bank: Literal["sha1", "sha256", "sha384", "sha512"] = "sha256"
    session: TpmSession = "none"
    ak_handle: Annotated[int, Meta(ge=0, le=0x81FFFFFF)] = 0

    def terms(self) -> TpmTerms:
        """The same, as the key store takes it.

        Raises:
            ConfigurationError: a secret is named in a way that cannot be, or a handle is not persistent.
        """
        if 0 < self.ak_handle < _FIRST_PERSISTENT:
            raise ConfigurationError(
                f"[tpm] ak_handle {self.ak_handle:#x} is no persistent handle: those begin at {_FIRST_PERSISTENT:#x}",
                reason="config_invalid",
            )
        return TpmTerms(
            srk_handle=self.srk_handle,
            owner_auth=_secret(self.owner_auth),
            srk_auth=_secret(self.srk_auth),
            endorsement_auth=_secret(self.endorsement_auth),
            key_auth="generated" if self.key_auth == "generated" else _secret(self.key_auth),
            pcrs=tuple(sorted(set(self.pcrs))),
            pcr_bank=self.pcr_bank,
            session=self.session,
            ak_handle=self.ak_handle or None,
        )


class Metrics(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``[metrics]``: where figures and health can be asked for."""

    listen: _Text = ""


class File(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The configuration file. Every name is optional."""

    broker: str | None = None
    topic_prefix: str | None = None
    client_id: Annotated[str, Meta(max_length=64)] | None = None
    keystore: str | None = None
    allow_software_keys: bool | None = None
    state_dir: str | None = None
    log_format: LogFormat | None = None
    deadlines: Deadlines = Deadlines()
    lifecycle: Lifecycle = Lifecycle()
    pool: Pool = Pool()
    josev: Josev = Josev()
    mqtt: Mqtt = Mqtt()
    policy: Policy = msgspec.field(default_factory=Policy)
    tpm: Tpm = msgspec.field(default_factory=Tpm)
    metrics: Metrics = Metrics()
    csr: dict[CertificateType, CsrOverrides] = msgspec.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the daemon runs by.

    Attributes:
        broker: ``mqtt://HOST:PORT``, or ``mqtts://HOST:PORT`` for TLS.
        keystore: key-store URI.
        allow_software_keys: whether ``software:`` is let in.
        state_dir: where the ledger is.
        topic_prefix: put before both topics.
        client_id: MQTT client identifier, or None for one of the state directory's own.
        log_format: of the log.
        deadlines: see `Deadlines`.
        terms: see `Lifecycle`.
        pool: see `Pool`.
        certificate_dir: see `Josev`.
        mqtt: see `Mqtt`.
        policy: see `Policy`.
        tpm: see `Tpm`.
        metrics: where figures and health can be asked for, see `Metrics`; None for nowhere.
        profiles: the profile of each certificate type, overrides included.
    """

    broker: str
    keystore: str
    allow_software_keys: bool
    state_dir: Path
    topic_prefix: str
    client_id: str | None
    log_format: LogFormat
    deadlines: Deadlines
    terms: Terms
    pool: PoolTerms
    certificate_dir: Path | None
    mqtt: MqttTerms
    policy: PolicyTerms
    tpm: TpmTerms
    metrics: str | None
    profiles: Mapping[CertificateType, CertificateProfile]


def read_file(path: Path) -> File:
    """Read a configuration file.

    Raises:
        ConfigurationError: it cannot be read, everybody may write to it, it is no TOML, or it says something that
            cannot be; the message names where.
    """
    content, open_to_all = _content(path)
    if open_to_all:
        raise ConfigurationError(
            _OPEN.format(path), reason="config_open", hint=f"chmod o-w {path}, and look at what is in it"
        )
    return _checked(path, _table(path, content))


_OPEN: Final = "every user of this machine can write to the configuration file {}"


def _content(path: Path) -> tuple[bytes, bool]:
    """What is in a file, and whether every user may write to it."""
    try:
        with path.open("rb") as opened:
            status = os.fstat(opened.fileno())
            content = opened.read(MAX_FILE + 1)  # no more than this of a device that never ends
    except OSError as error:
        raise ConfigurationError(
            f"the configuration file {path} cannot be read: {error.strerror}", reason="config_unreadable"
        ) from None
    if len(content) > MAX_FILE:
        raise ConfigurationError(f"the configuration file {path} is too large", reason="config_unreadable")
    return content, stat.S_ISREG(status.st_mode) and bool(status.st_mode & stat.S_IWOTH)


def _table(path: Path, content: bytes) -> dict[str, object]:
    try:
        text = content.removeprefix(codecs.BOM_UTF8).decode()  # some editors put that mark there, and nobody sees it
    except UnicodeDecodeError:
        raise ConfigurationError(f"the configuration file {path} is not UTF-8", reason="config_invalid") from None
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits, too
        raise ConfigurationError(f"{path} is no TOML: {_said(error)}", reason="config_invalid") from None


def _typed(path: Path, table: dict[str, object]) -> File:
    _refuse_nul(path, table)
    _refuse_fixed(path, table)
    try:
        return msgspec.convert(table, File)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{path}: {_said(error)}", reason="config_invalid") from None


def _checked(path: Path, table: dict[str, object]) -> File:
    file = _typed(path, table)
    # These refuse what cannot be, whether or not the caller asks for it.
    apply_overrides(file.csr)
    file.mqtt.terms()
    file.tpm.terms()
    return file


def _said(words: object) -> str:
    """What a library says of the file, which may show a piece of it: one short line for a terminal."""
    text = printable(str(words))
    return text if len(text) <= MAX_SAID else text[: MAX_SAID - 1] + "…"


def _refuse_nul(path: Path, table: dict[str, object]) -> None:
    """No name of a file, a topic or anything else has a NUL in it, and TOML can write one."""
    ahead: list[object] = [table]
    while ahead:
        match ahead.pop():
            case dict() as members:
                ahead += members.keys()
                ahead += members.values()
            case list() as members:
                ahead += members
            case str() as text if "\0" in text:
                raise ConfigurationError(f"{path}: a text has a NUL character in it", reason="config_invalid")


class Parts(NamedTuple):
    """What can be used of a file that `read_file` refuses.

    Attributes:
        file: all that is right in it.
        complaints: what is wrong with the rest.
        lost: names at the top of the file of which something could not be used; None where that is all of it.
    """

    file: File
    complaints: tuple[str, ...]
    lost: frozenset[str] | None


def read_parts(path: Path) -> Parts:
    """What can be used of a file that `read_file` refuses, name by name, and what is wrong with each other one.

    For who wants to see every mistake at once; the daemon takes the whole file, or none of it. Never raises.
    """
    complaints: list[str] = []
    try:
        content, open_to_all = _content(path)
        if open_to_all:
            complaints.append(_OPEN.format(path))
        table = _table(path, content)
    except ConfigurationError as error:
        return Parts(File(), (*complaints, error.message), None)
    good: dict[str, object] = {}
    lost = set()
    for name, value in table.items():
        right, wrong = _right_part(path, name, value)
        good |= right
        complaints += wrong
        if wrong:
            lost.add(name)
    return Parts(_checked(path, good), tuple(complaints), frozenset(lost))


def _right_part(path: Path, name: str, value: object) -> tuple[dict[str, object], list[str]]:
    """What of a name at the top of the file can be used, and what is wrong with the rest of it."""
    try:
        _checked(path, {name: value})
    except ConfigurationError as error:
        whole = [error.message]
    else:
        return {name: value}, []
    if not isinstance(value, dict):
        return {}, whole
    good: dict[str, object] = {}
    complaints = []
    for field, one in value.items():
        try:  # each by itself: what two of them are together is seen below
            _typed(path, {name: {field: one}})
        except ConfigurationError as error:
            complaints.append(error.message)
        else:
            good[field] = one
    try:
        _checked(path, {name: good})
    except ConfigurationError as error:
        return {}, [*complaints, error.message]
    return {name: good}, complaints or whole


_FIXED: Final = {
    **dict.fromkeys(
        ("ca", "basic_constraints", "basic_constraints_critical", "path_length"),
        "basicConstraints is always critical, with CA:false: a station's certificate signs no other",
    ),
    **dict.fromkeys(
        ("subject", "country_name", "organization_name", "common_name"),
        "the subject always has C, O and CN, and they come with each request",
    ),
    "key_usage_critical": "keyUsage is always critical [RFC 5280 4.2.1.3]",
}
"""What one might want to override, and why it cannot be."""


def _refuse_fixed(path: Path, table: dict[str, object]) -> None:
    sections = table.get("csr")
    if not isinstance(sections, dict):
        return
    for name, section in sections.items():
        for field in section if isinstance(section, dict) else ():
            if field in _FIXED:
                where = f"{path}: [csr.{_said(name)}] {field}"
                raise ConfigurationError(f"{where} cannot be configured: {_FIXED[field]}", reason="config_invalid")


def apply_overrides(
    overrides: Mapping[CertificateType, CsrOverrides],
) -> Mapping[CertificateType, CertificateProfile]:
    """The standards' profiles with the operator's overrides put over them.

    Raises:
        ConfigurationError: keyUsage without digitalSignature: no TLS handshake could be signed with the key.
    """
    profiles = dict(PROFILES)
    for certificate_type, override in overrides.items():
        profile = profiles[certificate_type]
        changes: dict[str, object] = {}
        if override.domain_component is not UNSET:
            changes["domain_component"] = override.domain_component or None
        if override.key_usage is not UNSET:
            if KeyUsage.DIGITAL_SIGNATURE not in override.key_usage:
                raise ConfigurationError(
                    f"[csr.{certificate_type}] key_usage must have digitalSignature", reason="config_invalid"
                )
            changes["key_usage"] = tuple(override.key_usage)
        if override.extended_key_usage is not UNSET:
            changes["extended_key_usage"] = tuple(override.extended_key_usage)
        if override.extended_key_usage_critical is not UNSET:
            changes["extended_key_usage_critical"] = override.extended_key_usage_critical
        if override.evse_id is not UNSET:
            changes["evse_id_placement"] = override.evse_id
        profiles[certificate_type] = dataclasses.replace(profile, **changes)  # type: ignore[arg-type] # names and types are those of CsrOverrides
    return MappingProxyType(profiles)


def settle(
    file: File,
    *,
    broker: str | None = None,
    topic_prefix: str | None = None,
    keystore: str | None = None,
    allow_software_keys: bool | None = None,
    state_dir: Path | None = None,
    log_format: LogFormat | None = None,
) -> Settings:
    """Put what the command line or the environment said (not None) over the file, and the file over the defaults.

    Raises:
        ConfigurationError: no key store is named, and this machine has no ``/dev/tpmrm0``.
    """
    keystore = keystore or file.keystore or default_keystore()
    return Settings(
        broker=broker or file.broker or DEFAULT_BROKER,
        topic_prefix=_first(topic_prefix, file.topic_prefix) or "",
        client_id=file.client_id or None,
        keystore=keystore,
        allow_software_keys=bool(_first(allow_software_keys, file.allow_software_keys)),
        state_dir=state_dir or Path(file.state_dir or DEFAULT_STATE_DIR),
        log_format=log_format or file.log_format or "text",
        deadlines=file.deadlines,
        terms=file.lifecycle.terms(),
        pool=file.pool.terms(),
        certificate_dir=Path(file.josev.certificate_dir) if file.josev.certificate_dir else None,
        mqtt=file.mqtt.terms(keystore=keystore),
        policy=file.policy.terms(),
        tpm=file.tpm.terms(),
        metrics=file.metrics.listen or None,
        profiles=apply_overrides(file.csr),
    )


def _first(value: T | None, otherwise: T | None) -> T | None:
    return otherwise if value is None else value


def default_keystore() -> str:
    """The URI of this machine's TPM behind the kernel's resource manager.

    Raises:
        ConfigurationError: it has none. Nothing else is ever chosen in its place.
    """
    if Path(DEFAULT_DEVICE).exists():
        return f"tpm2:device:{DEFAULT_DEVICE}"
    raise ConfigurationError(
        f"this machine has no {DEFAULT_DEVICE}, and no key store was named",
        reason="keystore_unnamed",
        hint="name one with --keystore, for example tpm2:device:/dev/tpm0 or tpm2:swtpm:host=127.0.0.1,port=2321",
    )
