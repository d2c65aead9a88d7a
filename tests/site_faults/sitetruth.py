"""The judge of a site: whether what was answered, what is on record and what is in the token are one and the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Final

from asker import until
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509 import load_pem_x509_csr
from depot import Asked
from siterig import SiteRig

from stationkey.keystore import key_id_of
from stationkey.keystore.pkcs11 import keyfile
from stationkey.keystore.pkcs11.uri import identifier_of

PATIENCE: Final = 120.0
"""Seconds after which what is waited for has failed: a request without an answer is lost."""


def judge(rig: SiteRig) -> None:
    """Hold a site that no daemon serves against what its stations asked and received.

    Every request was accepted in the end. Every CSR received is on record under its station and id, and is for a key on
    record. Every key on record has the answer and the event that say why it was made. No two CSRs are for one key.
    """
    depot = rig.depot
    assert depot.open == []
    assert depot.requests.keys() == depot.accepted.keys()
    _judge_answers(rig, depot.accepted)
    _judge_keys(rig)


def judge_token(rig: SiteRig) -> int:
    """Hold the token against the record: each key on record is there, and no other; how many there are."""
    recorded = rig.rows("SELECT private FROM secret")
    living = {identifier_of(keyfile.uri_of(bytes(private))).hex() for (private,) in recorded}
    found = rig.objects()
    assert found["Private"] >= living, "a key on record is not in the token"
    assert found["Private"] <= living, _told(rig, found["Private"] - living)
    assert found["Public"] == living
    return len(living)


def settle(rig: SiteRig, *, again: float | None = None) -> int:
    """Let everything be answered, end the daemons, let another find what they left in the token, and judge.

    A key that a living daemon made and did not record, as it had lost the shard meanwhile, is destroyed when that
    daemon has ended, or after three minutes.

    Args:
        rig: the site.
        again: repeat what has no answer for so many seconds.

    Returns:
        How many keys there are.
    """
    rig.depot.keep_up(0)
    rig.wait_until_held(bound=PATIENCE)
    rig.depot.wait_for_all(bound=PATIENCE, again=again)
    for asked in rig.depot.rejected - rig.depot.accepted.keys():
        until(partial(accepted_again, rig, asked), f"{asked} is accepted", bound=PATIENCE)
    rig.terminate()
    rig.daemons[0].launch()
    with suppress(AssertionError):  # `judge_token` tells which
        until(lambda: strays(rig) == 0, "the token has no strays", bound=PATIENCE)
    rig.terminate()
    judge(rig)
    return judge_token(rig)


def accepted_again(rig: SiteRig, asked: Asked) -> bool:
    """Whether a request that was rejected for a passing reason is accepted when it is sent again."""
    answer = rig.depot.ask(asked.station, rig.depot.requests[asked], bound=PATIENCE)
    return answer.response.data.status == "accepted"


def strays(rig: SiteRig) -> int:
    """How many keys are in the token that no record has."""
    recorded = rig.rows("SELECT private FROM secret")
    living = {identifier_of(keyfile.uri_of(bytes(private))).hex() for (private,) in recorded}
    return len(rig.objects()["Private"] - living)


def _told(rig: SiteRig, left: set[str]) -> str:
    """Say what is on record about strays."""
    query = "SELECT id, maker, ended, look, clock_timestamp() FROM token_key WHERE id = ANY(%s)"
    return f"{len(left)} strays are in the token; on record: {rig.rows(query, list(left))}"


def _judge_answers(rig: SiteRig, accepted: Mapping[Asked, str]) -> None:
    rows = rig.rows("SELECT key.station, request_id, csr, key_id FROM answer JOIN key ON key_number = number")
    recorded = {Asked(station, request_id): (csr, key_id) for station, request_id, csr, key_id in rows}
    assert len(recorded) == len(rows), "an id of a station has two answers"
    for asked, csr in accepted.items():
        assert asked in recorded, f"{asked} was answered and is not on record"
        assert recorded[asked] == (csr, key_of(csr))
    keys = Counter(key_id for _, key_id in recorded.values())
    assert max(keys.values(), default=1) == 1


def _judge_keys(rig: SiteRig) -> None:
    query = (
        "SELECT key_id, (SELECT count(*) FROM answer WHERE key_number = number),"
        " (SELECT count(*) FROM event WHERE key_number = number AND event = 'CSR answered'),"
        " state = 'destroyed', (SELECT count(*) FROM secret WHERE key_number = number) FROM key"
    )
    for key_id, answers, events, destroyed, secrets in rig.rows(query):
        assert (answers, events, secrets) == (1, 1, int(not destroyed)), f"{key_id} is not on record as it should be"


def key_of(csr: str) -> str:
    """The name of the key that a CSR is for, which it is signed with."""
    request = load_pem_x509_csr(csr.encode())
    assert request.is_signature_valid
    public = request.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return key_id_of(public)
