"""Each reason has one declaration of what control flow asks: whether it is transient, and how much it concerns."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest

import stationkey
from stationkey import errors
from stationkey.errors import KeyStoreError, LedgerError, Scope, StationKeyError
from stationkey.keystore.tpm2.errors import of_code
from stationkey.openssl.failures import EXIT_DEVICE, TlsCheckFailed

SOURCE: Final = Path(stationkey.__file__).parent
REASONS: Final = re.findall(
    r"^\| `(\w+)` \|", (Path(__file__).parent.parent / "docs/reasons.md").read_text(), re.MULTILINE
)

DEFAULT: Final = (False, Scope.REQUEST)
NATURES: Final[dict[str, tuple[bool, Scope]]] = {
    # The key store's device.
    **dict.fromkeys(["tpm_unreachable", "keystore_timeout"], (True, Scope.DEVICE)),
    **dict.fromkeys(["pkcs11_failed", "pkcs11_token_missing"], (True, Scope.DEVICE)),
    **dict.fromkeys(["pkcs11_token_full", "pkcs11_session_lost"], (True, Scope.STORE)),
    **dict.fromkeys(
        ["pkcs11_pin_wrong", "pkcs11_pin_locked", "pkcs11_token_ambiguous", "pkcs11_key_unprotected"],
        (False, Scope.STORE),
    ),
    "tcti_invalid": (False, Scope.DEVICE),
    **dict.fromkeys(["tpm_reset", "tpm_lockout", "tpm_full", "tpm_busy"], (True, Scope.STORE)),
    **dict.fromkeys(
        ["tpm_auth", "srk_unfit", "srk_changed", "auth_value_unfit", "pcr_bank_inactive"], (False, Scope.STORE)
    ),
    "tpm_altered": (True, Scope.REQUEST),
    # A key.
    "key_given_up": (True, Scope.KEY),
    **dict.fromkeys(
        [
            *(
                "key_of_another_tpm",
                "key_of_another_token",
                "pkcs11_refused",
                "key_of_another_store",
                "keystore_unconfigured",
                "key_damaged",
                "key_type_wrong",
                "tpm_error",
            ),
            *("key_auth_wrong", "key_protection_differs", "parent_missing", "pcr_changed"),
            *("key_taken", "key_not_found", "csr_not_found", "key_destroyed", "illegal_transition"),
        ],
        (False, Scope.KEY),
    ),
    "keystore_differs": (False, Scope.STORE),
    # The ledger.
    **dict.fromkeys(["disk_full", "ledger_read_only", "ledger_busy", "ledger_moved"], (True, Scope.STORE)),
    **dict.fromkeys(
        ["ledger_unreachable", "ledger_crowded", "ledger_in_use", "shard_lost", "commit_unknown"], (True, Scope.STORE)
    ),
    **dict.fromkeys(
        ["ledger_login_refused", "ledger_untrusted", "ledger_unsupported", "ledger_not_durable"], (False, Scope.STORE)
    ),
    **dict.fromkeys(
        [
            *("ledger_unusable", "ledger_missing", "ledger_damaged", "ledger_newer", "ledger_older", "ledger_error"),
            *("active_unwritable", "state_file_foreign", "state_dir_in_use"),
        ],
        (False, Scope.STORE),
    ),
    # A request that may be served later, and the broker, which is tried for ever.
    **dict.fromkeys(
        ["rate_limited", "rsa_places_taken", "station_places_taken", "statuses_crowded"], (True, Scope.REQUEST)
    ),
    **dict.fromkeys(
        [
            *("broker_unreachable", "broker_refuses", "broker_untrusted", "broker_tls_failed"),
            *(
                "connection_lost",
                "subscription_refused",
                "lease_unconfirmed",
                "publication_quota",
                "broker_violates_protocol",
            ),
        ],
        (True, Scope.REQUEST),
    ),
}
"""Transient and scope of each reason of docs/reasons.md that has not the `DEFAULT`."""
TWO_NATURES: Final = {"tls_tpm_failed", "tpm_file_damaged", "tpm_file_unusable", "secret_unreadable"}
"""Of the first, the broker is tried again; of a check, its exit status says whether the TPM or the key is at fault. The
files are needed by every request, or by a key that was made before; the secret by the key store, or by a command."""


def classes() -> dict[str, type[StationKeyError]]:
    """Every class of errors, by its name."""
    for module in pkgutil.walk_packages([str(SOURCE)], "stationkey."):
        if not module.name.endswith("__main__"):
            import_module(module.name)
    found, beginning = {"StationKeyError": StationKeyError}, [StationKeyError]
    while beginning:
        below = beginning.pop().__subclasses__()
        found |= {each.__name__: each for each in below}
        beginning += below
    return found


def declared() -> Iterator[tuple[str, tuple[bool, Scope]]]:
    """Each place of the source that names a reason: the reason, and what an error has that is made there."""
    known = classes()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(func=function, keywords=keywords):
                    name = getattr(function, "id", getattr(function, "attr", ""))
                    fields = {keyword.arg: keyword.value for keyword in keywords}
                    match fields.get("reason"):
                        case ast.Constant(value=str(reason)) if name in known or {"transient", "scope"} & set(fields):
                            base = known.get(name, StationKeyError)
                        case _:
                            continue
                    transient, scope = base.transient, base.scope
                    match fields.get("transient"):
                        case ast.Constant(value=bool(given)):
                            transient = given
                    match fields.get("scope"):
                        case ast.Attribute(value=ast.Name(id="Scope"), attr=attribute):
                            scope = Scope[attribute]
                    yield reason, (transient, scope)


@cache
def natures() -> Mapping[str, set[tuple[bool, Scope]]]:
    """What each reason has, by its places. Not at the import of this module: each worker does that."""
    found: defaultdict[str, set[tuple[bool, Scope]]] = defaultdict(set)
    for reason, nature in declared():
        found[reason].add(nature)
    return found


@pytest.mark.parametrize("reason", REASONS)
def test_each_reason_is_declared_with_one_nature(reason: str) -> None:
    found = natures().get(reason, set())
    if reason not in TWO_NATURES:
        assert found <= {NATURES.get(reason, DEFAULT)}


def test_each_nature_is_of_a_reason_on_the_list() -> None:
    assert set(NATURES) <= set(REASONS)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        *[(0x921, "tpm_lockout"), (0x902, "tpm_full"), (0x903, "tpm_full"), (0x905, "tpm_full"), (0x906, "tpm_full")],
        *[(code, "tpm_busy") for code in (0x901, 0x904, 0x908, 0x909, 0x90A, 0x920, 0x922, 0x923)],
        *[(0x100, "tpm_reset"), (0x910, "tpm_reset"), (0x918, "tpm_reset")],
        *[(0x1DF, "key_of_another_tpm"), (0x12F, "tpm_error")],
    ],
)
def test_a_return_code_of_the_tpm_has_the_nature_of_its_reason(code: int, reason: str) -> None:
    error = of_code(SimpleNamespace(rc=code))
    assert (error.reason, (error.transient, error.scope)) == (reason, NATURES[reason])


def test_a_class_gives_what_the_place_does_not() -> None:
    plain = LedgerError("no", reason="ledger_error")
    given = LedgerError("no", reason="disk_full", transient=True, scope=Scope.KEY)
    assert (plain.transient, plain.scope) == (False, Scope.STORE)
    assert (given.transient, given.scope) == (True, Scope.KEY)
    assert (KeyStoreError("no", reason="tpm_x").transient, errors.BrokerError("no", reason="x_y").transient) == (
        False,
        True,
    )


@pytest.mark.parametrize("exit_code", [EXIT_DEVICE, EXIT_DEVICE + 1])
def test_of_a_check_of_tls_the_exit_status_says_it(exit_code: int) -> None:
    failed = TlsCheckFailed("no", reason="tls_tpm_failed", exit_code=exit_code)
    assert failed.transient == (exit_code == EXIT_DEVICE)
    assert (failed.scope is Scope.DEVICE) == (exit_code == EXIT_DEVICE)
