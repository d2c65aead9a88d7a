"""The station's OCPP side as an OEM would write it in Python: the library `websockets`, and a file from ``active/``.

It knows nothing of this project: OPENSSL_CONF and TPM2OPENSSL_TCTI in the environment make its OpenSSL use the TPM.

Use: csms_client.py URL FILE ROOT-OF-CSMS VERSION
"""

from __future__ import annotations

import ssl
import sys

from websockets.sync.client import connect
from websockets.typing import Subprotocol

url, file, root, version = sys.argv[1:]
context = ssl.create_default_context(cafile=root)
context.minimum_version = context.maximum_version = ssl.TLSVersion[version]
context.load_cert_chain(file)
with connect(url, ssl=context, subprotocols=[Subprotocol("ocpp2.0.1")], proxy=None) as websocket:
    websocket.send('[2,"1","BootNotification",{"reason":"PowerUp"}]')
    print(websocket.recv())  # noqa: T201 - read by the test
