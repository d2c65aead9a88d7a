"""Whether the daemon can read a file that the configuration names, and nobody else can replace it."""

from __future__ import annotations

from stationkey.doctor.host.files import READ, Facts, Kind, User
from stationkey.doctor.report import Finding, failure, hidden


def judge_access(where: str, facts: Facts, user: User, *, kind: Kind = "file", wanted: int = READ) -> Finding | None:
    """Judge what there is at a path that is named.

    Args:
        where: what names it, such as an option.
        facts: of the path, links followed.
        user: the daemon's.
        kind: what it should be.
        wanted: what the daemon does with it.

    Returns:
        What is wrong, or None.
    """
    path = facts.path
    if facts.kind == "unseen":
        return hidden(path)
    if facts.kind != kind:
        what = "is missing" if facts.kind == "missing" else f"is not a {kind}"
        return failure("missing", f"{where}: {path} {what}", "put it there, or correct the path")
    if (barred := facts.barred(user, wanted)) is not None:
        advice = f"chgrp {user.gid} {path} && chmod g+r {path}"
        if barred != path or kind == "directory":
            advice = f"give it the right: setfacl -m u:{user.name}:rx {barred}; or move it, and correct the path"
        return failure("unreadable", f"{where}: the daemon's user {user.name} may not read {barred}", advice)
    if facts.replaceable is not None:
        told = f"{where}: every user may replace {path}"
        return failure("replaceable", told, f"chmod o-w {facts.replaceable}, and see that the right one is there")
    return None
