"""``stationkey serve`` with faults of ours in it, at each place where a secret is at hand; each shows all that it has.

With a name that begins with ``sign`` the fault is in the signing, with ``record`` in the ledger, with ``status`` in the
proof of a key.
"""

from __future__ import annotations

from typing import Any

from stationkey import cli
from stationkey.ledger.answers import Answers
from stationkey.service import requests, statuses


class Fault(RuntimeError):
    """What somebody might write in a hurry."""


def faulty(prefix: str, original: Any) -> Any:
    """`original`, which fails for names that begin so."""

    def call(*arguments: Any, **others: Any) -> Any:
        if any(f"common_name='{prefix}" in repr(argument) for argument in arguments):
            raise Fault(f"{arguments!r} {others!r} {[vars(a) for a in arguments if hasattr(a, '__dict__')]!r}")
        return original(*arguments, **others)

    return call


def fail_to_prove(private_key: object, *others: object) -> None:
    """In the place of `certificate.prove`."""
    raise Fault(f"{private_key!r} {private_key} {others!r}")


setattr(requests, "sign_csr", faulty("sign", getattr(requests, "sign_csr")))  # noqa: B009, B010 - it is imported there
setattr(statuses, "prove", fail_to_prove)  # noqa: B010 - same
setattr(Answers, "record", faulty("record", Answers.record))  # noqa: B010 - same

if __name__ == "__main__":
    cli.main(prog_name="stationkey")
