"""Verify evidence that a key was created in a TPM. Pure: no TPM, no tpm2-tss, no network, no clock.

This package needs only the standard library, `cryptography` and `stationkey.errors`, so that an auditor can read all of
it. `stationkey.keystore.tpm2.attest` makes the evidence, on the station.

- `refusals`: its errors;
- `structures`: the TPM's own structures, read strictly;
- `documents`: the JSON documents that go between station and verifier, and their JSON Schemas;
- `trust`: what the verifier trusts, and why;
- `credential`: a challenge that only one TPM can open [TPM 2.0 part 1, 24];
- `verifier`: the verdict.
"""
