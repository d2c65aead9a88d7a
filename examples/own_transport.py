"""Run the whole service over a transport of your own. Here: a request a line in, a response a line out, until EOF.

    python examples/own_transport.py < examples/requests.jsonl
    python examples/own_transport.py tpm2:device:/dev/tpmrm0 < examples/requests.jsonl

The argument names the key store; without one, keys are made in software, without protection.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from contextlib import ExitStack, aclosing, closing
from pathlib import Path

from stationkey import (
    CertificateInstallationStatus,
    GenerateCsrRequest,
    GenerateCsrResponse,
    KeyStores,
    KeyStoreThread,
    Ledger,
    MessageError,
    StateDirectory,
    StationKeyError,
    StationKeyService,
    decode,
    encode,
    keystore_opener,
)


async def respond(service: StationKeyService, payload: bytes) -> GenerateCsrResponse | None:
    """What one payload gets: an answer, or silence."""
    try:
        message = decode(payload)
    except MessageError as error:
        if error.request_id is not None:
            return await service.reject(error.request_id, error)
        service.pass_over(error)  # without an id nobody can be told
        return None
    match message:
        case GenerateCsrRequest():
            return await service.answer(message)
        case CertificateInstallationStatus():
            await service.note_status(message)
    return None  # a status, or a message for some other program


async def handle(service: StationKeyService, payload: bytes) -> None:
    """Answer one payload. What is answered is on disk before it is sent; `delivered` says that it was sent."""
    response = await respond(service, payload)
    if response is not None:
        print(encode(response).decode(), flush=True)
        await service.delivered(response)


async def serve(keystores: KeyStores, ledger: Ledger) -> None:
    """Take requests until there are no more. They are answered side by side, so not always in the order they came."""
    async with aclosing(StationKeyService(keystores, ledger)) as service, asyncio.TaskGroup() as tasks:
        while payload := await asyncio.to_thread(sys.stdin.buffer.readline):
            tasks.create_task(handle(service, payload))


def main() -> int:
    """Put the parts together, and take them apart in the opposite order."""
    uri = sys.argv[1] if len(sys.argv) > 1 else "software:"
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")  # to standard error
    with ExitStack() as stack:
        # Yours must outlive the process: keys and answers are in it.
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="own-transport-")))
        try:
            opener = keystore_opener(uri, allow_software_keys=uri == "software:")
            state = stack.enter_context(closing(StateDirectory(path / "state")))
            ledger = stack.enter_context(closing(Ledger(state.database)))
        except StationKeyError as error:
            print(error, file=sys.stderr)
            return 1
        keystores = stack.enter_context(closing(KeyStores.only(uri, KeyStoreThread(opener))))
        asyncio.run(serve(keystores, ledger))
    return 0


if __name__ == "__main__":
    sys.exit(main())
