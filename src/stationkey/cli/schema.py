"""``stationkey schema``: JSON Schema (2020-12) of each message, and an AsyncAPI 3.0 document for a station and a site.

Both are made from `stationkey.contract`.

The schemas of attestation documents, which are not messages, are those of `stationkey.attestation`.

Rules that a schema cannot express (no control characters in a name, an id used once) are in the descriptions and in
``docs/contract.md``; `stationkey.contract.messages.decode` enforces all of them.
"""

from __future__ import annotations

import json
from typing import Any, Final

import click
import msgspec

from stationkey._version import __version__
from stationkey.attestation import documents
from stationkey.contract import messages, renewal
from stationkey.contract.profiles import DEFAULT_ALGORITHM, PROFILES
from stationkey.contract.stations import MAX_STATION

MESSAGES: Final[dict[str, type[msgspec.Struct]]] = {
    "generate_csr.request": messages.GenerateCsrRequest,
    "generate_csr.response": messages.GenerateCsrResponse,
    "certificate_installation_status.update": messages.CertificateInstallationStatus,
    "renewal.update": renewal.RenewalUpdate,
}
"""Every message of the contract, by its name for the command."""

ASYNCAPI: Final = "asyncapi"
ASYNCAPI_SITE: Final = "asyncapi.site"
NAMES: Final = (*MESSAGES, ASYNCAPI, ASYNCAPI_SITE, *documents.SCHEMAS)

Json = dict[str, Any]


def document(name: str) -> Json:
    """Return the schema of a message or document, or the AsyncAPI document, by its name in `NAMES`."""
    if name in documents.SCHEMAS:
        return documents.json_schema(name)
    return asyncapi(site=name == ASYNCAPI_SITE) if name in {ASYNCAPI, ASYNCAPI_SITE} else json_schema(name)


def json_schema(name: str) -> Json:
    """Return the JSON Schema (2020-12) of the message `name`."""
    (reference,), components = _components([MESSAGES[name]], "#/$defs/{name}")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": name,
        **reference,
        "$defs": components,
    }


def _components(structs: list[type[msgspec.Struct]], template: str) -> tuple[tuple[Json, ...], dict[str, Json]]:
    """Return references to the schemas of `structs`, and all schemas that they need."""
    references, components = msgspec.json.schema_components(structs, ref_template=template)
    if messages.GenerateCsrData.__name__ in components:
        data = components[messages.GenerateCsrData.__name__]
        data["allOf"] = [
            {
                "if": {"properties": {"certificate_type": {"const": str(profile.certificate_type)}}},
                "then": {
                    "properties": {"algorithm": {"const": str(profile.required_algorithm)}},
                    "required": ["algorithm"],
                },
            }
            for profile in PROFILES.values()
            if profile.required_algorithm is not None
        ]
        data["description"] = f"Without 'algorithm', {DEFAULT_ALGORITHM} is meant. Names have no control characters."
    if messages.GenerateCsrResult.__name__ in components:
        components[messages.GenerateCsrResult.__name__]["allOf"] = [
            {
                "if": {"properties": {"status": {"const": "accepted"}}},
                "then": {"required": ["csr"]},
                "else": {"properties": {"csr": False}},
            }
        ]
    return references, components


def asyncapi(*, site: bool = False) -> Json:
    """Return the AsyncAPI 3.0 document of the charging station's side.

    Args:
        site: for the stations of a site, whose topics contain their names.
    """
    structs = list(MESSAGES.values())
    references, components = _components(structs, "#/components/schemas/{name}")
    names = [struct.__name__ for struct in structs]
    mqtt: Json = {"mqtt": {"qos": 1, "retain": False, "bindingVersion": "0.2.0"}}

    def channel(address: str, description: str, *carried: str) -> Json:
        return {
            "address": address,
            "description": description,
            "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in carried},
        }

    def carried(channel_id: str, name: str) -> list[Json]:
        return [{"$ref": f"#/channels/{channel_id}/messages/{name}"}]

    def of_station(address: str, description: str, *carried: str) -> Json:
        if not site:
            return channel(address, description, *carried)
        words = f"What a pattern of [site] stations matches, such as depot7/s1; {MAX_STATION} bytes at most."
        named = channel(f"{{station}}/{address}", description, *carried)
        return {**named, "parameters": {"station": {"description": words}}}

    request, response, status, due = names
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "stationkey: the charging station's side of generate_csr",
            "version": __version__,
            "description": (
                "Josev asks the charging station for a key pair made in its TPM and for the certificate signing request"
                " for it, and tells it what became of the certificate. Other messages on these topics are passed over."
            ),
            "license": {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"},
        },
        "defaultContentType": "application/json",
        "channels": {
            "josevToStation": of_station(
                messages.REQUEST_TOPIC, "From Josev to the charging station.", request, status
            ),
            "stationToJosev": of_station(messages.RESPONSE_TOPIC, "From the charging station to Josev.", response),
            "renewal": channel(
                renewal.EXAMPLE_TOPIC, "What [renewal] topic names, for example this; off by default. Retained.", due
            ),
        },
        "operations": {
            "answerGenerateCsr": {
                "action": "receive",
                "channel": {"$ref": "#/channels/josevToStation"},
                "summary": "Makes a key pair in the TPM and answers with its CSR, under the request's own id.",
                "messages": carried("josevToStation", request),
                "bindings": mqtt,
                "reply": {
                    "channel": {"$ref": "#/channels/stationToJosev"},
                    "messages": carried("stationToJosev", response),
                },
            },
            "noteInstallationStatus": {
                "action": "receive",
                "channel": {"$ref": "#/channels/josevToStation"},
                "summary": "Takes note of what became of a certificate.",
                "messages": carried("josevToStation", status),
                "bindings": mqtt,
            },
            "tellRenewal": {
                "action": "send",
                "channel": {"$ref": "#/channels/renewal"},
                "summary": "Tells which certificates are due for renewal.",
                "messages": carried("renewal", due),
                "bindings": {"mqtt": {**mqtt["mqtt"], "retain": True}},
            },
        },
        "components": {
            "messages": {
                struct.__name__: {
                    "name": name,
                    "title": name,
                    "summary": (struct.__doc__ or "").split("\n")[0],
                    "contentType": "application/json",
                    "payload": reference,
                }
                for (name, struct), reference in zip(MESSAGES.items(), references, strict=True)
            },
            "schemas": components,
        },
    }


@click.command()
@click.argument(
    "name", required=False, shell_complete=lambda *words: [name for name in NAMES if name.startswith(words[2])]
)
def schema(name: str | None) -> None:
    """Print JSON Schemas and the AsyncAPI documents.

    \b
    NAME is one of
      generate_csr.request
      generate_csr.response
      certificate_installation_status.update
      renewal.update
      asyncapi
      asyncapi.site
      attestation.evidence
      attestation.attestation_key
      attestation.challenge

    Without NAME, all of them are printed as one JSON object.
    """  # noqa: D301 - \b is click's mark for lines to be left as they are: the character itself
    if name is not None and name not in NAMES:
        raise click.BadParameter(f"{name!r} is not one of {', '.join(NAMES)}", param_hint="NAME")
    documents = {known: document(known) for known in NAMES if name in {None, known}}
    click.echo(json.dumps(documents if name is None else documents[name], indent=2, ensure_ascii=False))
