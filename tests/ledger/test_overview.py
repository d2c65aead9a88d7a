"""What a person is shown of the ledger, on each engine."""

from __future__ import annotations

from recording import answer, bring

from parts import V2G, request
from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyEvent
from stationkey.ledger.messages import newest
from stationkey.ledger.overview import look

pytest_plugins = ["ledgers"]


def test_the_overview_shows_keys_events_and_rejections_of_all_stations(ledger: Ledger) -> None:
    first = answer(ledger, request(V2G, "DE*ABC*E1"), station="depot/s1")
    second = answer(ledger, request(V2G, "DE*ABC*E1"), station="depot/s2")
    bring(ledger, second, KeyEvent.INSTALLED)
    ledger.rejections.note("refused", reason="rate_limited", message="too many", now=9, station="depot/s1")
    ledger.rejections.write()

    seen = look(ledger.database, keys=8, happenings=8)

    assert [(key.key_id, key.station) for key in seen.keys] == [(second, "depot/s2"), (first, "depot/s1")]
    assert [(one.event, one.station) for one in seen.happenings[:2]] == [
        ("rejected", "depot/s1"),
        ("installed", "depot/s2"),
    ]
    assert len(look(ledger.database, keys=1, happenings=1).keys) == 1


def test_the_messages_are_found_by_the_beginning_of_their_ids(ledger: Ledger) -> None:
    asked = request(V2G)
    answer(ledger, asked, station="depot/s1")
    ledger.rejections.note("Refused", reason="rate_limited", message="too many", now=9)
    ledger.rejections.write()

    found, place = newest(ledger.database, 8)

    assert [one.message_id for one in found] == [asked.id, "Refused"]
    assert newest(ledger.database, 8, after=place) == ([], place)
    assert [one.message_id for one in newest(ledger.database, 8, beginning="rEf")[0]] == ["Refused"]
    assert [one.station for one in newest(ledger.database, 8, beginning=asked.id[:9].upper())[0]] == ["depot/s1"]
