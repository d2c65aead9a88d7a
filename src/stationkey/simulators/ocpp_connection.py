"""One OCPP-J connection [OCPP-J 4]: calls, results and errors over a WebSocket, for either side of it.

The ``ocpp`` library parses and writes the frames, and its official schemas validate every payload in both directions.
Its ``ChargePoint`` is not used: in 2.1 it does not answer unknown calls, and it converts payloads to dataclasses and
back.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, NamedTuple

from ocpp import messages  # type: ignore[import-untyped]  # ships no type information
from ocpp.exceptions import OCPPError  # type: ignore[import-untyped]  # ships no type information
from websockets.asyncio.client import ClientConnection
from websockets.asyncio.connection import Connection
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.frames import DATA_OPCODES, CloseCode, Frame
from websockets.protocol import Event

from stationkey.errors import Fault, StationKeyError
from stationkey.simulators.ocpp import OcppVersion, Payload, PayloadInvalid, UnknownAction, validate

log = logging.getLogger(__name__)


class Answered(NamedTuple):
    """The payload of a result, and a task to run after it was sent; cancelled when the connection is closed."""

    payload: Payload
    after: Callable[[], Awaitable[None]]


Answer = Callable[[str, Payload], Awaitable[Payload | Answered]]
"""Answers a call: action and payload in, payload of the result out. May raise `CallError` or `PayloadInvalid`."""

Invalid = Callable[[str, Payload, PayloadInvalid], Awaitable[None]]
"""Called with action, payload, and the error of an invalid call."""

MAX_FRAGMENTS: Final = 1024
"""Fragments of one message; a message of OCPP has a few, or is whole."""

MAX_UNREAD: Final = 1024 * 1024
"""Bytes that may wait for the peer to read; pings are answered whether it reads or not."""
MAX_ANSWERING: Final = 64
"""Unanswered calls of the peer; OCPP-J allows one [OCPP-J 4.1.1]."""

CALL_TIMEOUT: Final = 30.0
"""Seconds to wait for the answer to a call."""


class CallError(StationKeyError):
    """A call was answered with a CALLERROR [OCPP-J 4.2.3], by the peer or by us.

    Args:
        code: such as ``NotImplemented``, ``FormationViolation`` or ``InternalError``.
        description: in words.
    """

    fault = Fault.REQUEST

    def __init__(self, code: str, description: str = "") -> None:
        super().__init__(f"{code}: {description}" if description else code, reason="ocpp_call_error")
        self.code = code
        self.description = description


class NotAnswered(StationKeyError):
    """A call got no answer: the connection is closed, or the peer does not answer."""

    fault = Fault.REQUEST


class Bounded(Connection):
    """A WebSocket with bounds that the library lacks.

    A message may have too many fragments (`max_size` does not count empty ones), and a peer may ping and never read.
    """

    _fragments = 0

    def process_event(self, event: Event) -> None:
        """Count the fragments of a message as they arrive."""
        if isinstance(event, Frame) and event.opcode in DATA_OPCODES:
            if self._fragments > MAX_FRAGMENTS:
                return  # of the same batch as the excess fragment
            self._fragments = 0 if event.fin else self._fragments + 1
            if self._fragments > MAX_FRAGMENTS:
                self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
                self.send_data()
                self.transport.close()
                return
        super().process_event(event)
        if self.transport.get_write_buffer_size() > MAX_UNREAD:
            self.transport.abort()


class BoundedServer(Bounded, ServerConnection):
    """The CSMS's side of a WebSocket."""


class BoundedClient(Bounded, ClientConnection):
    """The station's side of a WebSocket."""


class OcppConnection:
    """Calls and answers over one open WebSocket, which the caller opens and closes.

    Both directions work at the same time. One call of ours is in flight at a time [OCPP-J 4.1.1].

    Args:
        websocket: its subprotocol is `version`.
        version: of OCPP.
        answer: answers the peer's calls.
        invalid: called after a call that violates the schema was refused.
    """

    def __init__(
        self, websocket: Connection, version: OcppVersion, answer: Answer, *, invalid: Invalid | None = None
    ) -> None:
        self.version = version
        self._websocket = websocket
        self._answer = answer
        self._invalid = invalid
        self._calling = asyncio.Lock()
        self._pending: tuple[str, asyncio.Future[Payload]] | None = None

    async def run(self) -> None:
        """Receive until the connection is closed. Each call is answered in its own task."""
        answering: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as tasks:
            with contextlib.suppress(ConnectionClosed):
                async for frame in self._websocket:
                    message = _read(frame)
                    if isinstance(message, messages.Call) and len(answering) >= MAX_ANSWERING:
                        log.warning("too many calls at a time: connection closed")
                        await self._websocket.close(CloseCode.POLICY_VIOLATION, "too many calls at a time")
                        break
                    if isinstance(message, messages.Call):
                        task = tasks.create_task(self._answer_call(message), name=f"ocpp-answer-{message.action}")
                        answering.add(task)
                        task.add_done_callback(answering.discard)
                    elif message is not None:
                        self._take(message)
            for task in answering:
                task.cancel()  # the peer is gone
            if self._pending is not None and not self._pending[1].done():
                self._pending[1].set_exception(NotAnswered("the connection was closed", reason="ocpp_not_answered"))

    async def call(
        self, action: str, payload: Payload, *, timeout: float = CALL_TIMEOUT, checked: bool = True
    ) -> Payload:
        """Call the peer and return the payload of its result. `run` must be running.

        Args:
            action: the message.
            payload: its payload.
            timeout: seconds to wait for the answer.
            checked: whether `payload` is validated; False plays a faulty side.

        Raises:
            PayloadInvalid: the payload, or that of the result, violates the schema.
            CallError: the peer answered with an error.
            NotAnswered: it did not answer.
        """
        if checked:
            validate(action, payload, self.version)
        call = messages.Call(str(uuid.uuid4()), action, payload)
        async with self._calling:
            future: asyncio.Future[Payload] = asyncio.get_running_loop().create_future()
            self._pending = (call.unique_id, future)
            try:
                async with asyncio.timeout(timeout):
                    await self._websocket.send(call.to_json())
                    result = await future
            except TimeoutError:
                raise NotAnswered(f"no answer to {action} within {timeout:g} s", reason="ocpp_not_answered") from None
            except ConnectionClosed:
                raise NotAnswered("the connection was closed", reason="ocpp_not_answered") from None
            finally:
                self._pending = None
                if not future.cancel() and not future.cancelled():
                    future.exception()  # retrieved: the caller may be gone, and asyncio would warn
        validate(action, result, self.version, result=True)
        return result

    async def close(self) -> None:
        """Close the connection, which ends `run`."""
        await self._websocket.close()

    def _take(self, message: Any) -> None:
        """Handle a result or an error of the call in flight, or a late one."""
        if self._pending is None or message.unique_id != self._pending[0] or self._pending[1].done():
            log.warning("answer without a call")
        elif isinstance(message, messages.CallResult):
            self._pending[1].set_result(message.payload)
        else:
            self._pending[1].set_exception(CallError(str(message.error_code), str(message.error_description)))

    async def _answer_call(self, call: Any) -> None:
        after: Callable[[], Awaitable[None]] | None = None
        try:
            validate(call.action, call.payload, self.version)
            result = await self._answer(call.action, call.payload)
            if isinstance(result, Answered):
                result, after = result
            validate(call.action, result, self.version, result=True)
            frame = call.create_call_result(result).to_json()
        except CallError as error:
            frame = _error(call, error.code, error.description)
        except UnknownAction as error:
            frame = _error(call, "NotImplemented", str(error))
        except PayloadInvalid as error:
            frame = _error(call, _code(error.keyword, self.version), str(error))
            if self._invalid is not None:
                after = partial(self._invalid, call.action, call.payload, error)
        except Exception:  # a bug of ours; the peer still gets an answer
            log.exception("%s cannot be answered", call.action)
            frame = _error(call, "InternalError", "")
        with contextlib.suppress(ConnectionClosed):
            await self._websocket.send(frame)
            if after is not None:
                await after()


def _read(frame: str | bytes) -> Any:
    """Return the message in a frame, or None if it is invalid."""
    try:
        message = messages.unpack(frame)
    except (OCPPError, ValueError, RecursionError) as error:  # ValueError: a number of thousands of digits
        log.warning("invalid OCPP-J frame: %s", type(error).__name__)
        return None
    if not isinstance(message.unique_id, str) or not isinstance(getattr(message, "action", None), str | None):
        log.warning("invalid OCPP-J frame: its id or action is not a string")
        return None
    return message


def _error(call: Any, code: str, description: str) -> str:
    """Return a CALLERROR; its description is cut to 255 characters."""
    return str(messages.CallError(call.unique_id, code, description[:255], {}).to_json())


_CODES: Final = {
    "type": ("TypeConstraintViolation", "TypeConstraintViolation"),
    "required": ("OccurenceConstraintViolation", "OccurrenceConstraintViolation"),
    "additionalProperties": ("FormationViolation", "FormatViolation"),
}
"""The error codes for violated keywords of the schema, in 1.6 and later."""


def _code(keyword: str, version: OcppVersion) -> str:
    return _CODES.get(keyword, ("PropertyConstraintViolation",) * 2)[version is not OcppVersion.V16]
