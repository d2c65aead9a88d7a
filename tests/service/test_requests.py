"""The service without a broker: software keys and a real ledger. Faults are put in where the ledger or store fails."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import UNSET
from msgspec.structs import replace

from parts import software_key
from stationkey import (
    Algorithm,
    CertificateType,
    GenerateCsrData,
    GenerateCsrRequest,
    GenerateCsrResponse,
    KeyRef,
    KeyStore,
    KeyStoreThread,
    Ledger,
    LedgerError,
    MessageError,
    StationKeyService,
    encode,
    generate_csr,
    rejected,
)
from stationkey.config.settings import PolicyTerms
from stationkey.keystore.software import SoftwareKeyStore
from stationkey.keystore.stores import KeyStores
from stationkey.keystore.worker import on_keystore
from stationkey.ledger.answers import Answers, Crowded
from stationkey.ledger.lifecycle import KeyState
from stationkey.ledger.rejections import Rejections
from stationkey.service import rejections as rejections_module
from stationkey.service import requests
from stationkey.service.policy import Policy
from stationkey.x509.csr import Csr, sign_csr

ECDSA_WITH_SHA256 = bytes.fromhex("300a06082a8648ce3d040302")
"""AlgorithmIdentifier [RFC 5758 3.2]."""
DATA = GenerateCsrData(
    certificate_type=CertificateType.CHARGING_STATION_CERTIFICATE,
    common_name="9783161484100",
    organization_name="EcoG",
    country_name="DE",
)


class Store(SoftwareKeyStore):
    """A software key store that counts its keys, and can be made to hang or to fail."""

    def __init__(self) -> None:
        self.made = 0
        self.go_on = threading.Event()
        self.go_on.set()
        self.fault: Exception | None = None

    def generate(self, algorithm: Algorithm) -> KeyRef:
        self.go_on.wait()
        if self.fault is not None:
            raise self.fault
        self.made += 1
        return super().generate(algorithm)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def keystore(store: Store) -> Iterator[KeyStoreThread]:
    def open_store() -> KeyStore:
        return store

    thread = KeyStoreThread(open_store)
    yield thread
    store.go_on.set()
    assert thread.close()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with closing(Ledger(tmp_path / "ledger.sqlite3")) as opened:
        yield opened


@pytest.fixture
def keystores(keystore: KeyStoreThread) -> KeyStores:
    return KeyStores.only("software:", keystore)


@pytest.fixture
async def answering(keystores: KeyStores, ledger: Ledger) -> AsyncIterator[StationKeyService]:
    async with aclosing(StationKeyService(keystores, ledger, clock=lambda: 1_700_000_000.5)) as opened:
        yield opened


@pytest.fixture
async def impatient(keystores: KeyStores, ledger: Ledger) -> AsyncIterator[StationKeyService]:
    """A service whose requests are overdue at once where the store hangs."""
    async with aclosing(StationKeyService(keystores, ledger, deadline=0.05, rsa_deadline=0.05)) as opened:
        yield opened


def request(request_id: str | None = None, data: GenerateCsrData = DATA) -> GenerateCsrRequest:
    return generate_csr(request_id or str(uuid.uuid4()), data)


def csr_of(response: GenerateCsrResponse) -> str:
    assert response.data.status == "accepted"
    assert isinstance(response.data.csr, str)
    return response.data.csr


def rejections(tmp_path: Path) -> list[tuple[str, str, str]]:
    """What the ledger says of refused requests: id, reason, words."""
    with closing(sqlite3.connect(tmp_path / "ledger.sqlite3")) as database:
        return list(database.execute("SELECT request_id, reason, message FROM rejection ORDER BY seq"))


async def test_an_answer_carries_the_id_and_a_csr_for_the_key_on_record(
    answering: StationKeyService, ledger: Ledger
) -> None:
    asked = request(str(uuid.uuid4()).upper())
    response = await answering.answer(asked)
    assert response.id == asked.id
    assert x509.load_pem_x509_csr(csr_of(response).encode()).is_signature_valid
    [key] = ledger.keys.all()
    assert (key.request_ids, key.created_at) == ((asked.id,), 1_700_000_000_500)
    assert answering.counters.outcomes() == {"accepted": 1}


async def test_the_same_request_again_gets_the_same_csr_under_the_id_as_it_came(
    answering: StationKeyService, store: Store
) -> None:
    asked = request()
    first = await answering.answer(asked)
    again = await answering.answer(request(asked.id.upper()))
    assert again.id == asked.id.upper()
    assert csr_of(again) == csr_of(first)
    assert store.made == 1
    assert answering.counters.outcomes() == {"accepted": 1, "repeated": 1}


async def test_naming_the_default_algorithm_is_the_same_content(answering: StationKeyService) -> None:
    asked = request()
    first = await answering.answer(asked)
    named = GenerateCsrData(
        certificate_type=DATA.certificate_type,
        common_name=DATA.common_name,
        organization_name=DATA.organization_name,
        country_name=DATA.country_name,
        algorithm=Algorithm.ECDSA_SHA256,
    )
    assert csr_of(await answering.answer(request(asked.id, named))) == csr_of(first)


async def test_the_same_id_with_other_content_is_rejected_and_recorded(
    answering: StationKeyService, store: Store, tmp_path: Path
) -> None:
    asked = request()
    await answering.answer(asked)
    other = GenerateCsrData(
        certificate_type=DATA.certificate_type,
        common_name="another",
        organization_name=DATA.organization_name,
        country_name=DATA.country_name,
    )
    response = await answering.answer(request(asked.id, other))
    assert (response.id, response.data.status, response.data.csr) == (asked.id, "rejected", UNSET)
    await answering.aclose()
    assert rejections(tmp_path) == [(asked.id, "id_reused", "the id was used before, with other content")]
    assert store.made == 1


async def test_the_same_request_many_times_at_once_makes_one_key(answering: StationKeyService, store: Store) -> None:
    store.go_on.clear()
    asked = request()
    spellings = [asked.id, asked.id.upper()]
    answers = [asyncio.create_task(answering.answer(request(spellings[turn % 2]))) for turn in range(20)]
    await asyncio.sleep(0)  # each of them has begun
    store.go_on.set()
    responses = await asyncio.gather(*answers)
    assert len({csr_of(response) for response in responses}) == 1
    assert store.made == 1


async def test_an_id_in_hand_with_other_content_is_rejected_at_once_and_one_on_record_repeated(
    answering: StationKeyService, store: Store
) -> None:
    """While the key store is busy: whoever says one id over and over keeps nobody waiting."""
    known, asked = request(), request()
    first = csr_of(await answering.answer(known))
    store.go_on.clear()
    busy = asyncio.create_task(answering.answer(asked))
    await asyncio.sleep(0)  # it has begun

    other = await answering.answer(request(asked.id.upper(), replace(DATA, common_name="another")))
    assert other.data.status == "rejected"
    assert csr_of(await answering.answer(known)) == first
    store.go_on.set()
    assert csr_of(await busy)
    assert answering.counters.outcomes() == {"accepted": 2, "id_reused": 1, "repeated": 1}


async def test_different_requests_at_once_get_a_key_each(answering: StationKeyService, store: Store) -> None:
    responses = await asyncio.gather(*(answering.answer(request()) for _ in range(20)))
    assert len({csr_of(response) for response in responses}) == 20
    assert store.made == 20


async def test_an_answer_is_on_record_when_it_is_given(
    answering: StationKeyService, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded: list[str] = []
    record_answer = Answers.record

    def record(own: Answers, asked: GenerateCsrRequest, key: KeyRef, csr: str, **terms: Any) -> list[Crowded]:
        crowded = record_answer(own, asked, key, csr, **terms)
        recorded.append(csr)
        return crowded

    monkeypatch.setattr(Answers, "record", record)
    response = await answering.answer(request())
    assert recorded == [csr_of(response)]


async def test_a_ledger_that_cannot_write_costs_the_request_and_leaves_no_key(
    answering: StationKeyService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object, **__: object) -> None:
        raise LedgerError("the ledger cannot be written: database or disk is full", reason="disk_full")

    asked = request()
    with monkeypatch.context() as fault:
        fault.setattr(Answers, "record", full)
        response = await answering.answer(asked)
    assert response.data.status == "rejected"
    assert ledger.keys.all() == []
    assert ledger.answers.find(asked.id) is None
    assert answering.counters.outcomes() == {"disk_full": 1}
    assert {record.levelno for record in caplog.records} == {logging.ERROR}
    assert {vars(record)["request_id"] for record in caplog.records} == {asked.id}
    assert csr_of(await answering.answer(asked))  # there is room again


async def test_a_store_that_hangs_costs_the_request_at_its_deadline_and_leaves_no_key(
    impatient: StationKeyService, store: Store, ledger: Ledger, tmp_path: Path
) -> None:
    store.go_on.clear()
    asked = request()
    assert (await impatient.answer(asked)).data.status == "rejected"
    store.go_on.set()
    await impatient.aclose()
    [(request_id, reason, _)] = rejections(tmp_path)
    assert (request_id, reason) == (asked.id, "keystore_timeout")
    assert ledger.keys.all() == []


async def test_a_refusal_is_not_for_ever(answering: StationKeyService, store: Store) -> None:
    asked = request()
    store.fault = LedgerError("a passing fault", reason="passing")
    assert (await answering.answer(asked)).data.status == "rejected"
    store.fault = None
    assert csr_of(await answering.answer(asked))


async def test_a_fault_of_ours_is_a_rejection_too(
    answering: StationKeyService, store: Store, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    asked = request()
    store.fault = ZeroDivisionError("of ours")
    assert (await answering.answer(asked)).data.status == "rejected"
    await answering.aclose()
    assert [reason for _, reason, _ in rejections(tmp_path)] == ["internal_error"]
    [traceback] = [record for record in caplog.records if record.exc_info]
    assert vars(traceback)["request_id"] == asked.id


def other_signature(csr: Csr) -> Csr:
    """The CSR with the signature that the same key made of other data: what a TPM would give that computes wrongly."""
    signature = software_key().sign(b"other data", ec.ECDSA(hashes.SHA256()))
    der = csr.public_bytes(serialization.Encoding.DER)
    request_info = csr.tbs_certrequest_bytes
    algorithm = der[der.index(request_info) + len(request_info) :][: len(ECDSA_WITH_SHA256)]
    body = request_info + algorithm + bytes([0x03, len(signature) + 1, 0]) + signature
    return x509.load_der_x509_csr(b"\x30\x82" + len(body).to_bytes(2, "big") + body)


async def test_a_csr_that_does_not_verify_is_rejected_and_its_key_destroyed(
    answering: StationKeyService, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is written down while it is verified, and taken back; the same id may be asked again."""
    asked = request()
    with monkeypatch.context() as fault:
        fault.setattr(requests, "sign_csr", lambda *arguments: other_signature(sign_csr(*arguments)))
        assert (await answering.answer(asked)).data.status == "rejected"
    assert [key.state for key in ledger.keys.all("")] == [KeyState.DESTROYED]
    assert ledger.answers.undelivered() == []
    assert ledger.answers.find(asked.id) is None
    assert csr_of(await answering.answer(asked))
    await answering.aclose()
    assert [(request_id, reason) for request_id, reason, _ in rejections(tmp_path)] == [(asked.id, "signature_invalid")]


async def test_a_csr_on_record_that_does_not_verify_is_never_handed_out(
    keystores: KeyStores, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As a loss of power between the writing and the withdrawal would leave it, or a damaged disk."""
    wrong, unreadable = request(), request()
    async with aclosing(StationKeyService(keystores, ledger)) as answering:
        with monkeypatch.context() as fault:
            fault.setattr(requests, "check_signature", lambda _: None)
            fault.setattr(requests, "sign_csr", lambda *arguments: other_signature(sign_csr(*arguments)))
            await answering.answer(wrong)
            fault.setattr(requests, "to_pem", lambda _: "no CSR")
            await answering.answer(unreadable)
        good = await answering.answer(request())
        assert (await answering.answer(wrong)).data.status == "rejected"
        assert (await answering.answer(unreadable)).data.status == "rejected"
        assert answering.counters.outcomes()["signature_invalid"] == 2
    async with aclosing(StationKeyService(keystores, ledger)) as answering:
        assert await answering.undelivered() == [("", good)]
        assert csr_of(await answering.answer(wrong)) != ""
    assert {vars(record).get("reason") for record in caplog.records if record.levelno == logging.ERROR} == {
        "signature_invalid"
    }


async def test_a_wrong_message_is_rejected_logged_and_recorded(
    answering: StationKeyService, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request_id = str(uuid.uuid4())
    error = MessageError("country_name is wrong", reason="country_name_invalid", request_id=request_id)
    response = await answering.reject(request_id, error)
    assert (response.id, response.data.status) == (request_id, "rejected")
    await answering.aclose()
    assert rejections(tmp_path) == [(request_id, "country_name_invalid", "country_name is wrong")]
    [record] = caplog.records
    assert (record.levelno, vars(record)["request_id"]) == (logging.WARNING, request_id)


async def test_a_message_without_an_id_is_logged_and_counted(
    answering: StationKeyService, caplog: pytest.LogCaptureFixture
) -> None:
    answering.pass_over(MessageError("not JSON", reason="not_json"))
    assert answering.counters.outcomes() == {"not_json": 1}
    assert [record.getMessage() for record in caplog.records] == ["cannot be answered: not JSON"]


async def test_an_answer_is_undelivered_until_it_is_said_to_be_delivered(
    answering: StationKeyService, keystores: KeyStores, ledger: Ledger, tmp_path: Path
) -> None:
    sent, unsent = await answering.answer(request()), await answering.answer(request())
    refused = await answering.reject(str(uuid.uuid4()), MessageError("wrong", reason="wrong"))
    assert await answering.undelivered() == [("", sent), ("", unsent)]
    await answering.delivered(sent)
    await answering.delivered(refused)
    await answering.aclose()
    ledger.close()
    async with AsyncExitStack() as stack:
        reopened = stack.enter_context(closing(Ledger(tmp_path / "ledger.sqlite3")))
        later = await stack.enter_async_context(aclosing(StationKeyService(keystores, reopened)))
        assert await later.undelivered() == [("", unsent)]


async def test_an_id_of_an_earlier_run_is_known_before_and_after_the_ids_were_learnt(
    keystores: KeyStores, ledger: Ledger, store: Store
) -> None:
    asked = request()
    async with aclosing(StationKeyService(keystores, ledger)) as earlier:
        first = csr_of(await earlier.answer(asked))
    async with aclosing(StationKeyService(keystores, ledger)) as later:
        assert csr_of(await later.answer(asked)) == first
        await later.learn_ids()
        assert csr_of(await later.answer(request(asked.id.upper()))) == first
        assert csr_of(await later.answer(request())) != first
    assert store.made == 2


PROFILE_WARNINGS = [
    pytest.param("v2g_certificate", "STATION42", None, ["the common name is not a SECC ID"], id="no-secc-id"),
    pytest.param("v2g_certificate", "DEABCS1", "RSA_SHA256", ["the profile of this certificate type wants"], id="rsa"),
    pytest.param("v2g_certificate", "DEABCS1", None, [], id="by-the-profile"),
    pytest.param("charging_station_certificate", "STATION42", None, [], id="csms-certificate"),
]


@pytest.mark.parametrize(("certificate_type", "common_name", "algorithm", "warnings"), PROFILE_WARNINGS)
async def test_what_the_profile_would_have_otherwise_is_served_with_a_warning(
    answering: StationKeyService,
    caplog: pytest.LogCaptureFixture,
    certificate_type: str,
    common_name: str,
    algorithm: str | None,
    warnings: list[str],
) -> None:
    asked = request(
        data=GenerateCsrData(
            certificate_type=CertificateType(certificate_type),
            common_name=common_name,
            organization_name="EcoG",
            country_name="DE",
            algorithm=UNSET if algorithm is None else Algorithm(algorithm),
        )
    )
    assert csr_of(await answering.answer(asked))
    warned = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == len(warnings)
    for record, words in zip(warned, warnings, strict=True):
        assert record.getMessage().startswith(words)
        assert vars(record)["request_id"] == asked.id


# The policy.


class Clock:
    """Nanoseconds that a test lets go by."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def strict(keystores: KeyStores, ledger: Ledger, clock: Clock) -> AsyncIterator[StationKeyService]:
    """A service that serves one organisation, twice at once and then once a minute."""
    terms = PolicyTerms(organization_names=("EcoG",), requests_per_minute=1, burst=2)
    async with aclosing(StationKeyService(keystores, ledger, policy=Policy(terms, clock=clock))) as opened:
        yield opened


def by_mallory(request_id: str | None = None) -> GenerateCsrRequest:
    return request(request_id, replace(DATA, organization_name="Mallory"))


async def test_what_the_policy_refuses_is_rejected_and_nothing_else_and_named_in_log_counts_and_ledger(
    strict: StationKeyService, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = by_mallory()
    response = await strict.answer(asked)
    await strict.aclose()

    assert encode(response) == encode(rejected(asked.id))
    assert strict.counters.outcomes() == {"policy_organization": 1}
    [(request_id, reason, message)] = rejections(tmp_path)
    assert (request_id, reason) == (asked.id, "policy_organization")
    assert '"Mallory" is not among the organization_names that are served' in message
    [record] = caplog.records
    assert (record.levelno, vars(record)["reason"]) == (logging.WARNING, "policy_organization")
    assert vars(record)["request_id"] == asked.id
    assert store.made == 0


async def test_a_refused_id_is_served_once_the_allowance_has_grown(strict: StationKeyService, clock: Clock) -> None:
    for _ in range(2):
        assert csr_of(await strict.answer(request()))
    asked = request()
    assert (await strict.answer(asked)).data.status == "rejected"
    assert (await strict.answer(asked)).data.status == "rejected"
    clock.now += 60 * 10**9
    first = csr_of(await strict.answer(asked))
    assert csr_of(await strict.answer(request(asked.id.upper()))) == first
    assert strict.counters.outcomes() == {"accepted": 3, "rate_limited": 2, "repeated": 1}


async def test_neither_a_repeat_nor_what_is_refused_costs_any_of_the_allowance(strict: StationKeyService) -> None:
    asked = request()
    first = csr_of(await strict.answer(asked))
    for _ in range(5):
        assert csr_of(await strict.answer(request(asked.id.upper()))) == first
        assert (await strict.answer(by_mallory(asked.id))).data.status == "rejected"  # the id of another request
        assert (await strict.answer(by_mallory())).data.status == "rejected"
    assert csr_of(await strict.answer(request()))
    assert strict.counters.outcomes() == {"accepted": 2, "repeated": 5, "id_reused": 5, "policy_organization": 5}


async def test_the_same_request_many_times_at_once_costs_one_token(strict: StationKeyService, store: Store) -> None:
    store.go_on.clear()
    asked = request()
    answers = [asyncio.create_task(strict.answer(request(asked.id))) for _ in range(10)]
    await asyncio.sleep(0)  # each of them has begun
    store.go_on.set()
    await asyncio.gather(*answers)
    assert csr_of(await strict.answer(request()))
    assert (await strict.answer(request())).data.status == "rejected"


async def test_what_was_answered_is_repeated_although_the_policy_would_refuse_it_now(
    keystores: KeyStores, ledger: Ledger
) -> None:
    asked = request()
    async with aclosing(StationKeyService(keystores, ledger)) as before:
        first = csr_of(await before.answer(asked))
    nothing = Policy(PolicyTerms(certificate_types=()))
    async with aclosing(StationKeyService(keystores, ledger, policy=nothing)) as after:
        assert csr_of(await after.answer(asked)) == first
        assert (await after.answer(request())).data.status == "rejected"


async def test_time_spent_waiting_counts_against_the_deadline(answering: StationKeyService, store: Store) -> None:
    """At the edge, for the answer to the same id, for the key store: there is one deadline for it all."""
    assert (await answering.answer(request(), waited=requests.DEADLINE + 1)).data.status == "rejected"
    assert csr_of(await answering.answer(request(), waited=1.0))
    assert answering.counters.outcomes() == {"keystore_timeout": 1, "accepted": 1}
    assert store.made == 1


async def test_the_second_of_two_with_one_id_has_no_more_time_than_the_first(
    keystores: KeyStores, ledger: Ledger, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for the first in its own time, of which most is over when it comes."""
    left: list[float] = []

    async def note(*arguments: Any, timeout: float, **keywords: Any) -> Any:
        left.append(timeout)
        return await on_keystore(*arguments, timeout=timeout, **keywords)

    monkeypatch.setattr(requests, "on_keystore", note)
    store.go_on.clear()
    asked = request()
    async with aclosing(StationKeyService(keystores, ledger, deadline=0.3)) as service:
        answers = await asyncio.gather(service.answer(asked), service.answer(asked, waited=0.25))
    assert [answer.data.status for answer in answers] == ["rejected", "rejected"]
    first, second = left
    assert first > 0 >= second  # the first took all of it


# What is refused, put on record.


async def test_a_rejection_is_on_record_soon_and_nobody_waits_for_it(
    answering: StationKeyService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = asyncio.Event()
    loop = asyncio.get_running_loop()
    write = Rejections.write

    def note(own: Rejections) -> bool:
        more = write(own)
        loop.call_soon_threadsafe(written.set)
        return more

    due = asyncio.Semaphore(0)
    clock = SimpleNamespace(sleep=lambda _: due.acquire(), create_task=asyncio.create_task)
    monkeypatch.setattr(Rejections, "write", note)
    monkeypatch.setattr(rejections_module, "asyncio", clock)
    for reason in ("one", "two"):
        await answering.reject(str(uuid.uuid4()), MessageError("wrong", reason=reason))
    assert rejections(tmp_path) == []
    due.release()
    await asyncio.wait_for(written.wait(), 30)
    assert [reason for _, reason, _ in rejections(tmp_path)] == ["one", "two"]
    await answering.reject(str(uuid.uuid4()), MessageError("wrong", reason="three"))
    written.clear()
    due.release()
    await asyncio.wait_for(written.wait(), 30)
    assert [reason for _, reason, _ in rejections(tmp_path)] == ["one", "two", "three"]


async def test_a_rejection_that_cannot_be_written_is_told_and_written_when_it_can(
    answering: StationKeyService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_: Rejections) -> bool:
        raise LedgerError("the ledger cannot be written: database or disk is full", reason="disk_full")

    monkeypatch.setattr(rejections_module, "RECORD_WITHIN", 0.0)
    with monkeypatch.context() as fault:
        fault.setattr(Rejections, "write", full)
        await answering.reject(str(uuid.uuid4()), MessageError("wrong", reason="one"))
        recording = answering._rejections._recording  # noqa: SLF001 - the task that nobody waits for
        assert recording is not None
        await recording
    assert "rejections not recorded yet" in caplog.text
    assert csr_of(await answering.answer(request()))
    await answering.aclose()
    assert [reason for _, reason, _ in rejections(tmp_path)] == ["one"]


async def test_a_flood_of_rejections_is_counted_whole_and_recorded_in_part(
    keystores: KeyStores, ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejections_module, "MAX_REJECTIONS", 50)
    async with aclosing(StationKeyService(keystores, ledger)) as flooded:
        for _ in range(500):
            await flooded.reject(str(uuid.uuid4()), MessageError("wrong", reason="wrong"))
        assert flooded.counters.outcomes() == {"wrong": 500}
    assert 50 <= len(rejections(tmp_path)) < 100
