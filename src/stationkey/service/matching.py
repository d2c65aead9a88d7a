"""Find the key that a ``certificate_installation_status`` means.

By ``private_key_path`` if given; else by the certificate itself, if the certificate directory is configured; else the
newest. An uncertain choice raises `StatusUnfit`, with a hint how to name the key.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path

from msgspec import Struct

from stationkey.contract.active_names import ActiveName
from stationkey.contract.messages import CertificateInstallationStatus
from stationkey.errors import StationKeyError
from stationkey.keystore import KEY_ID_LENGTH
from stationkey.ledger import KeyRecord, Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState
from stationkey.service.josev_files import MAX_PATH, Look, Snapshot, Unread
from stationkey.x509.certificate import Chain, read_chain
from stationkey.x509.path import complete, root_of


class StatusUnfit(StationKeyError):
    """A status that fits no key, or several."""


class Repeated(Exception):
    """A status that is already applied.

    Args:
        words: for the log.
        key_id: the key, if known.
    """

    def __init__(self, words: str, key_id: str = "") -> None:
        super().__init__(words)
        self.key_id = key_id


class Found(Struct, frozen=True):
    """The key that a status means, and its certificate if that can be read."""

    key: KeyRecord
    chain: Chain | None = None


class KeyFinder:
    """Finds the key that a status means. Its methods run on the ledger's thread, and read no files.

    Args:
        active_path: the directory ``active/``, to be named in hints.
        roots: whether keys of several roots can be active side by side.
    """

    def __init__(self, active_path: Path, *, roots: bool) -> None:
        self._active_path = active_path
        self._roots = roots

    def installed(
        self, ledger: Ledger, status: CertificateInstallationStatus, look: Look, *, station: str = ""
    ) -> Found:
        """Return the pending key whose certificate was installed, or the deactivated key that the station went back to.

        Raises:
            Repeated: the certificate's key is active already.
            StatusUnfit: none fits, or more than one may be meant.
        """
        certificate_type, evse_id = str(status.data.certificate_type), _evse_id(status)
        named = self._named(ledger, status, look, station)
        if isinstance(named, KeyRecord):
            if named.state is KeyState.ACTIVE:
                raise _active_already()
            if named.state is KeyState.DEACTIVATED:
                return Found(_not_retired(ledger, named))
            if named.state is not KeyState.PRE_ACTIVATION:
                raise StatusUnfit(f"key {named.key_id} is {named.state}, not pending", reason="status_fits_no_key")
            pending, evse_id = [named], named.owner.evse_id
        else:
            if named is not None:
                evse_id = named.owner.evse_id
            pending = ledger.keys.pending(certificate_type, evse_id, station=station)
        # A named key is meant, whatever certificates the active one has.
        owned = [] if isinstance(named, KeyRecord) else [(certificate_type, evse_id)]
        active = [key for owner in owned for key in ledger.keys.active(*owner, station=station)]
        if look.certificates is not None:
            replaced = [key for owner in owned for key in ledger.keys.deactivated(*owner, station=station)]
            found = _by_certificate(look.certificates, pending, active, replaced, roots=self._roots)
            return found if found.key in pending else Found(_not_retired(ledger, found.key), found.chain)
        if isinstance(named, KeyRecord):
            return Found(named)
        return _newest(_one_owner(pending, evse_id), active)

    def failed(
        self, ledger: Ledger, status: CertificateInstallationStatus, look: Look, *, station: str = ""
    ) -> KeyRecord:
        """Return the pending key whose certificate could not be installed.

        Raises:
            Repeated: its failure is on record.
            StatusUnfit: none fits, or more than one may be meant.
        """
        certificate_type, evse_id = str(status.data.certificate_type), _evse_id(status)
        named = self._named(ledger, status, look, station)
        if isinstance(named, KeyRecord):
            if named.state is not KeyState.PRE_ACTIVATION:
                raise StatusUnfit(f"key {named.key_id} is {named.state}, not pending", reason="status_fits_no_key")
            pending = [named]
        else:
            if named is not None:
                evse_id = named.owner.evse_id
            pending = _one_owner(ledger.keys.pending(certificate_type, evse_id, station=station), evse_id)
        if not pending:
            raise StatusUnfit("no key of this kind is pending", reason="status_fits_no_key")
        if pending[-1].failed:
            raise Repeated("the failure was reported before", pending[-1].key_id)
        return pending[-1]

    def deleted(
        self, ledger: Ledger, status: CertificateInstallationStatus, look: Look, *, station: str = ""
    ) -> KeyRecord:
        """Return the key whose certificate was deleted.

        Without a name, an active key that replaced another is never chosen: after a renewal Josev deletes the old
        certificate, whose key may already be destroyed. Destroying the wrong key cannot be undone; keeping one too long
        can. So a key is chosen only if its certificate is certainly gone from the certificate directory.

        Raises:
            StatusUnfit: none fits, or more than one may be meant.
        """
        certificate_type, evse_id = str(status.data.certificate_type), _evse_id(status)
        named = self._named(ledger, status, look, station)
        if isinstance(named, KeyRecord):
            if named.state is KeyState.DESTROYED:
                raise StatusUnfit(f"key {named.key_id} is destroyed already", reason="status_fits_no_key")
            return named
        if named is not None:
            evse_id = named.owner.evse_id
        active = _one_owner(ledger.keys.active(certificate_type, evse_id, station=station), evse_id)
        if named is not None:
            active = [key for key in active if key.root == named.root]
        deactivated = _one_owner(ledger.keys.deactivated(certificate_type, evse_id, station=station), evse_id)
        if named is not None:
            deactivated = []  # the file under active/ is the active key's
        elif look.certificates is not None:
            active, deactivated = (_without_certificate(look.certificates, keys) for keys in (active, deactivated))
        if deactivated:
            return deactivated[-1]
        if active and (named is not None or look.certificates is not None or _only(ledger, active[-1])):
            return active[-1]
        if look.certificates is not None and look.certificates.unread:
            raise _unreadable(look.certificates, look.certificates.unread[0])
        raise StatusUnfit(
            "no key of this kind has a deleted certificate",
            reason="status_fits_no_key",
            hint="send private_key_path, or set [josev] certificate_dir, to name the key",
        )

    def _named(
        self, ledger: Ledger, status: CertificateInstallationStatus, look: Look, station: str
    ) -> KeyRecord | ActiveName | None:
        """Return the key or owner that ``private_key_path`` names; None if it is absent.

        A key is named by its id or by the file of the key before, an owner by the file of the active key.

        Raises:
            StatusUnfit: it names neither, or one of another station.
        """
        path = status.data.private_key_path
        if not isinstance(path, str):
            return None
        named = _key_named(ledger, path) or look.name
        if isinstance(named, ActiveName) and named.previous:
            owner = named.owner
            deactivated = ledger.keys.deactivated(owner.certificate_type, owner.evse_id, station=owner.station)
            named = next((key for key in deactivated if key.previous and key.root == named.root), None)
        if named is not None:
            of_kind = named.owner[:2] == (station, status.data.certificate_type)
            if of_kind and _evse_id(status) in {None, named.owner.evse_id}:
                return named
        raise StatusUnfit(
            f"private_key_path cannot be followed: {look.not_followed}"
            if look.not_followed
            else "private_key_path names no key of this kind",
            reason="status_fits_no_key",
            hint=f"it is {self._active_path}/{'station-<station>.' if station else ''}<certificate_type>[.<evse_id>]"
            "[.previous].pem, or ends in a key ID",
        )


def _key_named(ledger: Ledger, path: str) -> KeyRecord | None:
    """Return the key whose id is the file name of a path, or None."""
    stem = Path(path).stem if len(path) <= MAX_PATH else ""
    try:
        keys = ledger.keys.all(stem) if len(stem) == KEY_ID_LENGTH else []
    except ValueError:  # unpaired surrogates
        return None
    return keys[0] if len(keys) == 1 else None


class _InUse(Struct, frozen=True):
    """An active key whose certificate exists, or may exist.

    Attributes:
        key: the key.
        newest: latest start of the certificates of this key and of the keys that it replaced, Unix time in seconds.
    """

    key: KeyRecord
    newest: int


def _by_certificate(
    seen: Snapshot, pending: list[KeyRecord], active: list[KeyRecord], replaced: list[KeyRecord], *, roots: bool
) -> Found:
    """Return the pending key with the newest certificate [A02.FR.15], or the replaced key that Josev went back to.

    A key that was requested after the active one was installed has a newer certificate, whatever its times say: a CA
    may backdate. Of other keys, a certificate that begins before that of the active key of the same owner and root, or
    of a key that it replaced, is not chosen: most likely the message is a repeat.

    If the certificate of the active key is certainly gone, the station went back to the replaced key whose certificate
    exists.

    Raises:
        Repeated: only the certificates of active keys are there.
        StatusUnfit: no certificate is for a pending key, or only older ones are, or an unreadable file may be a newer
            one.
    """
    in_use = _in_use(seen, active, replaced)
    chains = [(key, seen.chains[key.public]) for key in pending if key.public in seen.chains]
    candidates, older = [], []
    for key, chain in chains:
        root = root_of(complete(chain, seen.certificates)[0]) if roots else ""
        later = [one.newest for one in in_use if _rivals(one.key, key, root) and key.asked <= one.key.installed]
        if chain.not_before >= max(later, default=chain.not_before):
            candidates.append((key, chain))
        else:
            older.append((key, chain, max(later)))
    _refuse_doubt(seen, pending)
    if candidates:
        return Found(*max(candidates, key=lambda candidate: (candidate[1].not_before, candidate[0].asked)))
    if older:
        raise _older(*max(older, key=lambda each: each[1].not_before))
    back = [key for key in replaced if key.public in seen.chains and not any(_rivals(one.key, key) for one in in_use)]
    if len(back) > 1:
        raise StatusUnfit(
            f"the certificate of the active key is gone, and those of {len(back)} replaced keys exist",
            reason="status_fits_no_key",
            hint="send private_key_path to name the key",
        )
    if back:
        return Found(back[0], seen.chains[back[0].public])
    if any(key.public in seen.chains for key in active):
        raise _active_already()
    if seen.unread:
        raise _unreadable(seen, seen.unread[0])
    raise StatusUnfit(
        f"none of {len(seen.chains)} certificates in {seen.directory} is for one of {len(pending)} pending keys",
        reason="certificate_of_another_key",
        hint="is it the directory that Josev installs to?",
    )


def _in_use(seen: Snapshot, active: list[KeyRecord], replaced: list[KeyRecord]) -> list[_InUse]:
    """Return the active keys whose certificate is not certainly gone.

    Raises:
        StatusUnfit: see `_valid_since`.
    """
    return [
        _InUse(key, max([since, *(_recorded_since(other) or since for other in replaced if _rivals(key, other))]))
        for key in active
        if (since := _valid_since(seen, key)) is not None
    ]


def _rivals(one: KeyRecord, other: KeyRecord, root: str | None = None) -> bool:
    """Return whether two keys cannot both be active: same owner, and same or unknown root.

    Args:
        one: a key.
        other: the other key.
        root: the root of the other key, if not the recorded one.
    """
    other_root = other.root if root is None else root
    return one.owner == other.owner and (one.root == other_root or "" in {one.root, other_root})


def _valid_since(seen: Snapshot, key: KeyRecord) -> int | None:
    """Return the start of an active key's certificate, Unix time in seconds; None if the certificate is gone.

    If it may exist in an unreadable file, the recorded certificate counts: no uncertainty takes a station back to an
    older certificate.

    Raises:
        StatusUnfit: it may exist, and is not on record.
    """
    if key.public in seen.chains:
        return seen.chains[key.public].not_before
    doubt = seen.doubt(key.public)
    if doubt is None:
        return None
    since = _recorded_since(key)
    if since is None:
        raise _unreadable(seen, doubt)
    return since


def _recorded_since(key: KeyRecord) -> int | None:
    chain = read_chain((key.chain or "").encode())
    return None if chain is None else chain.not_before


def _older(key: KeyRecord, chain: Chain, newest: int) -> StatusUnfit:
    own, other = (f"{datetime.fromtimestamp(begin, UTC):%Y-%m-%dT%H:%M:%SZ}" for begin in (chain.not_before, newest))
    return StatusUnfit(
        f"{chain.path}: the certificate for the pending key {key.key_id} begins at {own}, an installed one at {other}:"
        f" it may be older",
        reason="certificate_older",
        hint="if it is newer, remove the other file and have the status sent again, or name the key by"
        " private_key_path",
    )


def _without_certificate(seen: Snapshot, keys: list[KeyRecord]) -> list[KeyRecord]:
    """Return the keys whose certificate is certainly gone.

    Raises:
        StatusUnfit: the certificate of one of them may exist in an unreadable file.
    """
    _refuse_doubt(seen, keys)
    return [key for key in keys if key.public not in seen.chains]


def _refuse_doubt(seen: Snapshot, keys: list[KeyRecord]) -> None:
    """Raise `StatusUnfit` if the certificate of one of the keys may exist in an unreadable file."""
    for key in keys:
        if (doubt := seen.doubt(key.public)) is not None:
            raise _unreadable(seen, doubt)


def _unreadable(seen: Snapshot, doubt: Unread) -> StatusUnfit:
    count = len(seen.unread)
    return StatusUnfit(
        f"{count} {'file' if count == 1 else 'files'} could not be read: {doubt}"
        + (f" (and {count - 1} more)" if count > 1 else ""),
        reason="certificate_dir_unreadable",
        hint="certificate_dir must exist, be readable for this user, and contain only what Josev installs",
    )


def _not_retired(ledger: Ledger, key: KeyRecord) -> KeyRecord:
    """Return a deactivated key.

    Raises:
        StatusUnfit: the operator retired it, so only the operator can restore it.
    """
    if ledger.keys.history(key.key_id)[-1].event == KeyEvent.RETIRED:
        raise StatusUnfit(
            f"key {key.key_id} was retired by the operator",
            reason="status_fits_no_key",
            hint=f"to use it again: stationkey keys restore {key.key_id}",
        )
    return key


def _active_already() -> Repeated:
    return Repeated("the certificate's key is active already")


def _only(ledger: Ledger, key: KeyRecord) -> bool:
    """Return whether no other certificate of the key's owner can have been deleted."""
    return not ledger.keys.others_installed(key)


def _evse_id(status: CertificateInstallationStatus) -> str | None:
    return status.data.evse_id if isinstance(status.data.evse_id, str) else None


def _one_owner(keys: list[KeyRecord], evse_id: str | None) -> list[KeyRecord]:
    """Return the keys of the EVSE of a status.

    A status need not name an EVSE. Then the keys without EVSE are meant, or those of the only EVSE that has any.

    Raises:
        StatusUnfit: several EVSEs have keys, and the status names none.
    """
    if evse_id is not None:
        return keys
    unnamed = [key for key in keys if key.evse_id is None]
    if unnamed:
        return unnamed
    if len({key.evse_id for key in keys}) > 1:
        raise StatusUnfit(
            "several EVSEs have keys of this kind, and the message names none",
            reason="status_fits_no_key",
            hint="send evse_id, or set [josev] certificate_dir, to name the key",
        )
    return keys


def _newest(pending: Iterable[KeyRecord], active: list[KeyRecord]) -> Found:
    """Return the newest pending key, if it is younger than the active one.

    An older one is not chosen: most likely the message is a repeat. A late certificate for an older CSR is recognised
    only in the certificate directory, or by private_key_path.

    Raises:
        Repeated: only the active key fits.
        StatusUnfit: no key of this kind exists.
    """
    candidates = list(pending)
    if not candidates and not active:
        raise StatusUnfit("no key of this kind is pending", reason="status_fits_no_key")
    if not candidates:
        raise _active_already()
    newest = candidates[-1]
    own = [key for key in active if key.owner == newest.owner]
    if own and newest.asked < own[-1].installed:
        raise _active_already()
    return Found(newest)
