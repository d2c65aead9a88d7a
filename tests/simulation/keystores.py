"""A TPM that fails in every way that a TPM can, and the key store that the daemon has in it.

The private blob of a key is random bytes: found in a block of the disk, they are that key's secret.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any, Final, NoReturn

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from simulation.scheduler import NEVER, Scheduler
from stationkey.contract.profiles import SECP256R1, SECP521R1, Algorithm, EllipticCurve
from stationkey.errors import KeyStoreError, Scope, UnsupportedAlgorithm
from stationkey.keystore.protocol import KeyRef, Support
from stationkey.keystore.tpm2 import return_codes
from stationkey.keystore.tpm2.errors import of_code
from stationkey.x509.csr import PrivateKey, PublicKey

SECRET: Final = 96
"""Bytes of a private blob."""
_CURVES: Final[dict[EllipticCurve, ec.EllipticCurve]] = {SECP256R1: ec.SECP256R1(), SECP521R1: ec.SECP521R1()}
_MADE: Final = {Algorithm.ECDSA_SHA256: SECP256R1, Algorithm.ECDSA_SHA512: SECP521R1}
CODES: Final = tuple(
    sorted(
        value
        for name, value in vars(return_codes).items()
        if name.isupper() and isinstance(value, int) and name not in {"LAYER", "INTEGRITY"}
    )
)
"""Every return code that the real key store knows; that of a key of another TPM comes where it is true."""


@cache
def _scalar(number: int, kind: EllipticCurve) -> ec.EllipticCurvePrivateKey:
    """The private key of a number: the same in each run, and computed once in a process."""
    return ec.derive_private_key(0x10001 + number * 0x9E3779B97F4A7C15, _CURVES[kind])


class _Signing(ec.EllipticCurvePrivateKey):
    """A loaded key. Signs without randomness, so that each run has the same bytes."""

    def __init__(self, tpm: Tpm, key: ec.EllipticCurvePrivateKey) -> None:
        self._tpm, self._key = tpm, key

    def sign(self, data: Any, signature_algorithm: Any) -> bytes:
        self._tpm.command()
        return self._key.sign(data, ec.ECDSA(signature_algorithm.algorithm, deterministic_signing=True))

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._key.public_key()

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._key.curve

    @property
    def key_size(self) -> int:
        return self._key.key_size

    def exchange(self, algorithm: Any, peer_public_key: Any) -> NoReturn:
        raise NotImplementedError

    def private_numbers(self) -> NoReturn:
        raise NotImplementedError

    def private_bytes(self, encoding: Any, format: Any, encryption_algorithm: Any) -> NoReturn:  # noqa: A002
        raise NotImplementedError

    def __copy__(self) -> _Signing:
        return self

    def __deepcopy__(self, memo: object) -> _Signing:
        return self


@dataclass(slots=True)
class Tpm:
    """The device; it outlives the daemon.

    Attributes:
        trouble: what each command meets: nothing, a return code, or that nobody answers.
        hangs: whether a command does not return until `wake`.
        keys: by private blob, the number and kind of each key that it can load.
        secrets: the private blob of each key that it has ever made, by the name of the key.
    """

    rng: random.Random
    scheduler: Scheduler | None = None
    trouble: int | str = 0
    hangs: bool = False
    keys: dict[bytes, tuple[int, EllipticCurve]] = field(default_factory=dict)
    secrets: dict[str, bytes] = field(default_factory=dict)
    made: int = 0
    slow: float = 0.0
    waiting: list[Any] = field(default_factory=list)

    def command(self) -> None:
        """Meet what a command meets now.

        Raises:
            KeyStoreError: it was not done.
        """
        scheduler = self.scheduler
        assert scheduler is not None
        if self.slow:
            scheduler.pause(int(self.slow * self.rng.random() * 1e9))
        while self.hangs and not scheduler.ended:
            self.waiting.append(scheduler.running)
            scheduler.pause(NEVER)
        if self.trouble == "gone":
            raise KeyStoreError("the TPM does not answer", reason="tpm_unreachable", transient=True, scope=Scope.DEVICE)
        if isinstance(self.trouble, int) and self.trouble:
            raise of_code(SimpleNamespace(rc=self.trouble))

    def wake(self) -> None:
        """Let what hangs go on."""
        self.hangs = False
        for worker in self.waiting:
            if worker is not None:
                worker.wakes = 0
        self.waiting.clear()

    def clear(self) -> None:
        """TPM2_Clear: no key that was made before can be loaded any more."""
        self.keys.clear()

    def lose(self) -> None:
        """Lose one key: its blob is damaged."""
        if self.keys:
            del self.keys[self.rng.choice(sorted(self.keys))]

    def generate(self, kind: EllipticCurve) -> KeyRef:
        self.command()
        self.made += 1
        secret = self.rng.randbytes(SECRET)
        self.keys[secret] = (self.made, kind)
        public = _scalar(self.made, kind).public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )  # fmt: skip
        key = KeyRef(scheme="tpm2", key_type=kind, public=public, private=secret)
        self.secrets[key.key_id] = secret
        return key

    def load(self, key: KeyRef) -> ec.EllipticCurvePrivateKey:
        self.command()
        if key.private not in self.keys:
            raise of_code(SimpleNamespace(rc=return_codes.INTEGRITY))
        return _scalar(*self.keys[key.private])


class SimulatedStore:
    """The key store in a `Tpm`."""

    uri = "tpm2:simulated"
    identity = "tpm2:simulated"
    description = "simulated TPM"

    def __init__(self, tpm: Tpm) -> None:
        self._tpm = tpm
        tpm.command()

    def supports(self, algorithm: Algorithm) -> Support:
        self._tpm.command()
        kind = _MADE.get(algorithm)
        return Support(kind, "" if kind else "RSA keys")

    def generate(self, algorithm: Algorithm) -> KeyRef:
        kind = _MADE.get(algorithm)
        if kind is None:
            raise UnsupportedAlgorithm("this TPM makes no RSA keys", reason="algorithm_unsupported")
        return self._tpm.generate(kind)

    @contextmanager
    def signer(self, key: KeyRef) -> Iterator[PrivateKey]:
        yield _Signing(self._tpm, self._tpm.load(key))

    def public_key(self, key: KeyRef) -> PublicKey:
        loaded = serialization.load_der_public_key(key.public)
        assert isinstance(loaded, ec.EllipticCurvePublicKey)
        return loaded

    def destroy(self, key: KeyRef) -> None:
        """The ledger has the only copy."""

    def unload(self) -> None:
        pass

    def close(self) -> None:
        pass
