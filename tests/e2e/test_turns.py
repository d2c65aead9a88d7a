"""Who waits for the TPM, and for whom: short jobs go first, and what needs no TPM does not wait for it.

The TPM is frozen while the messages come, so that the order is certain however quick the machine is.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from outside import Event, Josev, Station, generate_csr
from peers import Mosquitto, Swtpm

from stationkey.ledger import KeyRecord, Ledger
from stationkey.system.state_dir import DATABASE_NAME

REJECTED = {"status": "rejected"}
WITHOUT_POOL = "[pool]\nrsa = 0\n"


@pytest.fixture
def josev(mosquitto: Mosquitto) -> Iterator[Josev]:
    with Josev(mosquitto) as subscribed:
        yield subscribed


def station(folder: Path, broker: Mosquitto, tpm: Swtpm, configuration: str) -> Station:
    """A daemon, not started yet."""
    config = folder / "stationkey.toml"
    config.write_text(configuration)
    return Station(folder, "--broker", broker.url, "--keystore", tpm.uri, "--config", str(config))


def rsa_requests(count: int) -> list[Event]:
    return [generate_csr(algorithm="RSA_SHA256") for _ in range(count)]


def status(verb: str, evse_id: str) -> Event:
    return {
        "id": str(uuid.uuid4()),
        "name": "certificate_installation_status",
        "type": "update",
        "data": {"certificate_type": "charging_station_certificate", "status": verb, "evse_id": evse_id},
    }


def key_for(station: Station, request: Event) -> KeyRecord:
    """The key on record that a request was answered with."""
    with closing(Ledger(station.state_dir / DATABASE_NAME, read_only=True)) as ledger:
        [key] = [key for key in ledger.keys.all("") if request["id"] in key.request_ids]
        return key


def events_of(station: Station, key: KeyRecord) -> list[str]:
    with closing(Ledger(station.state_dir / DATABASE_NAME, read_only=True)) as ledger:
        return [event.event for event in ledger.keys.history(key.key_id)]


def test_an_ec_request_waits_for_one_rsa_key_at_the_most(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    """Of the RSA requests that came before it, one is with the TPM; the others give way."""
    served, ec, rsa = generate_csr(), generate_csr(), rsa_requests(4)
    with station(tmp_path, mosquitto, swtpm, WITHOUT_POOL):
        josev.ask(served)
        swtpm.freeze()
        josev.publish(*rsa, ec)
        josev.ask(served)  # sent after the others and needs no TPM, so that they are in hand
        swtpm.thaw()
        answers = josev.wait_for(count=2 + len(rsa) + 1)
    order = [answer.id for answer in answers if answer.id != served["id"]]
    assert order == [rsa[0]["id"], ec["id"], *(request["id"] for request in rsa[1:])]
    assert all(answer.csr for answer in answers)


def test_what_needs_no_tpm_is_answered_while_it_makes_an_rsa_key(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    served, [rsa] = generate_csr(), rsa_requests(1)
    reused = generate_csr(served["id"], common_name="another")
    wrong = generate_csr(country_name="GER")
    with station(tmp_path, mosquitto, swtpm, WITHOUT_POOL) as here:
        first = josev.ask(served)
        swtpm.freeze()
        josev.publish(rsa)
        assert josev.ask(wrong).data == REJECTED
        assert josev.ask(served).csr == first.csr
        assert josev.ask(reused).data == REJECTED
        assert josev.answers(rsa["id"]) == []
        swtpm.thaw()
        assert josev.wait_for(rsa["id"])[0].csr
        assert here.stop() == 0


def test_statuses_that_need_no_tpm_take_effect_while_it_makes_an_rsa_key(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    failing, deleted = generate_csr(evse_id="DE*ABC*E1"), generate_csr(evse_id="DE*ABC*E2")
    [rsa] = rsa_requests(1)
    with station(tmp_path, mosquitto, swtpm, WITHOUT_POOL) as here:
        josev.ask(failing)
        josev.ask(deleted)
        installed = status("installed", "DE*ABC*E2")
        josev.publish(installed)
        here.wait_for("key active", message_id=installed["id"])
        swtpm.freeze()
        failure, deletion = status("failed_installation", "DE*ABC*E1"), status("deleted", "DE*ABC*E2")
        josev.publish(rsa, failure, deletion)
        here.wait_for("installation failed", message_id=failure["id"])
        here.wait_for("key destroyed", message_id=deletion["id"])
        assert events_of(here, key_for(here, failing)) == ["CSR answered", "installation failed"]
        assert events_of(here, key_for(here, deleted)) == ["CSR answered", "installed", "deleted"]
        after = status("deleted", "DE*ABC*E3")  # statuses are dealt with in order, files included
        josev.publish(after)
        here.wait_for(message_id=after["id"])
        assert not list((here.state_dir / "active").glob("*.pem"))
        assert josev.answers(rsa["id"]) == []
        swtpm.thaw()
        assert josev.wait_for(rsa["id"])[0].csr


def test_each_request_in_a_queue_before_a_tpm_that_hangs_is_rejected_at_its_deadline(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    served, rsa, ec = generate_csr(), rsa_requests(3), [generate_csr() for _ in range(3)]
    with station(tmp_path, mosquitto, swtpm, WITHOUT_POOL + "[deadlines]\nec = 1\nrsa = 2\n") as here:
        josev.ask(served)
        swtpm.freeze()
        josev.publish(*ec, *rsa)  # an EC key in hand: the TPM finishes it as soon as it goes on
        answers = josev.wait_for(count=1 + len(rsa) + len(ec))[1:]
        assert {answer.id for answer in answers} == {request["id"] for request in [*rsa, *ec]}
        for answer in answers:
            assert answer.data == REJECTED
            assert here.wait_for("rejected", request_id=answer.id)[0]["reason"] == "keystore_timeout"
        swtpm.thaw()
        assert josev.ask(generate_csr()).csr
        with closing(Ledger(here.state_dir / DATABASE_NAME, read_only=True)) as ledger:
            assert len(ledger.keys.all()) == 2  # nothing was kept of what came too late


def test_the_first_rsa_request_is_answered_with_a_key_made_ahead(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    with station(tmp_path, mosquitto, swtpm, "[pool]\nrsa = 1\nidle_seconds = 0.05\n") as here:
        here.wait_for("pool full")
        [rsa] = rsa_requests(1)
        assert josev.ask(rsa).csr
        key = key_for(here, rsa)
        assert events_of(here, key) == ["made ahead", "CSR answered"]
        here.wait_for("pool full", count=2)  # and there is another


def test_a_key_that_is_being_made_ahead_keeps_nothing_waiting_that_needs_no_tpm(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev
) -> None:
    """It is made again and again, the TPM frozen at whatever moment of it."""
    served, ec = generate_csr(), generate_csr()
    with station(tmp_path, mosquitto, swtpm, "[pool]\nrsa = 16\nidle_seconds = 0\n") as here:
        first = josev.ask(served)
        here.wait_for(ready=1)
        swtpm.freeze()
        josev.publish(ec)
        assert josev.ask(served).csr == first.csr
        assert josev.answers(ec["id"]) == []
        swtpm.thaw()
        assert josev.wait_for(ec["id"])[0].csr
