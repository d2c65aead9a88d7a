"""Answer one ``generate_csr`` with a key of your own: no daemon, no broker, no key store of ours.

The request comes as the argument or on standard input; the response goes to standard output:

    head -n 1 examples/requests.jsonl | python examples/own_key.py
"""

from __future__ import annotations

import sys

from cryptography.hazmat.primitives.asymmetric import ec

from stationkey import (
    Algorithm,
    GenerateCsrRequest,
    GenerateCsrResponse,
    MessageError,
    StationKeyError,
    UnsupportedAlgorithm,
    accepted,
    build_csr,
    decode,
    encode,
    rejected,
    to_pem,
)

CURVES: dict[Algorithm, ec.EllipticCurve] = {
    Algorithm.ECDSA_SHA256: ec.SECP256R1(),
    Algorithm.ECDSA_SHA512: ec.SECP521R1(),
}


def own_key(algorithm: Algorithm) -> ec.EllipticCurvePrivateKey:
    """Your part: any object that has cryptography's interface of a private key, so that it can sign inside your HSM.

    Here it is a software key, so that the example runs anywhere. It is forgotten when the program ends.
    """
    if algorithm not in CURVES:
        raise UnsupportedAlgorithm(f"{algorithm}: there are only EC keys here", reason="algorithm_unsupported")
    return ec.generate_private_key(CURVES[algorithm])


def answer(request: GenerateCsrRequest) -> GenerateCsrResponse:
    """The CSR has the subject and the extensions that its certificate type asks for; its signature is verified."""
    csr = build_csr(request, own_key(request.algorithm))
    return accepted(request, to_pem(csr))


def main() -> int:
    """Print the response; exit with 0 where it is accepted, 3 where it is rejected, 1 where there is none."""
    payload = sys.argv[1].encode() if len(sys.argv) > 1 else sys.stdin.buffer.readline()
    request_id = None
    try:
        message = decode(payload)
        if not isinstance(message, GenerateCsrRequest):
            print("not a generate_csr request: nothing to answer", file=sys.stderr)
            return 1
        request_id = message.id
        response = answer(message)
    except StationKeyError as error:
        # Josev is told no more than "rejected". Why, is for whoever runs the station.
        print(f"{error.reason}: {error}", file=sys.stderr)
        if isinstance(error, MessageError):
            request_id = error.request_id  # None where the message has no id to answer to
        if request_id is None:
            return 1
        response = rejected(request_id)
    print(encode(response).decode())
    return 0 if response.data.status == "accepted" else 3


if __name__ == "__main__":
    sys.exit(main())
