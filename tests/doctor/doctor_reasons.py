"""The reasons of each check, as its code gives them."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from types import FunctionType, ModuleType

from stationkey.doctor.runner import AnyCheck

LEVELS = ("warning", "failure")


def reasons_of(check: AnyCheck) -> dict[str, set[str]]:
    """Return the reasons that a check may give, by level; those of errors, which pass through, are not among them."""
    found: dict[str, set[str]] = {level: set() for level in LEVELS}
    for function in (check.look, check.judge):
        if isinstance(function, FunctionType):
            for level, reason in _given(sys.modules[function.__module__], function.__name__, set()):
                found[level].add(reason)
    return found


def _given(module: ModuleType, name: str, seen: set[str]) -> Iterator[tuple[str, str]]:
    """Yield level and reason of each finding of a function of a module, and of the functions that it names."""
    function = getattr(module, name, None)
    if name in seen or not isinstance(function, FunctionType) or ".doctor." not in function.__module__:
        return
    seen.add(name)
    home = sys.modules[function.__module__]
    for body in ast.parse(inspect.getsource(home)).body:
        for node in ast.walk(body) if isinstance(body, ast.FunctionDef) and body.name == name else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in LEVELS:
                words = [one.value for one in ast.walk(node.args[0]) if isinstance(one, ast.Constant)]
                yield from ((node.func.id, str(word)) for word in words)
            elif isinstance(node, ast.Name):
                yield from _given(home, node.id, seen)
