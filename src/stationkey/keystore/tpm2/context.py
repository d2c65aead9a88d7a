"""The ESAPI context that all commands go through: it submits a command again while the TPM says "later".

A TPM may answer with a warning instead of doing what it was asked: it is testing itself, its NV memory needs a pause, a
slot is taken for the moment [TPM 2.0 part 2, 6.6.3]. Nothing was done then, and the same command may succeed soon.
tpm2-tss resubmits for three of these codes, five times without a pause. Here each of them is tried again with growing
delays until the deadline of the call.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from tpm2_pytss import ESAPI, TSS2_Exception

from stationkey.keystore.tpm2 import return_codes as rc
from stationkey.system.backoff import Backoff

_FIRST: Final = 0.01
_LIMIT: Final = 1.0


class Context:
    """An ESAPI context with the methods of `ESAPI`.

    Args:
        tcti: name and configuration of a TCTI.
        passing: the return codes after which a command is tried again.
        wait: waits for some seconds; False if there is no time for that.
    """

    def __init__(self, tcti: str, passing: frozenset[int], wait: Callable[[float], bool]) -> None:
        self._esapi = ESAPI(tcti)
        self._passing = passing
        self._wait = wait

    def __getattr__(self, name: str) -> Any:
        return partial(self._submit, getattr(self._esapi, name))

    def _submit(self, command: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Run a command.

        Raises:
            TSS2_Exception: the TPM refused, or said "later" until there was no time left.
        """
        backoff = Backoff(_FIRST, _LIMIT)
        while True:
            try:
                return command(*arguments, **named)
            except TSS2_Exception as error:
                if rc.code(error) not in self._passing or not self._wait(backoff.next()):
                    raise
