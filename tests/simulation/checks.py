"""What must be true after every step, compared with what Josev, the broker and the TPM know.

The ledger is looked at whenever it has changed and no call on it is in the middle of something. What was seen there
once was committed, so it must be there after every loss of power, too.
"""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from simulation.broker import Entry
from simulation.josev import Josev, Told, key_id_in
from simulation.keystores import Tpm
from simulation.machine import Machine
from simulation.station import BOUNDS, Setting, Station, database_of
from stationkey.contract.active_names import DIRECTORY_NAME
from stationkey.keystore.protocol import key_id_of
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent, KeyState

_LATE: Final = 180_000
"""Milliseconds after its time within which a key is destroyed, where nothing is wrong: some sweeps."""
_ROWS: Final = "SELECT key_id, state, certificate_type, evse_id, due FROM key"
_EVENTS: Final = (
    "SELECT seq, key_id, event, event.state, message_id FROM event JOIN key ON number = key_number ORDER BY seq"
)
_ANSWERS: Final = "SELECT canonical_id, key_id FROM answer JOIN key ON number = key_number"
_SECRETS: Final = "SELECT key_id, private FROM secret JOIN key ON number = key_number"
_NAMING: Final = {KeyEvent.DELETED, KeyEvent.DESTRUCTION_ORDERED}
"""What may end a key in use."""
_BY_STATUS: Final = {
    KeyEvent.INSTALLED: "installed",
    KeyEvent.RESTORED: "installed",
    KeyEvent.DELETED: "deleted",
    KeyEvent.INSTALLATION_FAILED: "failed_installation",
}


class Violation(Exception):
    """Something that must be true is not.

    Args:
        what: which of the truths, in words.
        details: of this case.
    """

    def __init__(self, what: str, details: object = "") -> None:
        super().__init__(f"{what}: {details}" if details else what)
        self.what = what


@dataclass(frozen=True, slots=True)
class _Key:
    state: str
    owner: tuple[str, str]
    due: int | None


@dataclass(slots=True)
class Seen:
    """What was on record when the ledger was last looked at."""

    keys: dict[str, _Key] = field(default_factory=dict)
    events: dict[int, tuple[str, str, str, str | None]] = field(default_factory=dict)
    answers: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, bytes] = field(default_factory=dict)
    running: int = 0
    version: object = None


class Checks:
    """The truths of one simulation.

    Attributes:
        ordered: keys that the operator ordered to be destroyed.
        ran: milliseconds that the daemon has run, by the simulation's own count.
        done: ids of messages that were acknowledged: the broker may not have heard it, and sends them again.
        disturbed: whether a write to `active/` may have failed since it was last right.
        unsynced: whether the last sync of `active/` failed: it may look right, and not be after a loss of power.
    """

    def __init__(self, machine: Machine, setting: Setting, josev: Josev, tpm: Tpm) -> None:
        self._machine = machine
        self._setting = setting
        self._josev = josev
        self._tpm = tpm
        self.seen = Seen()
        self.ordered: set[str] = set()
        self.ran = 0
        self.disturbed = False
        self.unsynced = False
        self.done: set[str] = set()
        self._csrs: dict[str, str] = {}
        self._owners: dict[str, str] = {}
        self._applied = 0
        self._shown: list[dict[str, bytes]] = [{}]
        self._history: dict[str, list[bytes | None]] = {}

    # Messages.

    def answered(self, payload: bytes) -> None:
        """An answer is with the broker."""
        answer = self._josev.heard(payload)
        request_id, csr = answer["id"].lower(), answer["data"].get("csr")
        if answer["id"] not in self._josev.asked:
            raise Violation("an answer has an id that was asked for", answer["id"])
        if csr is None:
            return
        if self._csrs.setdefault(request_id, csr) != csr:
            raise Violation("no id is answered with two CSRs", request_id)
        key_id = key_id_in(csr)
        if self._owners.setdefault(key_id, request_id) != request_id:
            raise Violation("no key is given to two requests", key_id)
        if self.seen.answers.get(request_id) != key_id:
            raise Violation("an accepted answer is on record before it is published", request_id)

    def acknowledging(self, station: Station, entry: Entry, waiting: list[Entry]) -> None:
        """The gateway acknowledges a message."""
        if (asked := self._josev.asked.get(entry.about)) is not None:
            other = any(each.about == entry.about and each is not entry for each in waiting)
            if not asked.answers and not other:
                raise Violation("no request is acknowledged before its answer is with the broker", entry.about)
        elif entry.about in self._josev.told and station.service is not None:
            station.acknowledged += 1
            outcomes = sum(count for _, count in station.service.counters.statuses.items())
            if outcomes < station.acknowledged:
                raise Violation("no status is acknowledged before it was dealt with", entry.about)
            self.done.add(entry.about)

    # The ledger.

    def look(self, ledger: Ledger) -> None:
        """Look at the ledger, if it has changed, and at ``active/``."""
        before = self.seen
        with self._machine.unwatched(), ledger.database.reading() as sql:
            changes = database_of(ledger)._connection.total_changes  # noqa: SLF001 - what nobody else needs
            version = (id(ledger), changes, sql.execute("PRAGMA data_version").fetchone()[0])
            if version == before.version:
                return
            now = Seen(
                keys={row[0]: _Key(row[1], (row[2], row[3]), row[4]) for row in sql.execute(_ROWS)},
                events={row[0]: tuple(row[1:]) for row in sql.execute(_EVENTS)},
                answers=dict(sql.execute(_ANSWERS).fetchall()),
                secrets=dict(sql.execute(_SECRETS).fetchall()),
                running=ledger.retention.running,
                version=version,
            )
            files = ledger.keys.active_files()
        self.seen = now
        self._nothing_lost(before, now)
        for seq, (key_id, event, _, message_id) in now.events.items():
            if seq not in before.events or before.events[seq] != now.events[seq]:
                self._event(before.keys.get(key_id), now.keys[key_id], key_id, event, message_id)
        self._once(now)
        self._answered_keys(now)
        self._bounds(now)
        self._secrets(now)
        if now.running < before.running:
            raise Violation("running time never goes back", f"{before.running} to {now.running}")
        if now.running > self.ran + 1000:
            raise Violation("running time is the time that the daemon ran", f"{now.running} > {self.ran}")
        if files != self._shown[-1]:
            for name in {*files, *self._shown[-1]}:
                history = self._history.setdefault(name, [None])
                if history[-1] != files.get(name):
                    history.append(files.get(name))
            self._shown.append(files)
            for name, content in files.items():
                self._fits(name, content)

    def _fits(self, name: str, content: bytes) -> None:
        """The certificate in a file under ``active/`` is for the key in it."""
        key, begin, certificates = content.partition(b"-----BEGIN CERTIFICATE")
        if not begin:
            return
        leaf = x509.load_pem_x509_certificates(begin + certificates)[0].public_key()
        public = leaf.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        secret = base64.b64decode(b"".join(key.splitlines()[1:-1]))
        if self._tpm.secrets.get(key_id_of(public)) != secret:
            raise Violation("a certificate in active/ is for the key beside it", name)

    def _nothing_lost(self, before: Seen, now: Seen) -> None:
        for key_id, key in before.keys.items():
            if key_id not in now.keys and key.owner[0] and key.state != KeyState.DESTROYED:
                raise Violation("what was committed is never lost", f"key {key_id}, {key.state}")
        for seq, event in before.events.items():
            if now.events.get(seq) != event and event[0] in now.keys:
                raise Violation("what was committed is never lost", f"event {event}")
        for request_id, key_id in before.answers.items():
            if request_id not in now.answers and key_id in now.keys and now.keys[key_id].state != KeyState.DESTROYED:
                raise Violation("what was committed is never lost", f"answer {request_id}")

    def _event(self, before: _Key | None, now: _Key, key_id: str, event: str, message_id: str | None) -> None:
        state = None if before is None else before.state
        if (state, now.state) == (KeyState.ACTIVE, KeyState.DESTROYED) and event not in _NAMING:
            raise Violation("a key in use is destroyed by nothing but what names it", f"{key_id} by {event}")
        if event == KeyEvent.DESTRUCTION_ORDERED and key_id not in self.ordered:
            raise Violation("a key is destroyed by an order for itself", key_id)
        due = None if before is None else before.due
        if (event, state) == (KeyEvent.EXPIRED, KeyState.DEACTIVATED) and (due is None or due > self.ran + 1000):
            raise Violation("no key ends before its time", f"{key_id}: due {due}, ran {self.ran}")
        if event in _BY_STATUS and (message_id or event != KeyEvent.RESTORED):  # or by an order
            told = self._josev.told.get(message_id or "")
            if told is None or told.verb != _BY_STATUS[KeyEvent(event)]:
                raise Violation("a status is what changes a key", f"{event} by {message_id}")
            self._status(told, now, key_id, message_id or "")

    def _status(self, told: Told, now: _Key, key_id: str, message_id: str) -> None:
        kind, evse = told.owner
        if now.owner[0] != kind or (evse is not None and now.owner[1] != evse):
            raise Violation("a status changes a key of the owner that it names", f"{told} and {now}")
        if told.named and told.key_id != key_id:
            raise Violation("a status that names a key changes that key", f"{told} and {key_id}")
        if self._setting.certificate_dir and not told.named:
            certificate = self._josev.certificates.get(key_id)
            if told.verb == "installed" and certificate is None:
                raise Violation("a key becomes active by a certificate for it", key_id)
            by_file = told.verb == "deleted" and told.by_file
            if told.verb == "deleted" and not by_file and (certificate is None or not certificate.removed):
                raise Violation("a key whose certificate is there is not deleted", f"{told} and {key_id}")
        if message_id not in self.done and told.last < self._applied:
            raise Violation("statuses change keys in their order", f"{told} after {self._applied}")
        self._applied = max(self._applied, told.number)

    @staticmethod
    def _once(now: Seen) -> None:
        by_status = Counter(message_id for _, event, _, message_id in now.events.values() if event in _BY_STATUS)
        del by_status[None]
        if by_status and max(by_status.values()) > 1:
            raise Violation("a status changes a key once", by_status.most_common(1))

    @staticmethod
    def _answered_keys(now: Seen) -> None:
        answered = set(now.answers.values())
        for key_id, key in now.keys.items():
            if key.state == KeyState.PRE_ACTIVATION and key.owner[0] and key_id not in answered:
                raise Violation("no key is on record without the answer that it was made for", key_id)

    @staticmethod
    def _bounds(now: Seen) -> None:
        pending = [key.owner for key in now.keys.values() if key.state == KeyState.PRE_ACTIVATION and key.owner[0]]
        active = Counter(key.owner for key in now.keys.values() if key.state == KeyState.ACTIVE)
        if len(pending) > BOUNDS.pending_total or max(Counter(pending).values(), default=0) > BOUNDS.pending_limit:
            raise Violation("no more keys are pending than may be", pending)
        if len(active) > BOUNDS.active_limit:
            raise Violation("no more keys are active than may be", active)
        if max(active.values(), default=0) > 1:
            raise Violation("an owner has one active key", active)

    def _secrets(self, now: Seen) -> None:
        for key_id, secret in now.secrets.items():
            if now.keys[key_id].state == KeyState.DESTROYED:
                raise Violation("a destroyed key has no private part", key_id)
            if self._tpm.secrets.get(key_id) != secret:
                raise Violation("the private part on record is that of the key", key_id)
        for key_id, key in now.keys.items():
            if key.state != KeyState.DESTROYED and key_id not in now.secrets:
                raise Violation("a key that is not destroyed has its private part", key_id)

    # Files.

    def active(self) -> None:
        """``active/`` shows what the ledger says, or what it said one change before."""
        shown = self._read()
        if shown == self._shown[-1]:
            del self._shown[:-1]
            self.disturbed = self.unsynced
            return
        if self.disturbed:
            return
        allowed = self._shown[-2:]
        for name in {*shown, *allowed[0], *allowed[-1]}:
            if shown.get(name) not in [each.get(name) for each in allowed]:
                raise Violation("active/ is what the ledger says, or one change behind", name)

    def power_lost(self) -> None:
        """What a loss of power left of ``active/`` is whole, and at most one change behind."""
        shown = self._read()
        for name, content in shown.items():
            if not content.startswith(b"-----BEGIN") or not content.endswith(b"-----\n") or b"\0" in content:
                raise Violation("a loss of power leaves no torn file in active/", name)
        if self.disturbed:
            return
        for name, history in self._history.items():
            left = shown.get(name)  # what was not seen before is newer
            if left in history[:-2] and left not in history[-2:]:
                raise Violation("a loss of power takes active/ one change back at most", name)

    def _read(self) -> dict[str, bytes]:
        folder = self._machine.disk / "state" / DIRECTORY_NAME
        with self._machine.unwatched():
            return {path.name: path.read_bytes() for path in folder.glob("*.pem")} if folder.is_dir() else {}

    def wiped(self) -> None:
        """No key has outlived its time, and no block has a trace of a private part that the ledger does not have."""
        for key_id, key in self.seen.keys.items():
            if key.state != KeyState.DESTROYED and key.due is not None and key.due + _LATE < self.seen.running:
                raise Violation("a key ends when its time is over", key_id)
        living = set(self.seen.secrets)
        gone = {key_id: secret for key_id, secret in self._tpm.secrets.items() if key_id not in living}
        with self._machine.unwatched():
            for path in sorted(self._machine.disk.rglob("*")):
                content = path.read_bytes() if path.is_file() else b""
                for key_id, secret in gone.items():
                    if _traces(secret, content):
                        raise Violation("no secret of a destroyed key is in any block", f"{key_id} in {path.name}")

    def settled(self) -> None:
        """After a quiet time and a proper end: nothing is left to be done."""
        if self._read() != self._shown[-1]:
            raise Violation("active/ is in the end what the ledger says")
        self.wiped()
        for request_id, asked in self._josev.asked.items():
            if asked.taken and not asked.answers:
                raise Violation("every request is answered, or still with the broker", request_id)


def _traces(secret: bytes, content: bytes) -> bool:
    """Whether a piece of a secret is there."""
    pieces = (secret[start : start + 16] for start in range(0, len(secret), 16))
    return any(piece in content for piece in (*pieces, base64.b64encode(secret[:48])))  # in PEM, too
