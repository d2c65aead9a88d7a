"""H, the composite floor: what the promise of a request costs, with the same libraries, in one loop.

A request comes at QoS 1; key and signature by TPM commands as bytes; cryptography's builder; the CSR is verified; one
durable commit to SQLite; the answer goes at QoS 1, and then the request is acknowledged. No thread, deadline, policy,
limit, record of events, log or recovery: what stationkey takes beyond it is its own work.
"""

from __future__ import annotations

import json
import select
import socket
import sqlite3
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

import paho.mqtt.client as paho
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import NameOID
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from stationkey.contract.profiles import SECP256R1, SECP521R1, KeyType, RsaModulus
from stationkey.keystore.tpm2 import templates
from stationkey.keystore.tpm2.commands import Commands
from stationkey.keystore.tpm2.signing import EccPrivateKey, RsaPrivateKey, public_key, signing_scheme
from stationkey.keystore.tpm2.tcti import Tcti

SRK: Final = 0x81000001
KINDS: Final[dict[str, tuple[KeyType, Any, Any]]] = {
    "ECDSA_SHA256": (SECP256R1, hashes.SHA256(), EccPrivateKey),
    "ECDSA_SHA512": (SECP521R1, hashes.SHA512(), EccPrivateKey),
    "RSA_SHA256": (RsaModulus(3072), hashes.SHA256(), RsaPrivateKey),
}
"""Key type, hash and private-key class of an algorithm."""
ROW: Final = "INSERT INTO answer VALUES (?, ?, ?, ?)"


class Loop:
    """Serves requests until it is killed or the connection ends.

    Args:
        port: of the broker.
        prefix: of the topics.
        tcti: where the TPM is; it has a storage root key.
        database: a file to be made.
        ahead: whether the key of an answer was made before it was asked for: then it is loaded.
    """

    def __init__(self, port: int, prefix: str, tcti: str, database: Path, *, ahead: bool) -> None:
        self._prefix = prefix
        self._commands = Commands(Tcti(tcti))
        self._sql = sql = sqlite3.connect(database, isolation_level=None)
        sql.execute("PRAGMA journal_mode=WAL")
        sql.execute("PRAGMA synchronous=FULL")
        sql.execute("CREATE TABLE answer (id TEXT PRIMARY KEY, csr TEXT, public BLOB, private BLOB)")
        self._ahead: dict[str, tuple[bytes, bytes]] = {}
        self._makes_ahead = ahead
        self._unanswered: dict[int, int] = {}
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5, manual_ack=True
        )
        client.on_message = lambda _client, _userdata, message: self._answer(message)
        client.on_publish = self._published
        client.on_subscribe = lambda *_: print("ready", flush=True)  # noqa: T201 - `peers.Daemon` waits for it
        client.connect("127.0.0.1", port, keepalive=3600)
        connection = client.socket()
        assert isinstance(connection, socket.socket)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = connection

    def run(self) -> None:
        """Serve requests."""
        while not self._client.is_connected():
            self._client.loop(0.1)
        self._client.subscribe(f"{self._prefix}/josev/cs", qos=1)
        while True:
            writing = [self._socket] if self._client.want_write() else []
            readable, writable, _ = select.select([self._socket], writing, [])
            if writable:
                self._client.loop_write()
            if readable and self._client.loop_read() != paho.MQTT_ERR_SUCCESS:
                return

    def _published(self, _client: Any, _userdata: Any, mid: int, *_: Any) -> None:
        self._client.ack(self._unanswered.pop(mid), 1)

    def _key(self, kind: KeyType, algorithm: str) -> tuple[int, bytes, bytes]:
        if algorithm in self._ahead:
            private, public = self._ahead[algorithm]
            return self._commands.load(SRK, private, public, b""), private, public
        handle, private, public = self._commands.create_loaded(SRK, templates.sensitive(), templates.key(kind), b"")
        if self._makes_ahead:
            self._ahead[algorithm] = private, public
        return handle, private, public

    def _answer(self, message: paho.MQTTMessage) -> None:
        request = json.loads(message.payload)
        data = request["data"]
        kind, digest, private_key = KINDS[data["algorithm"]]
        handle, private, public = self._key(kind, data["algorithm"])
        key = public_key(kind, public)
        csr = _csr(data, private_key(partial(self._sign, handle), key), digest)
        if not csr.is_signature_valid:
            raise ValueError("the CSR does not verify")
        pem = csr.public_bytes(serialization.Encoding.PEM).decode()
        der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self._sql.execute(ROW, (request["id"], pem, der, private))  # durable with the statement
        answer = {"id": request["id"], "name": "generate_csr", "type": "response"}
        payload = json.dumps(answer | {"data": {"status": "accepted", "csr": pem}})
        self._unanswered[self._client.publish(f"{self._prefix}/cs/josev", payload, qos=1).mid] = message.mid
        self._client.loop_write()
        self._commands.flush_context(handle)

    def _sign(self, handle: int, data: Any, scheme: int, algorithm: hashes.HashAlgorithm) -> bytes:
        digest = hashes.Hash(algorithm)
        digest.update(data)
        return self._commands.sign(handle, digest.finalize(), signing_scheme(scheme, algorithm.name), b"")


USAGE: Final = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=True,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
BUILDER: Final = (
    x509.CertificateSigningRequestBuilder()
    .add_extension(USAGE, critical=True)
    .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
)


def _csr(data: dict[str, str], key: Any, digest: Any) -> x509.CertificateSigningRequest:
    names = (
        (NameOID.COUNTRY_NAME, data["country_name"]),
        (NameOID.ORGANIZATION_NAME, data["organization_name"]),
        (NameOID.COMMON_NAME, data["common_name"]),
    )
    return BUILDER.subject_name(x509.Name([x509.NameAttribute(*name) for name in names])).sign(key, digest)


if __name__ == "__main__":
    port, prefix, tcti, database, ahead = sys.argv[1:]
    Loop(int(port), prefix, tcti, Path(database), ahead=ahead == "ahead").run()
