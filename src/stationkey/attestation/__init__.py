"""Evidence that a key was born in a TPM, and the judge of it. Pure: no TPM, no tpm2-tss, no network, no clock.

This package needs the standard library, `cryptography` and `stationkey.errors`, and nothing else: whoever has to
believe a verdict can read all that it comes from. What makes evidence is `stationkey.keystore.tpm2.attest`, on the
station.

- `refusals`: its errors;
- `structures`: the TPM's own structures, read strictly;
- `documents`: the JSON documents that go between station and verifier, and their JSON Schemas;
- `trust`: what the verifier trusts, and why;
- `credential`: a challenge that only one TPM can open [TPM 2.0 part 1, 24];
- `verifier`: the verdict.
"""
