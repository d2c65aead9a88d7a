from __future__ import annotations

import pytest

from stationkey.system.addresses import is_loopback


@pytest.mark.parametrize(
    "host", ["localhost", "LocalHost", "127.0.0.1", "127.9.9.9", "::1", "::1%lo", "::ffff:127.0.0.1"]
)
def test_a_loopback_address_and_localhost_are_this_machine(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host", ["", "192.0.2.1", "::", "0.0.0.0", "::ffff:192.0.2.1", "localhost.example", "127.0.0.1.example", "127.1"]
)
def test_what_another_machine_may_have_is_not(host: str) -> None:
    assert not is_loopback(host)
