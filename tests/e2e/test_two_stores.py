"""The daemon with two key stores, a TPM and a PKCS#11 token: each serves its own certificate types."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from outside import Event, Josev, Station, generate_csr, run
from peers import Mosquitto, Swtpm
from softhsm import PIN, Token

from stationkey.ledger import Ledger
from stationkey.ledger.lifecycle import KeyState
from stationkey.system.state_dir import DATABASE_NAME
from wire import Wire, WithoutP521

V2G20 = {"certificate_type": "v2g20_certificate", "algorithm": "ECDSA_SHA512"}
V2G = {"certificate_type": "v2g_certificate"}
OF_TOKEN = '[keystore_for]\nv2g20_certificate = "se"\n'


@pytest.fixture
def token(tmp_path: Path) -> Iterator[Token]:
    made = Token.make("two-stores", tmp_path)
    yield made
    made.order()
    made.remove()


@pytest.fixture
def josev(mosquitto: Mosquitto) -> Iterator[Josev]:
    with Josev(mosquitto) as subscribed:
        yield subscribed


def configured(folder: Path, text: str) -> str:
    config = folder / "stationkey.toml"
    config.write_text(f'{text}\n[metrics]\nlisten = "unix:{folder}/metrics"\n')
    return str(config)


def station(folder: Path, broker: Mosquitto, text: str) -> Station:
    return Station(folder, "--broker", broker.url, "--config", configured(folder, text))


def both(tpm: str, token: str) -> str:
    return f'keystore = "{tpm}"\n[keystores]\nse = "{token}"\n{OF_TOKEN}'


def in_stores(station: Station) -> dict[str, str]:
    """The kind of store of each key on record, by the id of its request."""
    with closing(Ledger(station.state_dir / DATABASE_NAME, read_only=True)) as ledger:
        return {key.request_ids[0]: key.scheme for key in ledger.keys.all() if key.request_ids}


def key_of(station: Station, request: Event) -> tuple[str, KeyState]:
    with closing(Ledger(station.state_dir / DATABASE_NAME, read_only=True)) as ledger:
        [key] = [key for key in ledger.keys.all() if request["id"] in key.request_ids]
        return key.key_id, key.state


def installed(station: Station, request: Event) -> Event:
    return {
        "id": str(uuid.uuid4()),
        "name": "certificate_installation_status",
        "type": "update",
        "data": {
            "certificate_type": request["data"]["certificate_type"],
            "status": "installed",
            "private_key_path": f"/keys/{key_of(station, request)[0]}.pem",
        },
    }


def test_beside_a_tpm_without_p521_the_token_serves_v2g20_and_a_key_stays_where_it_was_made(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev, token: Token
) -> None:
    with Wire(swtpm) as wire:
        lacking, tpm = WithoutP521(wire), f"tpm2:{wire.tcti}"
        first = [generate_csr(**V2G), generate_csr(), generate_csr(**V2G20)]
        with station(tmp_path, mosquitto, both(tpm, token.uri)) as serving:
            for request in first:
                assert josev.ask(request).csr
        made = {first[0]["id"]: "tpm2", first[1]["id"]: "tpm2", first[2]["id"]: "pkcs11"}
        assert (in_stores(serving), len(token.objects()), lacking.answers > 0) == (made, 2, True)

        # The stores change places: new keys come from the other one, and the older are proved where they are.
        swapped = f'keystore = "{token.uri}"\n[keystores]\nchip = "{tpm}"\n[keystore_for]\n'
        third = generate_csr(**V2G)
        with station(tmp_path, mosquitto, swapped + 'existing_keys = ["chip"]\n') as serving:
            assert josev.ask(third).csr
            for request in (first[1], first[2]):
                josev.publish(installed(serving, request))
                serving.wait_for("key active", key_id=key_of(serving, request)[0])
        made[third["id"]] = "pkcs11"
        assert (in_stores(serving), len(token.objects())) == (made, 4)
        where = ("--config", str(tmp_path / "stationkey.toml"), "--state-dir", str(serving.state_dir))
        attested = [run("attest", key_of(serving, one)[0], "--nonce", "00" * 16, *where) for one in (first[0], third)]
        assert [(done.returncode, done.reason) for done in attested] == [(0, ""), (1, "attest_no_tpm")]

        # The token is no longer named: its keys are told and left alone, and no other store makes what it made.
        with station(tmp_path, mosquitto, f'keystore = "{tpm}"') as serving:
            serving.wait_for("cannot be used", count=2, reason="keystore_unconfigured")
            josev.publish(installed(serving, third))
            serving.wait_for("ignoring status", reason="keystore_unconfigured")
            assert josev.ask(generate_csr(**V2G20)).data == {"status": "rejected"}
        assert key_of(serving, third)[1] is KeyState.PRE_ACTIVATION
        assert (in_stores(serving), len(token.objects())) == (made, 4)


def test_one_store_serves_while_the_other_is_frozen_hangs_or_is_away(
    tmp_path: Path, mosquitto: Mosquitto, swtpm: Swtpm, josev: Josev, token: Token
) -> None:
    with station(tmp_path, mosquitto, both(swtpm.uri, token.shimmed)) as serving:
        swtpm.freeze()
        frozen = generate_csr(**V2G)
        josev.publish(frozen)
        assert josev.ask(generate_csr(**V2G20)).csr
        assert josev.answers(frozen["id"]) == []
        swtpm.thaw()
        assert josev.wait_for(frozen["id"])[0].csr

        token.order("C_Sign hang")
        hanging = generate_csr(**V2G20)
        josev.publish(hanging)
        assert josev.ask(generate_csr(**V2G)).csr
        assert josev.answers(hanging["id"]) == []
        token.order()
        assert josev.wait_for(hanging["id"])[0].csr

        swtpm.kill()
        assert josev.ask(generate_csr(**V2G)).data == {"status": "rejected"}
        assert josev.ask(generate_csr(**V2G20)).csr
        told = json.loads(run("status", "--json", "--config", str(tmp_path / "stationkey.toml")).stdout)
        assert [store["reachable"] for store in told["health"]["keystores"].values()] == [False, True]
        assert list(told["keystores"]) == ["default", "se"]
        assert serving.stop() == 0

    with station(tmp_path, mosquitto, both(swtpm.uri, token.shimmed)) as serving:  # away from the start
        serving.wait_for("serving degraded")
        assert josev.ask(generate_csr(**V2G20)).csr
        assert josev.ask(generate_csr(**V2G)).data == {"status": "rejected"}
        swtpm.start()
        assert josev.ask(generate_csr(**V2G)).csr
        assert serving.stop() == 0

    swtpm.freeze()
    with station(tmp_path, mosquitto, both(swtpm.uri, token.shimmed)) as serving:
        assert josev.ask(generate_csr(**V2G20)).csr
        swtpm.thaw()
        assert josev.ask(generate_csr(**V2G)).csr
        assert serving.stop() == 0

    (token.directory / "pin").write_text("wrong")  # what no retry helps stops the start of no other store
    with station(tmp_path, mosquitto, both(swtpm.uri, token.shimmed)) as serving:
        serving.wait_for("rejecting requests", reason="pkcs11_pin_wrong", store="se")
        assert josev.ask(generate_csr(**V2G)).csr
        assert josev.ask(generate_csr(**V2G20)).data == {"status": "rejected"}
        (token.directory / "pin").write_text(PIN)
        assert josev.ask(generate_csr(**V2G20)).csr
