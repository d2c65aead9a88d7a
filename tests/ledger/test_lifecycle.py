"""The table of a key's life, all of it; and the document that is made from it."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest

from stationkey.config.file import read_table, settle
from stationkey.config.options import options_of
from stationkey.config.settings import DAY, Bounds, Settings, Terms
from stationkey.ledger.lifecycle import (
    CSR_ANSWERED,
    INITIAL,
    MADE_AHEAD,
    TRANSITIONS,
    IllegalTransition,
    KeyEvent,
    KeyState,
    step,
)

DOCUMENT = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text()

LEGAL = [pytest.param(state, event, after, id=f"{state}, {event}") for (state, event), after in TRANSITIONS.items()]
ILLEGAL = [
    pytest.param(state, event, id=f"{state}, {event}")
    for state, event in product(KeyState, KeyEvent)
    if (state, event) not in TRANSITIONS
]


@pytest.mark.parametrize(("state", "event", "after"), LEGAL)
def test_a_step_in_the_table_leads_where_the_table_says(state: KeyState, event: KeyEvent, after: KeyState) -> None:
    assert step(state, event) is after


@pytest.mark.parametrize(("state", "event"), ILLEGAL)
def test_every_other_step_is_refused_in_words(state: KeyState, event: KeyEvent) -> None:
    with pytest.raises(IllegalTransition) as refusal:
        step(state, event)

    assert refusal.value.reason == "illegal_transition"
    assert state in refusal.value.message
    assert event in refusal.value.message


def test_the_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[KeyState.DESTROYED, KeyEvent.INSTALLED] = KeyState.ACTIVE  # type: ignore[index] # that is the point


def test_there_is_no_way_out_of_destroyed() -> None:
    assert not [event for state, event in TRANSITIONS if state is KeyState.DESTROYED]


def test_every_state_can_be_reached() -> None:
    reached = {INITIAL}
    while more := {after for (state, _), after in TRANSITIONS.items() if state in reached} - reached:
        reached |= more

    assert reached == set(KeyState)


@pytest.mark.parametrize("state", [state for state in KeyState if state is not KeyState.DESTROYED])
def test_every_key_can_be_destroyed_by_order(state: KeyState) -> None:
    assert step(state, KeyEvent.DESTRUCTION_ORDERED) is KeyState.DESTROYED


def test_a_key_becomes_active_by_its_certificate_or_by_going_back_to_it() -> None:
    into_active = {key for key, after in TRANSITIONS.items() if after is KeyState.ACTIVE and key[0] is not after}

    assert into_active == {
        (KeyState.PRE_ACTIVATION, KeyEvent.INSTALLED),
        (KeyState.DEACTIVATED, KeyEvent.RESTORED),
    }


def test_a_compromised_key_does_not_end_by_itself() -> None:
    assert (KeyState.COMPROMISED, KeyEvent.EXPIRED) not in TRANSITIONS


@pytest.mark.parametrize("event", list(KeyEvent))
def test_every_event_can_happen_to_some_key(event: KeyEvent) -> None:
    assert any(known is event for _, known in TRANSITIONS)


# The document.


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading, without its own heading."""
    section = DOCUMENT.split(f"## {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def mermaid() -> str:
    """Return the table as a Mermaid state diagram."""
    names = {state: state.name.lower() for state in KeyState}
    lines = ["stateDiagram-v2"]
    lines += [f'    state "{state}" as {names[state]}' for state in KeyState]
    lines.append(f"    [*] --> {names[INITIAL]}: {CSR_ANSWERED}, {MADE_AHEAD}")
    edges: dict[tuple[KeyState, KeyState], list[KeyEvent]] = {}
    for (state, event), after in TRANSITIONS.items():
        edges.setdefault((state, after), []).append(event)
    lines += [f"    {names[a]} --> {names[b]}: {', '.join(events)}" for (a, b), events in edges.items()]
    lines.append(f"    {names[KeyState.DESTROYED]} --> [*]")
    return "\n".join(lines) + "\n"


def test_the_diagram_of_the_document_is_the_table() -> None:
    assert re.findall(r"```mermaid\n(.*?)```", DOCUMENT, re.DOTALL) == [mermaid()]


def test_the_diagram_has_every_step_of_the_table() -> None:
    drawn = {
        (a, event, b)
        for a, b, events in re.findall(r"^    (\w+) --> (\w+): (.*)$", mermaid(), re.MULTILINE)
        for event in events.split(", ")
    }

    assert drawn == {(a.name.lower(), event, b.name.lower()) for (a, event), b in TRANSITIONS.items()}


def test_the_document_explains_every_state_and_every_event() -> None:
    assert [row[0] for row in _rows("States")] == list(KeyState)
    assert [row[0] for row in _rows("What moves a key")] == list(KeyEvent)


def lifecycle(**options: float) -> Terms:
    """What the service gets for a ``[lifecycle]`` in the file."""
    return settle(read_table({"lifecycle": options}, source="here"), keystore="software:").lifecycle


def test_the_document_gives_every_default_as_it_is_and_a_reason() -> None:
    told = {name: (json.loads(value.strip("`")), reason) for name, value, reason in _rows("Bounds")}

    assert set(told) == {option.name for option in options_of(Settings) if option.table == "lifecycle"}
    assert lifecycle(**{name: value for name, (value, _) in told.items()}) == Terms()
    assert all(reason for _, reason in told.values())


def test_a_day_of_the_configuration_is_a_day() -> None:
    terms = lifecycle(
        pending_days=2, failed_days=0.5, grace_days=3, answer_days=4, pending_limit=5, pending_total=6, history_limit=7
    )

    assert terms == Terms(
        pending=2 * DAY,
        failed=DAY // 2,
        grace=3 * DAY,
        answers=4 * DAY,
        bounds=Bounds(pending_limit=5, pending_total=6, history_limit=7),
    )
