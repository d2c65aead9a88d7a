"""Floods, by whoever reaches the broker: what they cost is bounded, and everybody else is served meanwhile.

The daemon, the broker and the TPM (swtpm) are real. The figures that are printed are for docs/operations.md.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from flood import (
    CONFIG,
    HUGE,
    LARGE,
    Connection,
    Listener,
    PatientMosquitto,
    bad_kinds,
    counts_of,
    in_parts,
    memory,
    publish,
    request,
    size,
    status,
    wire,
)
from peers import Mosquitto
from rig import Rig

from stationkey.ledger import MAX_REJECTIONS
from stationkey.system.state_dir import DATABASE_NAME

MIB: Final = 1024 * 1024
BAD_MESSAGES: Final = 100_000
PART: Final = 2000
"""How many are sent before it is looked whether the daemon still answers."""
MEMORY: Final = 32 * 1024
"""KiB that a flood may make the daemon grow by, for good or in between."""
DISK: Final = 8 * MIB
"""Bytes that a flood may make the state directory hold, `MAX_REJECTIONS` rejections included."""
LOG: Final = 1 * MIB
V2G: Final = "v2g_certificate"


@pytest.fixture(autouse=True)
def not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon as it is: with its lines counted for the coverage it takes three times as long, and more memory."""
    for name in [name for name in os.environ if name.startswith("COVERAGE_")]:
        monkeypatch.delenv(name)


class Scene(Rig):
    """A rig with somebody who hears the answers; the daemon is started with it."""

    def __init__(self, folder: Path, config: str = CONFIG) -> None:
        super().__init__(folder, tpm=True, config=config, broker=PatientMosquitto(folder / "broker"))
        self.listener = Listener(self.broker)

    def peers(self) -> list[AbstractContextManager[Any]]:
        return [*super().peers(), self.daemon, self.listener]

    def keys(self, certificate_type: str) -> dict[str, str]:
        """The state of each key of a certificate type, by the EVSE that it is for."""
        with closing(sqlite3.connect(self.state_dir / DATABASE_NAME)) as ledger:
            rows = ledger.execute("SELECT evse_id, state FROM key WHERE certificate_type = ?", (certificate_type,))
            return dict(rows.fetchall())

    def count(self, table: str) -> int:
        with closing(sqlite3.connect(self.state_dir / DATABASE_NAME)) as ledger:
            (rows,) = ledger.execute(f"SELECT count(*) FROM {table}").fetchone()
            return int(rows)


@contextmanager
def connections(broker: Mosquitto, count: int) -> Iterator[list[Connection]]:
    with ExitStack() as stack:
        yield [stack.enter_context(Connection(broker)) for _ in range(count)]


def good(**data: Any) -> dict[str, Any]:
    """A request that is served, for an EVSE of its own type."""
    return request(certificate_type=V2G, common_name="DE-ABC-S-1", **data)


@pytest.mark.long
def test_a_hundred_thousand_bad_messages_leave_the_daemon_as_it_was_and_good_ones_answered_all_along(
    tmp_path: Path,
) -> None:
    with Scene(tmp_path) as here, connections(here.broker, 4) as flooding:
        used = good()
        assert here.listener.ask(used) == "accepted"
        kinds = list(bad_kinds(used).values())
        turns = itertools.cycle(kinds)
        before, _ = memory(here.daemon)
        begun = time.monotonic()
        for first in range(0, BAD_MESSAGES, PART):
            packets = (publish(next(turns)[0](), number) for number in range(PART))
            for connection, packet in zip(itertools.cycle(flooding), in_parts(packets, PART // 8), strict=False):
                connection.send(packet)
            if first % (10 * PART):
                assert here.listener.ask(used) == "accepted"  # again
            else:
                assert here.listener.ask(good(evse_id=f"DE*ABC*E{first}")) == "accepted"
        took = time.monotonic() - begun
        # Not counted: those with a used id, which are all alike, so that many get one answer together.
        to_be_answered = sum(BAD_MESSAGES // len(kinds) for _, answerable in kinds if answerable) - BAD_MESSAGES // len(
            kinds
        )
        here.listener.wait_for(
            lambda: here.listener.total["rejected"] >= to_be_answered, "all are rejected that can be"
        )
        after, most = memory(here.daemon)
        here.daemon.terminate()
        counts = counts_of(here.daemon)
        figures = f"{BAD_MESSAGES / took:.0f} messages/s; {before} to {after} KiB, {most} at most"
        print(f"{figures}; {size(here.state_dir)} bytes on disk, {len(here.daemon.run_log)} of log")  # noqa: T201 - see above
        assert most - before < MEMORY
        assert size(here.state_dir) < DISK
        assert len(here.daemon.run_log) < LOG
        assert here.count("rejection") == MAX_REJECTIONS
        assert "Traceback" not in here.daemon.run_log
        assert {"policy_organization", "id_reused", "nested_too_deep", "status_fits_no_key"} <= counts.keys()
        assert counts["accepted"] == 1 + BAD_MESSAGES // (10 * PART)
        assert "internal_error" not in counts


def test_large_messages_are_rejected_by_their_id_and_fill_no_memory(tmp_path: Path) -> None:
    """Eighty MiB, a little too large or far too large."""
    large, huge = 600, 100
    with Scene(tmp_path) as here, connections(here.broker, 2) as flooding:
        assert here.listener.ask(good()) == "accepted"
        before, _ = memory(here.daemon)
        for number in range(large):
            flooding[0].send(publish(LARGE, number))
            if number % (large // huge) == 0:
                flooding[1].send(publish(HUGE, number))
        assert here.listener.ask(good()) == "accepted"
        here.listener.wait_for(lambda: here.listener.total["rejected"] >= large + huge, "every one is rejected")
        _, most = memory(here.daemon)
        here.daemon.terminate()
        assert most - before < MEMORY
        assert counts_of(here.daemon)["payload_too_large"] >= large + huge


FLOOD: Final = 6000
BURST: Final = 300


def test_a_flood_of_good_requests_of_one_type_is_bounded_and_others_are_served_meanwhile(tmp_path: Path) -> None:
    """Sixteen connections ask as fast as they can; a request of another type, and a status, come in between."""
    configuration = CONFIG.replace("[policy]\n", f"[policy]\nburst = {BURST}\n")
    with Scene(tmp_path, configuration) as here, connections(here.broker, 16) as flooding:
        waiting = good(evse_id="DE*ABC*E1")
        assert here.listener.ask(waiting) == "accepted"
        begun = time.monotonic()
        asked = [request(evse_id=f"DE*ABC*E{number % 40}") for number in range(FLOOD)]
        packets = in_parts((publish(wire(each), number) for number, each in enumerate(asked)), FLOOD // 64)
        for number, packet in enumerate(packets):
            flooding[number % 16].send(packet)
            if number == 32:
                assert here.listener.ask(good(evse_id="DE*ABC*E2")) == "accepted"
                here.listener.send(publish(wire(status(evse_id="DE*ABC*E1")), 0))
        heard = here.listener.answers
        here.listener.wait_for(
            lambda: all((each["id"], "accepted") in heard or (each["id"], "rejected") in heard for each in asked),
            "every one is answered",
        )
        assert here.listener.ask(good(evse_id="DE*ABC*E3")) == "accepted"
        minutes = (time.monotonic() - begun) / 60
        assert here.keys(V2G) == {
            "DE*ABC*E1": "active",
            "DE*ABC*E2": "pre-activation",
            "DE*ABC*E3": "pre-activation",
        }
        here.daemon.terminate()
        counts = counts_of(here.daemon)
        served = sum(1 for each in asked if (each["id"], "accepted") in heard)
        print(f"{served} of {FLOOD} served in {60 * minutes:.1f} s")  # noqa: T201 - see above
        assert BURST <= served <= BURST + 60 * minutes + 1
        assert counts["rate_limited"] == FLOOD - served
        assert "keystore_timeout" not in counts


def test_a_flood_of_evse_ids_costs_neither_room_nor_the_pending_keys_of_another_type(tmp_path: Path) -> None:
    configuration = CONFIG.replace("[policy]\n", "[policy]\nrequests_per_minute = 0\n")
    configuration += "[lifecycle]\npending_total = 32\nhistory_limit = 50\n"
    flood = 800
    with Scene(tmp_path, configuration) as here, connections(here.broker, 16) as flooding:
        assert here.listener.ask(good(evse_id="DE*ABC*E1")) == "accepted"
        before, _ = memory(here.daemon)
        for number in range(flood):
            asked = request(evse_id=f"DE*ABC*E{'*' * (number % 20)}{number}")
            flooding[number % 16].send(publish(wire(asked), number))
        here.listener.wait_for(lambda: len(here.listener.csrs) == flood + 1, "every one is answered")
        _, most = memory(here.daemon)
        assert here.keys(V2G) == {"DE*ABC*E1": "pre-activation"}
        pending = [state for state in here.keys("charging_station_certificate").values() if state == "pre-activation"]
        assert len(pending) == 31
        here.daemon.terminate()
        assert most - before < MEMORY
        assert size(here.state_dir) < DISK
        assert [path.name for path in (here.state_dir / "active").iterdir() if path.suffix] == []


def test_requests_for_rsa_keys_do_not_take_every_place_while_the_tpm_works(tmp_path: Path) -> None:
    """The TPM stands still meanwhile, so that no key is done before the last request has come."""
    with Scene(tmp_path, CONFIG.replace("[policy]\n", "[policy]\nqueue = 16\n")) as here:
        assert here.listener.ask(good()) == "accepted"
        here.tpm.freeze()
        asked = [request(algorithm="RSA_SHA256") for _ in range(14)]
        here.listener.send(b"".join(publish(wire(each), number) for number, each in enumerate(asked)))
        heard = here.listener.answers
        here.listener.wait_for(
            lambda: sum((each["id"], "rejected") in heard for each in asked) == 10, "ten are refused"
        )
        other = good(evse_id="DE*ABC*E2")
        here.listener.send(publish(wire(other), 0))
        here.tpm.thaw()
        here.listener.wait_for(lambda: other["id"] in here.listener.csrs, "the EC request is answered")
        here.listener.wait_for(lambda: all(each["id"] in here.listener.csrs for each in asked[:4]), "the others are")
        here.daemon.terminate()
        assert counts_of(here.daemon)["rsa_places_taken"] == 10


def test_a_request_repeated_over_and_over_makes_one_key_and_costs_no_allowance(tmp_path: Path) -> None:
    """Of many at once, some have the answer to another for theirs; the one that comes last has its own."""
    configuration = CONFIG.replace("[policy]\n", "[policy]\nburst = 2\n")
    with Scene(tmp_path, configuration) as here:
        asked = good()
        assert here.listener.ask(asked) == "accepted"
        again = {**asked, "id": asked["id"].upper()}
        for number in range(200):
            here.listener.send(publish(wire(again), number))
        assert here.listener.ask(again) == "accepted"
        assert here.listener.csrs[again["id"]] == here.listener.csrs[asked["id"]]
        assert here.listener.ask(good()) == "accepted"
        assert here.count("key") == 2
        assert here.listener.total["rejected"] == 0
