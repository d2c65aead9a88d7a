"""Sessions of a broker that means harm, some hundred by seed, and those that once broke something.

``make fuzz`` plays more. A failure prints its seed and the smallest packets that show it, and keeps them in `sessions`.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from hostile_broker import CORPUS, MEMORY, Arena, breaks, storm
from mqtt_grammar import Grammar, Session

from secured import Authority

SESSIONS = 80


@pytest.mark.long
@pytest.mark.parametrize("seed", range(1, 5))
def test_no_session_of_a_hostile_broker_ends_the_daemon_or_fills_it(tmp_path: Path, seed: int) -> None:
    played, grown = storm(seed, tmp_path, sessions=SESSIONS)
    assert played == SESSIONS
    assert grown < MEMORY


@pytest.mark.long
def test_no_session_over_tls_does(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "authority")
    identity = authority.broker()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(identity.certificate, identity.key)
    make: Callable[[Path], Arena] = partial(Arena, tls=context, config=f'[mqtt]\nca_file = "{authority.file}"\n')
    played, _ = storm(5, tmp_path, sessions=SESSIONS // 2, make=make)
    assert played == SESSIONS // 2


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem) for path in sorted(CORPUS.glob("*.json"))])
def test_a_session_that_was_found_once_holds_for_good(path: Path) -> None:
    assert not breaks(Session.decoded(path.read_text()))


def test_a_seed_draws_the_same_sessions_and_they_can_be_written_down() -> None:
    first, again = Grammar(7), Grammar(7)
    for _ in range(50):
        session = first.session()
        assert session == again.session() == Session.decoded(session.encoded())
        assert all(smaller != session for smaller in session.smaller())
