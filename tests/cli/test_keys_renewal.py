"""``stationkey keys list`` and ``keys show`` say which certificates are due for renewal."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from reasons import command

from parts import E1, V2G, Authority, Clocks, pem, station

START = datetime.now(UTC)


async def installed(folder: Path, *, begins: datetime, ends: datetime) -> str:
    """Leave a ledger with a pending key and one whose certificate is installed; the id of that."""
    certificates = folder / "certificates"
    certificates.mkdir()
    clocks = Clocks(wall=START.timestamp())
    async with station(folder / "state", certificate_dir=certificates, clocks=clocks) as opened:
        leaf = AUTHORITY.sign(await opened.csr(V2G, E1), begins=begins, ends=ends)
        (certificates / "leaf.pem").write_bytes(pem(leaf, AUTHORITY.sub))
        await opened.told("installed", V2G, E1)
        await opened.csr(V2G, E1)
        (active,) = opened.ledger.keys.active(str(V2G), E1)
    return active.key_id


AUTHORITY = Authority()


@pytest.mark.parametrize(
    ("begins", "ends", "config", "due"),
    [
        pytest.param(-10, 350, "", "no", id="a-long-time-left"),
        pytest.param(-340, 25, "", "due", id="less-than-30-days-left"),
        pytest.param(-10, 25, "", "no", id="25-days-left-of-35"),
        pytest.param(-10, 25, "life_divisor = 1", "due", id="configured"),
        pytest.param(-340, 25, "before_days = 20", "no", id="configured-days"),
        pytest.param(-340, -1, "", "expired", id="expired"),
        pytest.param(400, 800, "", "unknown", id="clock-not-set"),
    ],
)
async def test_the_list_says_what_is_due(tmp_path: Path, begins: int, ends: int, config: str, due: str) -> None:
    key_id = await installed(tmp_path, begins=START + timedelta(days=begins), ends=START + timedelta(days=ends))
    (tmp_path / "stationkey.toml").write_text(f"[renewal]\n{config}\n")
    options = ("--state-dir", str(tmp_path / "state"), "--config", str(tmp_path / "stationkey.toml"))
    listed = json.loads(command("keys", "list", "--json", *options).stdout)
    assert [key["renewal_due"] for key in listed] == [due, None]
    assert json.loads(command("keys", "show", key_id, "--json", *options).stdout)["renewal_due"] == due
    (line,) = [line for line in command("keys", "list", *options).stdout.splitlines() if line.startswith(key_id[:10])]
    assert line.endswith(f", {due}") is (due in {"due", "expired"})
