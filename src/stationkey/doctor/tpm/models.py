"""What a TPM chip is known to have and to take, by its make and model."""

from __future__ import annotations

from typing import Final

from stationkey.doctor.report import Finding, ok
from stationkey.doctor.tpm.facts import Seen, text_of

_NOT_READ: Final = "P-256; its data sheet was not read for more"
_MODELS: Final = {
    ("SLB9670", "SLM9670"): "P-256; no P-384, no P-521, no SHA-512",
    ("SLB9672", "SLB9673"): "P-256 and P-384; no P-521, no SHA-512",
    ("ST33TPHF20",): "P-256; no P-384, no P-521; SHA-512 not found",
    ("ST33GTPMI",): "P-256; P-384 not named; P-521 and SHA-512 not found",
    ("ST33HTPHAHD4",): "P-256 and P-384; P-521 and SHA-512 not found",
    ("NPCT7", "ST33KTPM2X"): _NOT_READ,
    ("SW",): "P-256, P-384 and SHA-512; P-521 by an option of its build",
}
"""What is in the data sheets, by the beginning of the vendor strings; SW is that of simulators."""
_TIMES: Final = "a P-256 key 136 ms, a signature 25 to 190 ms, an RSA-2048 key 1.6 to 7.5 s"
"""Of chips, published with wolfTPM."""


def judge_model(_: Seen, maker: int, *vendor: int) -> Finding:
    """Tell what is known of its model; what counts is what the TPM itself tells, which other checks ask."""
    model = text_of(*vendor).replace(" ", "")
    known = next((has for names, has in _MODELS.items() if model.startswith(names)), "no data sheet is known here")
    return ok(f"{text_of(maker)} {model}, from data sheets, not measured: {known}. Chips take, as published: {_TIMES}")
