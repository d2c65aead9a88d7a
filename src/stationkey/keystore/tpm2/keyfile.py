"""The file format of keys in a TPM, ``TSS2 PRIVATE KEY`` [ASN.1 Specification for TPM 2.0 Key Files, Bottomley].

tpm2-pytss's class for it knows no policy. Without a policy, the bytes here are the same.
"""

from __future__ import annotations

import hashlib
from typing import Final

from cryptography.x509 import ObjectIdentifier
from msgspec import Struct

from stationkey.system.pem import blocks, from_pem

LABEL: Final = "TSS2 PRIVATE KEY"
KEY: Final = ObjectIdentifier("2.23.133.10.1.3")
SEALED: Final = ObjectIdentifier("2.23.133.10.1.5")

POLICY_AUTH_VALUE: Final = 0x16B
POLICY_PCR: Final = 0x17F
"""Command codes [TPM 2.0 part 2, 6.5.2]."""

_NO_DIGEST: Final = bytes(32)
"""Where every policy begins."""


class Command(Struct, frozen=True):
    """A policy command.

    Attributes:
        code: of the command.
        policy: what it adds to the policy digest after its code; for TPM2_PolicyPCR a TPML_PCR_SELECTION, then the
            digest of the values.
    """

    code: int
    policy: bytes = b""


class KeyFile(Struct, frozen=True):
    """A key, or sealed data, as stored outside the TPM.

    Attributes:
        public: TPM2B_PUBLIC.
        private: TPM2B_PRIVATE, wrapped by the parent.
        parent: its persistent handle.
        empty_auth: whether it has no authorisation value.
        policy: the policy that must be satisfied to use it; empty for none.
        type: `KEY` or `SEALED`.
    """

    public: bytes
    private: bytes
    parent: int
    empty_auth: bool = True
    policy: tuple[Command, ...] = ()
    type: ObjectIdentifier = KEY

    def der(self) -> bytes:
        """The file's content."""
        from stationkey.keystore.tpm2 import keyfile_asn1 as asn1  # noqa: PLC0415 - not before there is a key

        commands = [asn1.Command(code=command.code, policy=command.policy) for command in self.policy]
        return asn1.encode_der(
            asn1.File(
                type=self.type,
                empty_auth=self.empty_auth,
                policy=commands or None,
                parent=self.parent,
                public=self.public,
                private=self.private,
            )
        )

    @classmethod
    def read(cls, der: bytes) -> KeyFile:
        """What `der` wrote.

        Raises:
            ValueError: it did not.
        """
        from stationkey.keystore.tpm2 import keyfile_asn1 as asn1  # noqa: PLC0415 - not before there is a key

        file = asn1.decode_der(asn1.File, der)
        if file.type not in {KEY, SEALED}:
            raise ValueError("neither a key nor sealed data")
        return cls(
            public=file.public,
            private=file.private,
            parent=file.parent,
            empty_auth=bool(file.empty_auth),
            policy=tuple(Command(command.code, command.policy) for command in file.policy or ()),
            type=file.type,
        )


def read_pem(text: bytes) -> KeyFile | None:
    """Return the first key file in PEM text, or None.

    Raises:
        ValueError: there is one, and it is damaged.
    """
    if f"-----BEGIN {LABEL}-----".encode() not in text:
        return None
    found = blocks(text, LABEL)
    if not found:
        raise ValueError("the end is missing")
    return KeyFile.read(from_pem(found[0]))


def policy_digest(policy: tuple[Command, ...]) -> bytes:
    """The policy digest that the TPM comes to by these commands, with SHA-256; empty for no policy.

    Each of the two commands adds its code and its policy [TPM 2.0 part 3, 23.7 and 23.17].
    """
    digest = _NO_DIGEST
    for command in policy:
        digest = hashlib.sha256(digest + command.code.to_bytes(4, "big") + command.policy).digest()
    return digest if policy else b""
