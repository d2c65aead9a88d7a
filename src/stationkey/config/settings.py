"""Every option of the service: type, bounds, default, place in the file and help, once.

`stationkey.config.file` reads a file by these annotations, and `stationkey.cli` makes its options from them; a test
compares the sample file and the documents. A new option is a field here and its consumer.

The environment variable of a command-line option ``--name`` is ``STATIONKEY_NAME``.
"""
# The annotations are read at run time, so they are not postponed here.

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from msgspec import UNSET, Meta, Struct
from msgspec.structs import replace

from stationkey.config.options import FORM, Form, Option
from stationkey.config.secrets import SecretReference
from stationkey.config.site import LedgerPassword, LedgerUri, SiteTerms
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

DAY: Final = 86_400_000
"""Milliseconds."""
DEFAULT_DEVICE: Final = "/dev/tpmrm0"
"""The kernel's resource manager, through which several programs can share the TPM."""
SRK_HANDLE: Final = 0x81000001
"""Where the SRK persists [TCG TPM v2.0 Provisioning Guidance 7.5.1]."""
DEFAULT_STORE: Final = "default"
"""Name of the key store that the option ``keystore`` names."""
_FIRST_PERSISTENT: Final = 0x81000000
_LAST_PERSISTENT: Final = 0x81FFFFFF

LogFormat = Literal["text", "json"]
Severity = Literal["off", "warn", "refuse"]
TpmSession = Literal["none", "hmac", "encrypted"]
Seconds = Annotated[float, Meta(gt=0, le=3600)]


def _secret(source: str) -> Any:
    return SecretReference(source) if source else UNSET


def _key_auth(source: str) -> Any:
    return source if source == "generated" else _secret(source)


def _attestation_handle(handle: int) -> Any:
    if 0 < handle < _FIRST_PERSISTENT:
        raise ValueError(f"{handle:#x} is not a persistent handle: those begin at {_FIRST_PERSISTENT:#x}")
    return handle or UNSET


def _command(words: tuple[str, ...]) -> tuple[str, ...]:
    if words and not words[0].startswith("/"):
        raise ValueError(f"{words[0]!r} is not an absolute path")
    return words


def _key_usage(usages: tuple[KeyUsage, ...]) -> tuple[KeyUsage, ...]:
    if KeyUsage.DIGITAL_SIGNATURE not in usages:  # no TLS handshake could be signed with the key
        raise ValueError("must have digitalSignature")
    return usages


_Text = Annotated[str, Meta(max_length=4096)]
_TEXT: Final = Form(_Text, lambda text: text or UNSET)  # an empty text leaves an option unset
_PATH: Final = Form(_Text, lambda text: Path(text) if text else UNSET)
_SECRET: Final = Form(_Text, _secret)
_DAYS: Final = Form(Annotated[float, Meta(gt=0, le=36_500)], lambda days: int(days * DAY))

_Names = tuple[Annotated[str, Meta(min_length=1, max_length=NAME_MAX_LENGTH)], ...]
_Countries = tuple[Annotated[str, Meta(pattern=r"^[A-Za-z]{2}\Z", extra={FORM: "text of two letters"})], ...]
_Patterns = tuple[Annotated[str, Meta(min_length=1, max_length=2 * NAME_MAX_LENGTH)], ...]
_StoreName = Annotated[
    str,
    Meta(
        pattern=r"^(?!default\Z)[a-z][a-z0-9_-]{0,31}\Z",
        extra={FORM: "a name of up to 32 characters, a-z, 0-9, - and _"},
    ),
]
_Stores = Annotated[
    dict[_StoreName, Annotated[str, Meta(min_length=1, max_length=4096)]],
    Meta(max_length=7, extra={FORM: 'a table of NAME = "URI", 7 at most, a name of a-z, 0-9, - and _'}),
]
_Limits = Annotated[
    dict[Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,31}\Z")], Annotated[int, Meta(ge=1, le=10_000)]],
    Meta(max_length=8, extra={FORM: "a table of NAME = LIMIT, 8 at most, a limit from 1 to 10000"}),
]
_Registers = Annotated[tuple[Annotated[int, Meta(ge=0, le=23)], ...], Meta(max_length=24)]
_MANY: Final = Meta(max_length=256)


class KeyStoreChoice(Struct, frozen=True, kw_only=True):
    """``[keystore_for]``: the key store of a certificate type, if not ``keystore``."""

    charging_station_certificate: Annotated[
        str | None, Option("Key store of charging_station_certificate, by its name.", _TEXT, example='"se"')
    ] = None
    v2g_certificate: Annotated[
        str | None, Option("Key store of v2g_certificate, by its name.", _TEXT, example='"se"')
    ] = None
    v2g20_certificate: Annotated[
        str | None, Option("Key store of v2g20_certificate, by its name.", _TEXT, example='"se"')
    ] = None
    existing_keys: Annotated[
        tuple[_StoreName, ...],
        Meta(max_length=7),
        Option("Key stores that create no new keys, and serve their existing ones.", example='["old"]'),
    ] = ()


class NamedStore(Struct, frozen=True):
    """A key store of the configuration.

    Attributes:
        name: in ``[keystores]``, or `DEFAULT_STORE`.
        uri: its URI.
        types: the certificate types whose keys are made in it.
    """

    name: str
    uri: str
    types: frozenset[CertificateType]

    @property
    def place(self) -> str:
        """Return where its URI is in the file."""
        return "keystore" if self.name == DEFAULT_STORE else f"keystores.{self.name}"


class Deadlines(Struct, frozen=True, kw_only=True):
    """``[deadlines]``: seconds within which a request is accepted or rejected.

    A hung TPM delays Josev for at most 30 s. RSA gets 60 s, because a hardware TPM takes tens of seconds for a key.
    """

    ec: Annotated[Seconds, Option("Seconds for a request for an elliptic-curve key.")] = 30.0
    rsa: Annotated[Seconds, Option("Seconds for a request for an RSA key.")] = 60.0


class Bounds(Struct, frozen=True, kw_only=True):
    """Limits on keys and records.

    A CSMS may answer the first CSR after later ones were sent (OCTT TC_A_23), so several keys may be pending; eight are
    more than retries need. Any number of EVSE IDs may come over MQTT.

    Attributes:
        types: certificate types whose keys are counted together: those of one key store.
        shards: of the site; 0 for a single station.
        active_of_site: most active keys of all stations in that store; 0 for no limit.
        pending_of_shard: most pending keys of all stations of a shard in that store; None for no limit.
    """

    pending_limit: Annotated[
        int, Meta(ge=1, le=100), Option("Most pending keys for one certificate type and EVSE.")
    ] = 8
    pending_total: Annotated[
        int, Meta(ge=1, le=10_000), Option("Most pending keys in a key store, without keys made ahead.")
    ] = 256
    pending_in: Annotated[
        Mapping[str, int],
        Option(
            "The same for a key store with little room, by its name; of all stations of a site.",
            Form(_Limits, lambda limits: limits or UNSET),
        ),
    ] = {}
    active_limit: Annotated[int, Meta(ge=1, le=10_000), Option("Most active keys in a key store.")] = 256
    root_limit: Annotated[
        int,
        Meta(ge=1, le=8),
        Option("Roots with an active key each, for one certificate type and EVSE; 1 to not tell roots apart."),
    ] = 1
    history_limit: Annotated[
        int, Meta(ge=0, le=100_000), Option("Destroyed keys kept on record: years of renewals, in 1 to 2 MiB.")
    ] = 1000

    types: tuple[CertificateType, ...] = tuple(CertificateType)
    shards: int = 0
    active_of_site: int = 0
    pending_of_shard: int | None = None

    def within(self, store: str, types: Iterable[CertificateType]) -> "Bounds":
        """Return the limits of one key store.

        Args:
            store: its name.
            types: certificate types whose keys are made in it.
        """
        room = self.pending_in.get(store)
        part = room // self.shards if room and self.shards else None
        total = min(self.pending_total, part) if part else room or self.pending_total
        return replace(self, types=tuple(sorted(types)), pending_total=total, pending_of_shard=part)


class Terms(Struct, frozen=True, kw_only=True):
    """``[lifecycle]``: periods of keys and records in milliseconds (days in the file), and limits.

    Periods are running time of the daemon, all its runs together: setting a wrong clock ends no key.
    """

    pending: Annotated[int, Option("Days that a pending key is kept.", _DAYS, "pending_days", example="30")] = 30 * DAY
    failed: Annotated[
        int, Option("Days that a key is kept after a failed installation.", _DAYS, "failed_days", example="1")
    ] = 1 * DAY
    grace: Annotated[int, Option("Days that a replaced or retired key is kept.", _DAYS, "grace_days", example="7")] = (
        7 * DAY
    )
    answers: Annotated[
        int,
        Option("Days that an id is remembered; longer while its key is pending.", _DAYS, "answer_days", example="90"),
    ] = 90 * DAY
    bounds: Bounds = Bounds()


class PoolTerms(Struct, frozen=True, kw_only=True):
    """``[pool]``: keys made ahead while the TPM is idle. Idle in seconds, age in milliseconds."""

    ec: Annotated[int, Meta(ge=0, le=64), Option("Keys kept ready for each elliptic curve; 0 for none.")] = 0
    rsa: Annotated[int, Meta(ge=0, le=16), Option("RSA keys kept ready, of the size that the TPM makes.")] = 1
    idle: Annotated[
        float,
        Option(
            "Seconds that the TPM must have been idle.",
            Form(Annotated[float, Meta(ge=0, le=3600)], lambda seconds: seconds),
            "idle_seconds",
        ),
    ] = 30.0
    age: Annotated[
        int, Option("Days of running time that an unused key is kept.", _DAYS, "max_age_days", example="30")
    ] = 30 * DAY


class RenewalTerms(Struct, frozen=True, kw_only=True):
    """``[renewal]``: when a certificate is due for renewal, and the hints. Days in the file, milliseconds here."""

    before: Annotated[
        int,
        Option("Days before its end when a certificate is due for renewal.", _DAYS, "before_days", example="30"),
    ] = 30 * DAY
    life_divisor: Annotated[
        int,
        Meta(ge=1, le=100),
        Option("A certificate is due for at most its life divided by this."),
    ] = 3
    repeat: Annotated[
        int,
        Option(
            "Days of running time until a hint is repeated; doubled each time, up to eight times.",
            _DAYS,
            "repeat_days",
            example="1",
        ),
    ] = 1 * DAY
    command: Annotated[
        tuple[str, ...],
        Option(
            "Program to run for each hint: its absolute path, then its arguments; no shell. Empty for none.",
            Form(Annotated[tuple[_Text, ...], Meta(max_length=64)], _command),
            example='["/usr/local/bin/renew", "--now"]',
        ),
    ] = ()
    timeout: Annotated[
        Seconds, Option("Seconds for that program; then it is killed with its process group.", place="command_timeout")
    ] = 30.0
    topic: Annotated[
        str | None,
        Option(
            "Topic on which the certificates due for renewal are retained; with topic_prefix.",
            _TEXT,
            example='"stationkey/renewal"',
        ),
    ] = None


class MqttTerms(Struct, frozen=True, kw_only=True):
    """``[mqtt]``: TLS and credentials for the broker.

    Attributes:
        tcti: TCTI of the TPM of a ``TSS2 PRIVATE KEY`` in `key_file`: that of the key store; None for that of the
            environment, ``TPM2OPENSSL_TCTI``.
    """

    ca_file: Annotated[
        Path | None,
        Option(
            "Authorities (PEM) to trust for the broker.",
            _PATH,
            metavar="FILE",
            default="those of this machine",
            example='"/etc/ssl/certs/ca-certificates.crt"',
        ),
    ] = None
    certificate_file: Annotated[
        SecretReference | None,
        Option(
            "Our certificate (PEM) for the broker: a path, or credential:NAME.",
            _SECRET,
            metavar="FILE",
            example='"credential:client.pem"',
        ),
    ] = None
    key_file: Annotated[
        SecretReference | None,
        Option(
            "Its private key (PEM), if in another file; may be a key in the TPM.",
            _SECRET,
            metavar="FILE",
            example='"credential:client.key"',
        ),
    ] = None
    tcti: str | None = None
    server_name: Annotated[
        str | None,
        Option(
            "Name in the broker's certificate.", _TEXT, metavar="NAME", default="the host", example='"broker.local"'
        ),
    ] = None
    username: Annotated[
        str | SecretReference | None,
        Option("User name at the broker.", _TEXT, metavar="NAME", example='"stationkey"'),
        Option(
            "File of the user name instead: a path, or credential:NAME.",
            _SECRET,
            "username_file",
            example='"credential:mqtt-username"',
        ),
    ] = None
    password: Annotated[
        SecretReference | None,
        Option(
            "File of the password for the broker: a path, or credential:NAME.",
            _SECRET,
            "password_file",
            metavar="FILE",
            example='"credential:mqtt-password"',
        ),
    ] = None
    availability_topic: Annotated[
        str | None,
        Option(
            "Topic on which online or offline is retained; with topic_prefix.",
            _TEXT,
            example='"stationkey/availability"',
        ),
    ] = None

    def contradiction(self) -> str:
        """Return the contradiction between valid options; empty if there is none."""
        if self.password and not self.username:
            return "there is a password_file and no username"
        if self.key_file and not self.certificate_file:
            return "there is a key_file and no certificate_file"
        return ""


class PolicyTerms(Struct, frozen=True, kw_only=True):
    """``[policy]``: which requests are served, and how often. An empty tuple of names or patterns allows all.

    See `stationkey.service.policy` for the patterns.
    """

    certificate_types: Annotated[
        tuple[CertificateType, ...], Option("Certificate types that are served.", example='["v2g_certificate"]')
    ] = tuple(CertificateType)
    algorithms: Annotated[tuple[Algorithm, ...], Option("Algorithms that are served.", example='["ECDSA_SHA256"]')] = (
        tuple(Algorithm)
    )
    organization_names: Annotated[
        _Names, _MANY, Option("Names (O) that are served, compared exactly.", example='["Operator GmbH"]')
    ] = ()
    country_names: Annotated[
        _Countries, _MANY, Option("Countries (C) that are served, in either case.", example='["DE", "FR"]')
    ] = ()
    common_names: Annotated[
        _Patterns, _MANY, Option("Patterns of CN, one of which must match.", example='["DE-ABC-S-*"]')
    ] = ()
    evse_ids: Annotated[
        _Patterns, _MANY, Option("Patterns of the EVSE ID, one of which must match.", example='["DE*ABC*E*"]')
    ] = ()
    secc_id: Annotated[Severity, Option("For a CN that should be a SECC ID and is not one.")] = "warn"
    off_profile: Annotated[Severity, Option("For another algorithm than the profile prefers.")] = "warn"
    requests_per_minute: Annotated[
        float,
        Meta(ge=0, le=60_000),
        Option("Growth of each certificate type's allowance; 0 for no limit."),
    ] = 60.0
    burst: Annotated[int, Meta(ge=1, le=100_000), Option("Largest allowance of a certificate type.")] = 600
    queue: Annotated[int, Meta(ge=1, le=1024), Option("Messages in flight; the broker queues the rest.")] = 64
    payload_bytes: Annotated[int, Meta(ge=1024, le=1024 * 1024), Option("Largest message in bytes.")] = 64 * 1024


class TpmTerms(Struct, frozen=True, kw_only=True):
    """``[tpm]``: use of the TPM, and additional protection of its keys. Secrets are references.

    Attributes:
        SCHEME: of the key stores whose options these are.
    """

    SCHEME: ClassVar[str] = "tpm2"

    srk_handle: Annotated[
        int,
        Meta(ge=_FIRST_PERSISTENT, le=_LAST_PERSISTENT),
        Option("Persistent handle of the storage root key.", example="0x81000001"),
    ] = SRK_HANDLE
    owner_auth: Annotated[
        SecretReference | None,
        Option("File of the owner hierarchy's authorisation value.", _SECRET, example='"credential:owner-auth"'),
    ] = None
    srk_auth: Annotated[
        SecretReference | None,
        Option("File of the storage root key's authorisation value.", _SECRET, example='"credential:srk-auth"'),
    ] = None
    endorsement_auth: Annotated[
        SecretReference | None,
        Option(
            "File of the endorsement hierarchy's authorisation value.",
            _SECRET,
            example='"credential:endorsement-auth"',
        ),
    ] = None
    key_auth: Annotated[
        SecretReference | Literal["generated"] | None,
        Option(
            "File of new keys' authorisation value; generated for a random one sealed by the TPM.",
            Form(_Text, _key_auth),
            example='"generated"',
        ),
    ] = None
    pcrs: Annotated[
        tuple[int, ...],
        Option(
            "Platform configuration registers that new keys are bound to.",
            Form(_Registers, lambda registers: tuple(sorted(set(registers)))),
            example="[0, 7]",
        ),
    ] = ()
    pcr_bank: Annotated[
        str,
        Option(
            "Bank (hash) of these registers.",
            Form(Literal["sha1", "sha256", "sha384", "sha512"], lambda bank: bank),
        ),
    ] = "sha256"
    session: Annotated[TpmSession, Option("Protection of the bus to the TPM.")] = "none"
    ak_handle: Annotated[
        int | None,
        Option(
            "Persistent handle of the attestation key; 0 for one derived from the endorsement seed.",
            Form(Annotated[int, Meta(ge=0, le=_LAST_PERSISTENT)], _attestation_handle),
            example="0x81010002",
        ),
    ] = None


class CsrOverrides(Struct):
    """``[csr.CERTIFICATE_TYPE]``: overrides of a `CertificateProfile` for an operator's CA.

    Unset fields stay as in the profile; this class has no instances.
    """

    domain_component: Annotated[
        str | None,
        Option(
            "DC of the subject; empty for none.",
            Form(
                Annotated[
                    str,
                    Meta(
                        max_length=64, pattern=r"^[\x20-\x7e]*\Z", extra={FORM: "ASCII text of at most 64 characters"}
                    ),
                ],
                lambda text: text or None,
            ),
            example='"CPO"',
        ),
    ]
    key_usage: Annotated[
        tuple[KeyUsage, ...],
        Option(
            "keyUsage; must contain digitalSignature.",
            Form(tuple[KeyUsage, ...], _key_usage),
            example='["digitalSignature"]',
        ),
    ]
    extended_key_usage: Annotated[
        tuple[ExtendedKeyUsage, ...], Option("extendedKeyUsage; empty for none.", example='["serverAuth"]')
    ]
    extended_key_usage_critical: Annotated[bool, Option("Whether extendedKeyUsage is critical.")]
    evse_id_placement: Annotated[EvseIdPlacement, Option("Place of the EVSE ID in the CSR.", place="evse_id")]


class Settings(Struct, frozen=True, kw_only=True):
    """The daemon's settings: the options at the top of the file, and its tables.

    Attributes:
        profiles: the profile of each certificate type, with the overrides of ``[csr]``.
    """

    broker: Annotated[
        str, Option("MQTT broker, mqtt://HOST:PORT, or mqtts://HOST:PORT for TLS.", _TEXT, metavar="URL")
    ] = "mqtt://127.0.0.1:1883"
    keystore: Annotated[
        str,
        Option(
            f"Key store: tpm2:TCTI, such as tpm2:device:{DEFAULT_DEVICE} or tpm2:swtpm:host=127.0.0.1,port=2321; or "
            "software:.",
            _TEXT,
            metavar="URI",
            default=f"tpm2:device:{DEFAULT_DEVICE}, if there is one",
            example='"tpm2:device:/dev/tpmrm0"',
        ),
    ]
    keystores: Annotated[
        Mapping[str, str],
        Option("Further key stores, by name.", Form(_Stores, lambda stores: stores or UNSET)),
    ] = {}
    keystore_for: KeyStoreChoice = KeyStoreChoice()
    allow_software_keys: Annotated[bool, Option("Allow the key store software:, whose keys are not protected.")] = False
    state_dir: Annotated[Path, Option("State directory, which contains the ledger.", _PATH, metavar="DIR")] = Path(
        "/var/lib/stationkey"
    )
    ledger: LedgerUri = ""
    ledger_password: LedgerPassword = None
    topic_prefix: Annotated[
        str, Option("Prefix of all topics; a missing / at its end is added.", metavar="PREFIX", example='"site1"')
    ] = ""
    client_id: Annotated[
        str | None,
        Option(
            "MQTT client identifier; empty for a generated one, kept in the state directory.",
            Form(Annotated[str, Meta(max_length=64)], lambda text: text or UNSET),
            example='"stationkey-1"',
        ),
    ] = None
    log_format: Annotated[LogFormat, Option("Format of the log on standard error.")] = "text"
    site: SiteTerms = SiteTerms()
    deadlines: Deadlines = Deadlines()
    lifecycle: Terms = Terms()
    pool: PoolTerms = PoolTerms()
    renewal: RenewalTerms = RenewalTerms()
    certificate_dir: Annotated[
        Path | None,
        Option(
            "Directory in which Josev installs certificates; in a site, with {station} in it.",
            _PATH,
            "josev.certificate_dir",
            example='"/var/lib/josev/certificates"',
        ),
    ] = None
    mqtt: MqttTerms = MqttTerms()
    policy: PolicyTerms = PolicyTerms()
    tpm: TpmTerms = TpmTerms()
    metrics: Annotated[
        str | None,
        Option(
            "Address of status page, metrics and health: 127.0.0.1:PORT, [::1]:PORT or unix:PATH.",
            _TEXT,
            "metrics.listen",
            example='"127.0.0.1:9464"',
        ),
    ] = None
    profiles: Mapping[CertificateType, CertificateProfile] = PROFILES

    @property
    def stores(self) -> tuple[NamedStore, ...]:
        """The key stores, that of ``keystore`` first."""
        uris = {DEFAULT_STORE: self.keystore} if self.keystore else {}
        return tuple(NamedStore(name, uri, self._types_of(name)) for name, uri in {**uris, **self.keystores}.items())

    def bounds_of(self, certificate_type: str) -> Bounds:
        """Return the limits of the key store of a certificate type."""
        store = self._store_of(certificate_type)
        return self.lifecycle.bounds.within(store, self._types_of(store))

    def _store_of(self, certificate_type: str) -> str:
        chosen = {str(kind): getattr(self.keystore_for, kind) for kind in CertificateType}
        return chosen.get(certificate_type) or DEFAULT_STORE

    def _types_of(self, store: str) -> frozenset[CertificateType]:
        return frozenset(kind for kind in CertificateType if self._store_of(kind) == store)

    def keystore_terms(self, uri: str) -> object:
        """Return the options of a key store: the table with its scheme.

        If no key store is a TPM, a store without options gets those of a TPM, so that it can refuse them.
        """
        values = [getattr(self, name) for name in self.__struct_fields__]
        tables = {getattr(table, "SCHEME", None): table for table in values}
        schemes = {store.uri.partition(":")[0] for store in self.stores}
        return tables.get(uri.partition(":")[0], None if self.tpm.SCHEME in schemes else self.tpm)
