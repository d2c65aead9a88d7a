"""The ledger: its versions, its bounds, and that what is refused changes nothing."""

from __future__ import annotations

import random
import sqlite3
import uuid
from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path

import pytest

from parts import E1, V2G, C, O, dump, new_id, request
from stationkey.errors import LedgerError
from stationkey.keystore import KeyRef
from stationkey.ledger import KeyRecord, Ledger
from stationkey.lifecycle import TRANSITIONS, IllegalTransition, KeyEvent, KeyState
from stationkey.messages import GenerateCsrRequest
from stationkey.migrations import MIGRATIONS, SCHEMA_VERSION
from stationkey.profiles import SECP256R1
from stationkey.terms import Bounds

CSR = "-----BEGIN CERTIFICATE REQUEST-----\n" + "x" * 600
RANDOM = random.Random(1)

INTO: dict[KeyState, tuple[KeyEvent, ...]] = {
    KeyState.PRE_ACTIVATION: (),
    KeyState.ACTIVE: (KeyEvent.INSTALLED,),
    KeyState.DEACTIVATED: (KeyEvent.INSTALLED, KeyEvent.RETIRED),
    KeyState.COMPROMISED: (KeyEvent.COMPROMISE_REPORTED,),
    KeyState.DESTROYED: (KeyEvent.EXPIRED,),
}
"""What brings a new key into each state."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite3"


@pytest.fixture
def ledger(path: Path) -> Iterator[Ledger]:
    with closing(Ledger(path)) as opened:
        yield opened


@pytest.fixture
def fast_ledger(ledger: Ledger) -> Ledger:
    """One that does not wait for the disk, for tests of thousands of steps in which no power is lost."""
    ledger._connection.execute("PRAGMA synchronous=OFF")  # noqa: SLF001 - nobody else should be able to
    return ledger


def a_key() -> KeyRef:
    """What a key store might give, without the time that it would take. As long as a TPM's."""
    return KeyRef(scheme="software", key_type=SECP256R1, public=RANDOM.randbytes(91), private=RANDOM.randbytes(230))


def answer(
    ledger: Ledger,
    asked: GenerateCsrRequest | None = None,
    *,
    key: KeyRef | None = None,
    running: int = 0,
    bounds: Bounds | None = None,
) -> str:
    """Record an answer; the name of its key."""
    key = key or a_key()
    ledger.record_answer(
        asked or request(), key, CSR, now=0, running=running, due=running + 1000, bounds=bounds or Bounds()
    )
    return key.key_id


def bring(ledger: Ledger, key_id: str, *events: KeyEvent) -> None:
    for event in events:
        ledger.apply(key_id, event, reason="", now=0)


def on_record(ledger: Ledger) -> list[KeyRecord]:
    return ledger.keys()


def states(ledger: Ledger) -> list[KeyState]:
    return [key.state for key in on_record(ledger)]


# Steps.


@pytest.mark.parametrize(
    ("state", "event"),
    [
        pytest.param(state, event, id=f"{state}, {event}")
        for state, event in product(KeyState, KeyEvent)
        if (state, event) not in TRANSITIONS
    ],
)
def test_an_illegal_step_changes_nothing(ledger: Ledger, path: Path, state: KeyState, event: KeyEvent) -> None:
    key_id = answer(ledger)
    bring(ledger, key_id, *INTO[state])
    before = dump(path)

    with pytest.raises(IllegalTransition):
        ledger.apply(key_id, event, reason="", now=0)

    assert dump(path) == before
    assert states(ledger) == [state]


def test_an_activation_that_fails_deactivates_nothing(ledger: Ledger, path: Path) -> None:
    active, gone = answer(ledger), answer(ledger)
    bring(ledger, active, KeyEvent.INSTALLED)
    bring(ledger, gone, KeyEvent.EXPIRED)
    before = dump(path)

    with pytest.raises(IllegalTransition):
        ledger.activate(gone, chain=None, not_after=None, reason="", now=0, grace_due=0, message_id=None)

    assert dump(path) == before


def test_an_event_of_a_key_that_is_not_on_record_is_refused_in_words(ledger: Ledger) -> None:
    with pytest.raises(LedgerError) as refusal:
        ledger.apply("0" * 20, KeyEvent.EXPIRED, reason="", now=0)

    assert refusal.value.reason == "key_not_found"


# Bounds.


def test_the_oldest_pending_key_of_an_owner_makes_room(ledger: Ledger) -> None:
    others = [answer(ledger, request(V2G, E1)) for _ in range(3)]
    keys = [answer(ledger, bounds=Bounds(pending_limit=3)) for _ in range(5)]

    left = {key.key_id for key in on_record(ledger) if key.state is KeyState.PRE_ACTIVATION}
    assert left == {*others, *keys[2:]}
    assert ledger.history(keys[0])[-1].reason == "too many keys were pending"


def test_the_oldest_pending_key_of_all_makes_room_where_there_are_many_evses(ledger: Ledger) -> None:
    keys = [answer(ledger, request(V2G, f"DE*ABC*E{number}"), bounds=Bounds(pending_total=20)) for number in range(50)]

    assert [key.key_id for key in on_record(ledger) if key.state is KeyState.PRE_ACTIVATION] == keys[30:]


def test_nobody_makes_room_where_an_owner_has_made_it(ledger: Ledger) -> None:
    bounds = Bounds(pending_limit=2, pending_total=4)
    eldest = answer(ledger, request(V2G, E1), bounds=bounds)
    answer(ledger, request(V2G, E1), bounds=bounds)
    for _ in range(5):
        answer(ledger, request(), bounds=bounds)

    assert ledger.keys(eldest)[0].state is KeyState.PRE_ACTIVATION
    assert states(ledger).count(KeyState.PRE_ACTIVATION) == 4


def test_ten_thousand_unanswered_requests_leave_a_small_database_and_no_stray_file(
    fast_ledger: Ledger, path: Path
) -> None:
    ledger = fast_ledger
    bounds = Bounds(pending_limit=8, pending_total=64, history_limit=200)
    sizes = []
    for round_number in range(10):
        for number in range(1000):
            answer(ledger, request(V2G, f"DE*ABC*E{number % 20}"), bounds=bounds, running=round_number)
        while ledger.forget(keep=bounds.history_limit, answered_before=0):
            pass
        ledger.wipe()
        sizes.append(path.stat().st_size)

    assert len(on_record(ledger)) == 64 + 200
    assert states(ledger).count(KeyState.PRE_ACTIVATION) == 64
    assert max(sizes) < 1024 * 1024
    assert abs(sizes[-1] - sizes[0]) <= 64 * 1024
    assert {file.name for file in path.parent.iterdir()} <= {path.name, f"{path.name}-wal", f"{path.name}-shm"}


def test_a_destroyed_key_is_forgotten_when_enough_younger_ones_are_destroyed(ledger: Ledger, path: Path) -> None:
    asked = [request() for _ in range(5)]
    keys = [answer(ledger, one) for one in asked]
    for key_id in (keys[3], keys[0], keys[2]):
        bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)

    while ledger.forget(keep=1, answered_before=0):
        pass

    assert [key.key_id for key in on_record(ledger)] == [keys[1], keys[2], keys[4]]
    assert ledger.find_answer(asked[3].id) is None
    assert not any(f"'{key_id}'" in line for line in dump(path) for key_id in (keys[0], keys[3]))


def test_answers_are_forgotten_by_running_time_but_not_while_their_key_is_pending(ledger: Ledger) -> None:
    old_pending, old_active, young_active = request(), request(V2G, E1), request()
    answer(ledger, old_pending, running=100)
    bring(ledger, answer(ledger, old_active, running=100), KeyEvent.INSTALLED)
    bring(ledger, answer(ledger, young_active, running=200), KeyEvent.INSTALLED)

    while ledger.forget(keep=10, answered_before=200):
        pass

    found = [ledger.find_answer(one.id) is not None for one in (old_pending, old_active, young_active)]
    assert found == [True, False, True]
    assert len(on_record(ledger)) == 3


def test_one_step_of_forgetting_is_small(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stationkey.ledger._BATCH", 3)
    for _ in range(10):
        bring(ledger, answer(ledger), KeyEvent.EXPIRED)

    assert ledger.forget(keep=0, answered_before=0) == 3


# Wiping.


def test_no_piece_of_a_destroyed_key_is_left_wherever_its_row_had_been(fast_ledger: Ledger, path: Path) -> None:
    """Rows grow, shrink and go, and others move from page to page for that, and leave pieces of themselves behind.

    The seed is one with which SQLite 3.40 leaves such a piece, with secure_delete on and the log emptied.
    """
    ledger = fast_ledger
    chance = random.Random(36)
    live: dict[str, bytes] = {}
    gone: list[bytes] = []
    for _ in range(800):
        move = chance.random()
        if move < 0.5 or not live:
            key = KeyRef(
                scheme="software",
                key_type=SECP256R1,
                public=chance.randbytes(91),
                private=chance.randbytes(chance.choice([138, 230, 340])),
            )
            one = request(
                request_id=str(uuid.UUID(int=chance.getrandbits(128))), common_name="x" * chance.randint(1, 60)
            )
            crowded = ledger.record_answer(
                one, key, "c" * chance.randint(500, 900), now=0, running=0, due=1, bounds=Bounds(pending_limit=60)
            )
            live[key.key_id] = key.private
            gone += [live.pop(key_id) for key_id in crowded]
            continue
        key_id = chance.choice(list(live))
        if move < 0.7:
            if ledger.keys(key_id)[0].state is KeyState.PRE_ACTIVATION:
                chain = "z" * chance.randint(500, 6000)
                ledger.activate(key_id, chain=chain, not_after=0, reason="", now=0, grace_due=1, message_id=None)
        elif move < 0.97:
            bring(ledger, key_id, KeyEvent.DESTRUCTION_ORDERED)
            gone.append(live.pop(key_id))
        else:
            ledger.forget(keep=20, answered_before=0)

    assert ledger.wipe()

    raw = b"".join(file.read_bytes() for file in path.parent.iterdir())
    pieces = {private[start : start + 16] for private in gone for start in range(0, len(private) - 15, 8)}
    assert not [piece for piece in pieces if piece in raw]
    assert {key.key_id for key in ledger.usable()} == set(live)


def test_the_database_is_written_anew_only_if_a_key_was_destroyed(ledger: Ledger) -> None:
    first, second = answer(ledger), answer(ledger)
    assert not ledger.wipe()
    bring(ledger, first, KeyEvent.EXPIRED)
    assert ledger.wipe()
    assert not ledger.wipe()
    bring(ledger, second, KeyEvent.EXPIRED)
    assert ledger.wipe()


def test_a_reader_in_the_way_keeps_no_key_from_being_destroyed(ledger: Ledger, path: Path) -> None:
    key = a_key()
    answer(ledger, key=key)
    ledger._connection.execute("PRAGMA busy_timeout=0")  # noqa: SLF001 - so that nobody waits for what cannot come
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM key").fetchall()
        bring(ledger, key.key_id, KeyEvent.DESTRUCTION_ORDERED)
        assert not ledger.checkpoint()

    assert ledger.checkpoint()
    assert states(ledger) == [KeyState.DESTROYED]
    assert key.private not in b"".join(file.read_bytes() for file in path.parent.iterdir())


def test_a_backup_made_while_it_is_written_has_every_key_so_far(ledger: Ledger, tmp_path: Path) -> None:
    keys = [a_key() for _ in range(3)]
    for key in keys:
        answer(ledger, key=key)

    with closing(sqlite3.connect(ledger.path)) as source, closing(sqlite3.connect(tmp_path / "copy.sqlite3")) as copy:
        source.backup(copy)
    answer(ledger)

    with closing(Ledger(tmp_path / "copy.sqlite3")) as restored:
        assert [restored.key_ref(key.key_id) for key in keys] == keys
        assert len(on_record(restored)) == 3


# Versions.

REQUEST_ID = "123E4567-e89b-12d3-a456-426614174000"


def make_version_1(path: Path, key: KeyRef) -> None:
    """A database as version 1 wrote it, with one key and the answer that carries its CSR."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.executescript(MIGRATIONS[0])
        connection.execute("PRAGMA user_version=1")
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(
            "INSERT INTO key VALUES (?, 'software', 'secp256r1', 'v2g_certificate', ?, 'ECDSA_SHA256', 'CN', ?, ?,"
            " 'pre-activation', 1700000000000, ?, ?)",
            (key.key_id, E1, O, C, key.public, key.private),
        )
        connection.execute(
            "INSERT INTO answer VALUES (?, ?, x'00', ?, ?, 1700000000000, 1)",
            (REQUEST_ID.lower(), REQUEST_ID, key.key_id, CSR),
        )
        connection.execute("INSERT INTO meta VALUES ('mqtt_client_id', 'stationkey-1')")


def test_a_database_of_version_1_is_brought_up_to_date_with_all_that_is_in_it(path: Path) -> None:
    key = a_key()
    make_version_1(path, key)

    with closing(Ledger(path)) as ledger:
        (record,) = ledger.keys()
        assert (record.key_id, record.state, record.evse_id) == (key.key_id, KeyState.PRE_ACTIVATION, E1)
        assert record.request_ids == (REQUEST_ID,)
        assert ledger.key_ref(key.key_id) == key
        assert [(event.event, event.at) for event in ledger.history(key.key_id)] == [("CSR answered", 1700000000000)]
        answered = ledger.find_answer(REQUEST_ID.lower())
        assert answered is not None
        assert (answered.request_id, answered.csr, answered.key_id) == (REQUEST_ID, CSR, key.key_id)
        assert ledger.client_id() == "stationkey-1"
        assert ledger.running == 0


def test_a_pending_key_of_version_1_gets_an_end_and_can_be_activated(path: Path) -> None:
    key = a_key()
    make_version_1(path, key)

    with closing(Ledger(path)) as ledger:
        assert ledger.keys()[0].due is None
        ledger.adopt(pending_due=1000, grace_due=10)
        assert ledger.keys()[0].due == 1000
        ledger.adopt(pending_due=2000, grace_due=10)
        assert ledger.keys()[0].due == 1000
        bring(ledger, key.key_id, KeyEvent.INSTALLED)
        assert states(ledger) == [KeyState.ACTIVE]


def _schema(path: Path) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        version = connection.execute("PRAGMA user_version").fetchall()
        return version + sorted(connection.execute("SELECT type, name, sql FROM sqlite_schema WHERE sql IS NOT NULL"))


@pytest.mark.parametrize("version", range(1, SCHEMA_VERSION))
def test_a_database_of_each_version_becomes_what_a_new_one_is(tmp_path: Path, version: int) -> None:
    old, new = tmp_path / "old.sqlite3", tmp_path / "new.sqlite3"
    with closing(sqlite3.connect(old)) as connection:
        for number in range(version):
            connection.executescript(MIGRATIONS[number])
        connection.execute(f"PRAGMA user_version={version}")

    Ledger(old).close()
    Ledger(new).close()

    assert _schema(old) == _schema(new)


@pytest.mark.parametrize("at", range(1, 12))
def test_a_migration_is_done_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    key = a_key()
    make_version_1(path, key)
    statements = MIGRATIONS[1].split(";\n")
    broken = ";\n".join([*statements[:at], "SELECT * FROM power_is_lost_here"])
    with monkeypatch.context() as patch:
        patch.setattr("stationkey.ledger.MIGRATIONS", (MIGRATIONS[0], broken))
        with pytest.raises(LedgerError):
            Ledger(path)

    with closing(Ledger(path)) as ledger:
        assert ledger.key_ref(key.key_id) == key
        assert len(ledger.history(key.key_id)) == 1


def _content(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.parent.glob("ledger.sqlite3*") if file.suffix != "-shm"}


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("crashed", [False, True], ids=["closed in order", "with a log left by a crash"])
def test_a_newer_database_is_refused_in_words_and_not_a_byte_of_it_changed(
    tmp_path: Path, path: Path, read_only: bool, crashed: bool
) -> None:
    original = tmp_path / "newer" / path.name
    original.parent.mkdir()
    Ledger(original).close()
    with closing(sqlite3.connect(original, isolation_level=None)) as connection:
        connection.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
        connection.execute("CREATE TABLE something_new (x)")
        left = ("", "-wal") if crashed else ()
        for suffix in left:
            Path(f"{path}{suffix}").write_bytes(Path(f"{original}{suffix}").read_bytes())
    if not crashed:
        path.write_bytes(original.read_bytes())
    before = {name: content for name, content in _content(path).items() if not name.endswith("-shm")}

    with pytest.raises(LedgerError) as refusal:
        Ledger(path, read_only=read_only)

    assert refusal.value.reason == "ledger_newer"
    assert f"version {SCHEMA_VERSION + 1}" in str(refusal.value)
    after = {name: content for name, content in _content(path).items() if content and not name.endswith("-shm")}
    assert after == before


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
def test_a_command_does_not_migrate_under_a_daemon_of_the_older_version(path: Path, read_only: bool) -> None:
    make_version_1(path, a_key())
    before = path.read_bytes()

    with pytest.raises(LedgerError) as refusal:
        Ledger(path, read_only=read_only, make=False)

    assert refusal.value.reason == "ledger_older"
    assert "start this version's daemon once" in str(refusal.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("read_only", [False, True], ids=["to write", "to read"])
@pytest.mark.parametrize("name", ["none.sqlite3", "no folder/ledger.sqlite3", "x" * 300])
def test_a_ledger_that_is_not_there_is_told_in_words_and_not_made(tmp_path: Path, name: str, read_only: bool) -> None:
    with pytest.raises(LedgerError) as refusal:
        Ledger(tmp_path / name, read_only=read_only, make=False)

    assert refusal.value.reason in {"ledger_missing", "ledger_unusable"}
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_database_is_refused_and_not_a_byte_of_it_changed(path: Path) -> None:
    with closing(Ledger(path)) as ledger:
        for _ in range(50):
            answer(ledger, bounds=Bounds(pending_limit=100))
    content = bytearray(path.read_bytes())
    content[4096 * 3 : 4096 * 4] = b"\xa5" * 4096
    path.write_bytes(content)

    with pytest.raises(LedgerError) as refusal:
        Ledger(path)

    assert refusal.value.reason == "ledger_damaged"
    assert path.read_bytes() == bytes(content)


# Repeats.


def test_a_message_counts_as_a_repeat_once_it_has_brought_an_event(ledger: Ledger) -> None:
    message_id = new_id()
    asked = request()
    key_id = answer(ledger, asked)
    assert not ledger.counts_as_repeat(message_id)
    assert not ledger.counts_as_repeat(asked.id)

    ledger.apply(key_id, KeyEvent.INSTALLED, reason="", now=0, message_id=message_id)

    assert ledger.counts_as_repeat(message_id)


@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        pytest.param("journal_mode", "wal", id="readers do not wait for writers"),
        pytest.param("synchronous", 2, id="a commit survives a loss of power"),
        pytest.param("secure_delete", 1, id="what is deleted is zeroed"),
        pytest.param("temp_store", 2, id="no copy goes to a temporary file"),
        pytest.param("foreign_keys", 1, id="no answer without its key"),
    ],
)
def test_the_promises_of_sqlite_are_asked_for(ledger: Ledger, pragma: str, value: object) -> None:
    assert ledger._connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)  # noqa: SLF001 - of this connection
