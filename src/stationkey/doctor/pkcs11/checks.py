"""PKCS#11 tokens: the module, the token, its PIN, and what it has and can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from stationkey.config.settings import DEFAULT_STORE, NamedStore, Settings
from stationkey.contract.profiles import Algorithm
from stationkey.doctor.abilities import judge_types
from stationkey.doctor.host.context import Context, path_of
from stationkey.doctor.probes import Answers, ask_device
from stationkey.doctor.report import Finding, failure, listed, ok, refusal, unknown, warning
from stationkey.doctor.runner import AnyCheck, Check
from stationkey.doctor.state.checks import contents_soon
from stationkey.errors import StationKeyError
from stationkey.keystore.pkcs11.inventory import DIRECTORY_NAME
from stationkey.keystore.pkcs11.uri import TokenUri

At = tuple[Context, NamedStore | None]
_PATIENCE: Final = 5.0
"""Seconds for all questions to a token together."""
PATIENCE_WITH_KEYS: Final = 60.0
"""The same with keys to be tried: a secure element may take seconds for one."""
_SIMULATED: Final = "Soft"
"""How the models of SoftHSM and of opencryptoki's soft token begin."""
_UNSAFE: Final = "pkcs11_module_unsafe"
_NOT_SAID: Final = {0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}
"""CK_UNAVAILABLE_INFORMATION, by the width of CK_ULONG."""
_LITTLE: Final = 4096
"""Octets: a key pair takes some hundreds."""

# CKF_ of a token [PKCS #11 3.2].
_LOGIN_REQUIRED: Final = 1 << 2
_PIN_INITIALIZED: Final = 1 << 3
_PIN_COUNT_LOW: Final = 1 << 16
_PIN_FINAL_TRY: Final = 1 << 17
_PIN_LOCKED: Final = 1 << 18
_PIN_TO_BE_CHANGED: Final = 1 << 19


def _uri_of(keystore: str) -> TokenUri:
    return TokenUri.parse(keystore.partition(":")[2])


def _ask(context: Context, store: NamedStore) -> Answers:
    """Ask the token in a process of its own, `stationkey.doctor.pkcs11.probe`."""
    user, pin = context.daemon.user, _uri_of(store.uri).pin
    path = None if pin is None or pin.file is None else path_of(pin.file)
    asked = {
        "uri": store.uri,
        "directory": str(context.settings.state_dir / DIRECTORY_NAME),
        "user": [user.uid, user.gid, *user.groups] if context.me.uid == 0 else None,
        "pin_file": None if path is None else str(path),
        "algorithms": [str(one) for one in context.settings.policy.algorithms],
        "try_keys": context.options.try_keys,
    }
    patience = PATIENCE_WITH_KEYS if context.options.try_keys else _PATIENCE
    return ask_device("stationkey.doctor.pkcs11.probe", asked, seconds=patience)


def _error(answers: Answers, part: str) -> StationKeyError | None:
    """Return why a part is not there, as the daemon's own rules say it."""
    error = answers.errors.get(part)
    return None if error is None else StationKeyError(error["message"], reason=error["reason"], hint=error["hint"])


def _look_at_module(at: At) -> tuple[str, Answers] | Finding:
    context, store = at
    if store is None:
        return ok("no key store is a PKCS#11 token", stops=True)
    return store.uri, context.once(_ask, store)


def _judge_module(uri: str, answers: Answers) -> Finding:
    module = _uri_of(uri).module
    errors = [error for part in ("module", "token") if (error := _error(answers, part)) is not None]
    if errors and errors[0].reason == _UNSAFE:
        return refusal(errors[0])
    if errors or "end" in answers.values:
        return ok(f"the module {module} answers, and only root can replace it")
    if answers.hung:
        advice = "reset the token; does another program, such as the daemon, have it to itself?"
        return failure("hung", f"the module {module} hangs in a call", advice)
    told = f"the module {module} ended the program that asked it: {answers.said or 'it crashed'}"
    return failure("crashed", told, "is it of this machine's architecture, and its configuration right?")


class _Told:
    """A look at what the token told, by part; with the key store and the settings before it."""

    def __init__(self, *parts: str) -> None:
        self._parts = parts

    def __call__(self, at: At) -> tuple[Any, ...] | Finding:
        """Ask the token, once for all checks."""
        context, store = at
        assert store is not None
        answers = context.once(_ask, store)
        for part in self._parts:
            if (error := _error(answers, part)) is not None:
                return refusal(error)
            if part not in answers.values:
                return unknown("the token did not tell")
        return (store, context.settings, *(answers.values[part] for part in self._parts))


def _judge_token(_: NamedStore, __: Settings, names: dict[str, str]) -> Finding:
    what = f"{names['token']}, {names['manufacturer']} {names['model']}, serial number {names['serial']}"
    if names["model"].startswith(_SIMULATED):
        told = f"the token {what} is a program: anyone who can read its files can try to get at its keys"
        return warning("simulated", told, "for trying only; on a station, use a secure element or an HSM")
    return ok(f"exactly one token fits: {what}")


def _judge_pin(store: NamedStore, _: Settings, flags: int, refused: bool | None) -> Finding:
    """Judge the PIN by the token's flags, and by what the daemon remembers. It is not tried."""
    if not flags & _LOGIN_REQUIRED:
        return ok("the token wants no PIN")
    if not flags & _PIN_INITIALIZED:
        return failure("not_set", "the token has no user PIN", "set one: pkcs11-tool --init-pin")
    if flags & _PIN_LOCKED:
        advice = "unlock it with the security officer's PIN: pkcs11-tool --init-pin"
        return failure("locked", "the token's PIN is locked", advice)
    if _uri_of(store.uri).pin is None:
        return failure("not_named", "the token wants a PIN, and the URI has no pin-source", "add pin-source=file:/PATH")
    if refused:
        told = "the token has refused this PIN before; the daemon does not try it again"
        return failure("refused", told, "put the right PIN where pin-source points to")
    if flags & _PIN_FINAL_TRY:
        told = "one more wrong PIN locks the token: the daemon tries none"
        return failure("final_try", told, "log in with the right PIN: pkcs11-tool --login --test")
    if flags & _PIN_COUNT_LOW:
        return warning("count_low", "a wrong PIN was given since the last login", "who gave it? A login ends this")
    if flags & _PIN_TO_BE_CHANGED:
        return warning("to_be_changed", "the token wants its PIN changed", "pkcs11-tool --login --change-pin")
    return ok("the token is not locked; its PIN was not tried" + ("" if refused is None else ", nor refused before"))


def _judge_types(store: NamedStore, settings: Settings, missing: dict[Algorithm, str]) -> Iterator[Finding]:
    way_out = f"use another token, or another key store by [keystore_for] (see {_DOCUMENT})"
    yield from judge_types(store.types, settings.policy, missing, way_out)


def _judge_room(_: NamedStore, __: Settings, objects: int, memory: list[int]) -> Finding:
    """Judge the room for keys: free octets of public and of private memory, where the token says so."""
    told = f"{objects} objects are seen without a login"
    free = [
        octets for total, octets in zip(memory[::2], memory[1::2], strict=True) if {total, octets}.isdisjoint(_NOT_SAID)
    ]
    if not free or not any(memory[::2]):
        return ok(f"{told}; the token does not tell its room")
    told = f"{min(free)} octets are free in the token, {told}"
    advice = "lower [lifecycle] pending_total and the pool, in a site pending_in, or remove what others keep in it"
    if min(free) < _LITTLE:
        return warning("little", told, advice)
    return ok(told)


def _look_at_ours(at: At) -> tuple[Any, ...] | Finding:
    context, told = at[0], _Told("ours", "recorded")(at)
    contents = contents_soon(context)
    if isinstance(told, Finding) or contents is None:
        return told if isinstance(told, Finding) else unknown("the ledger cannot be read")
    return (*told, {identifier.hex() for identifier in contents.in_tokens}, context.daemon.running)


def _judge_ours(
    store: NamedStore, _: Settings, ours: list[str], recorded: list[str], kept: set[str], running: bool
) -> Iterator[Finding]:
    """Judge what has our label: CKA_IDs in the token, on record beside the ledger, and in the ledger."""
    strays = [name for name in dict.fromkeys(ours) if name in recorded and name not in kept]
    foreign = [name for name in dict.fromkeys(ours) if name not in recorded and name not in kept]
    if strays and not running:
        told = f"{len(strays)} keys are in the token and not in the ledger: a crash left them"
        yield warning("strays", told, "start the daemon: it destroys them")
    if foreign:
        told = f"{len(foreign)} keys with our label are not on record, and are never touched: {listed(foreign, most=3)}"
        shown = f"pkcs11-tool --module {_uri_of(store.uri).module} --list-objects"
        yield warning("not_recorded", told, f"another station's, or of a lost state directory? {shown}")
    if not foreign and (running or not strays):
        yield ok(f"{len(kept & set(ours))} keys of ours are in the token, all of them in the ledger")


def _look_at_trial(at: At) -> tuple[Any, ...] | Finding:
    if not at[0].options.try_keys:
        return unknown("with --try-keys, a key for each algorithm is made, signs and is destroyed")
    return _Told("supported", "tried")(at)


def _judge_trial(_: NamedStore, __: Settings, promised: dict[str, str], tried: dict[str, str]) -> Iterator[Finding]:
    """Judge whether the token does what its list of mechanisms promises."""
    for algorithm in [one for one, missing in promised.items() if not missing]:
        if tried[algorithm]:
            told = f"the token promises {algorithm}, and does not do it: {tried[algorithm]}"
            yield failure(
                "broken", told, "use another token for it, by [keystore_for]; is there an update for this one?"
            )
        else:
            yield ok(f"{algorithm}: a key was made, has signed and was destroyed")


_DOCUMENT: Final = "/usr/share/doc/stationkey/docs/pkcs11.md"
_TOKEN: Final = ("token.found",)
CHECKS: Final = (
    Check("token.module", _look_at_module, _judge_module, ("tpm.keystore",)),
    Check("token.found", _Told("token"), _judge_token, ("token.module",)),
    Check("token.pin", _Told("flags", "pin"), _judge_pin, _TOKEN),
    Check("token.certificate_types", _Told("supported"), _judge_types, _TOKEN),
    Check("token.room", _Told("objects", "memory"), _judge_room, _TOKEN),
    Check("token.strays", _look_at_ours, _judge_ours, _TOKEN),
    Check("token.trial", _look_at_trial, _judge_trial, ("token.pin",)),
)
"""Each looks at a pair: the context, and one of the key stores."""


def checks_of(context: Context) -> Iterator[AnyCheck]:
    """Yield the checks of each token."""
    stores: list[NamedStore | None] = [*context.stores("pkcs11")]
    for store in stores or [None]:
        about = "" if store is None or store.name == DEFAULT_STORE else store.place
        yield from (replace(check, look=_bound(check.look, store), about=about) for check in CHECKS)


def _bound(look: Callable[[At], Any], store: NamedStore | None) -> Callable[[Context], Any]:
    return lambda context: look((context, store))
