"""Policies of platform configuration registers: a key that can be used only while they have the values they had."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final

from msgspec import Struct

from stationkey.errors import KeyStoreError, Scope
from stationkey.keystore.tpm2.context import Context
from stationkey.keystore.tpm2.keyfile import POLICY_AUTH_VALUE, POLICY_PCR, Command

if TYPE_CHECKING:
    from tpm2_pytss.types import TPML_PCR_SELECTION

_BANKS: Final = {"sha1": 0x0004, "sha256": 0x000B, "sha384": 0x000C, "sha512": 0x000D}
_MAP: Final = 3  # bytes of the bit map of 24 registers [TPM 2.0 part 2, 10.6]
_SELECTION: Final = 4 + 2 + 1 + _MAP


class Registers(Struct, frozen=True):
    """Some of the registers of one bank.

    Attributes:
        bank: its hash, in lower case.
        numbers: of the registers, in their order.
    """

    bank: str
    numbers: tuple[int, ...]

    def __str__(self) -> str:
        return f"PCR {', '.join(map(str, self.numbers))} ({self.bank})"

    def marshal(self) -> bytes:
        """As a TPML_PCR_SELECTION of one bank [TPM 2.0 part 2, 10.9.7]."""
        bits = sum(1 << number for number in self.numbers)
        return b"".join(
            [(1).to_bytes(4, "big"), _BANKS[self.bank].to_bytes(2, "big"), bytes([_MAP]), bits.to_bytes(_MAP, "little")]
        )

    @classmethod
    def unmarshal(cls, data: bytes) -> Registers:
        """What `marshal` wrote.

        Raises:
            ValueError: it did not.
        """
        bank = next((name for name, number in _BANKS.items() if data[4:6] == number.to_bytes(2, "big")), "")
        bits = int.from_bytes(data[7:_SELECTION], "little")
        found = cls(bank, tuple(number for number in range(8 * _MAP) if bits >> number & 1))
        if not bank or found.marshal() != data:
            raise ValueError("no selection of registers in one bank")
        return found

    def structure(self) -> TPML_PCR_SELECTION:
        """As a command takes it."""
        from tpm2_pytss.types import TPML_PCR_SELECTION  # noqa: PLC0415 - see `stationkey.keystore.tpm2.esapi`

        return TPML_PCR_SELECTION.unmarshal(self.marshal())[0]

    def read(self, esapi: Context, *session: Any) -> list[bytes]:
        """The values now, in the order of their numbers.

        Args:
            esapi: an open context.
            session: authenticates the answer, if one is given.

        Raises:
            KeyStoreError: the bank is not active in this TPM, or lacks one of them.
            TpmError: the TPM failed.
        """
        values: list[bytes] = []
        while len(values) < len(self.numbers):
            rest = Registers(self.bank, self.numbers[len(values) :])
            _, told, digests = esapi.pcr_read(rest.structure(), *session)  # the TPM gives eight at a time, or fewer
            page = [bytes(digest) for digest in digests]
            if not page or told.marshal() != Registers(self.bank, rest.numbers[: len(page)]).marshal():
                raise KeyStoreError(
                    f"this TPM has no {rest}: the bank is not active, or lacks one of them",
                    reason="pcr_bank_inactive",
                    hint="tpm2_getcap pcrs lists the active banks; [tpm] pcr_bank names the one to use",
                    scope=Scope.STORE,
                )
            values += page
        return values


class PcrPolicy(Struct, frozen=True):
    """Values of registers that the use of a key is bound to.

    Attributes:
        registers: which.
        digest: SHA-256 over their values.
    """

    registers: Registers
    digest: bytes

    @classmethod
    def of(cls, registers: Registers, values: Iterable[bytes]) -> PcrPolicy:
        """Bound to these values."""
        return cls(registers, hashlib.sha256(b"".join(values)).digest())

    def commands(self, *, auth: bool) -> tuple[Command, ...]:
        """The policy: the values, and the authorisation value of the key where it has one."""
        bound = Command(POLICY_PCR, self.registers.marshal() + self.digest)
        return (bound, Command(POLICY_AUTH_VALUE)) if auth else (bound,)

    @classmethod
    def read(cls, commands: tuple[Command, ...]) -> PcrPolicy | None:
        """Return the policy of `commands`; None if there are none.

        Raises:
            ValueError: they are another policy than `PcrPolicy.commands` gives.
        """
        if not commands:
            return None
        body = commands[0].policy
        policy = cls(Registers.unmarshal(body[:_SELECTION]), body[_SELECTION:])
        if commands not in {policy.commands(auth=False), policy.commands(auth=True)}:
            raise ValueError("another policy than one of registers")
        return policy
