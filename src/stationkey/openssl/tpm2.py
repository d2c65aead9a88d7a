"""OpenSSL with keys in a TPM, by the provider of tpm2-openssl.

A key under ``active/`` is a ``TSS2 PRIVATE KEY``. OpenSSL uses it if the providers are loaded in one order and
preferred by one property query; all others tried fail at least TLS 1.2.
"""

from __future__ import annotations

from typing import Final

from stationkey.errors import ConfigurationError
from stationkey.keystore.tpm2 import keyfile
from stationkey.keystore.tpm2.device import is_shared
from stationkey.openssl.failures import EXIT_KEY, TlsCheckFailed
from stationkey.openssl.servers import SERVERS
from stationkey.openssl.setups import HEAD, TAIL, Setup, Sign

_CONFIGURATION: Final = f"""\
{HEAD.format(device="TPM")}\
# They need two environment variables:
#   OPENSSL_CONF      where this file is
#   TPM2OPENSSL_TCTI  {{tcti}}
# Without the second, tpm2-tss takes whatever TPM it finds, a simulator on port 2321 included.

openssl_conf = stationkey_init

[stationkey_init]
providers = stationkey_providers
alg_section = stationkey_algorithms
ssl_conf = stationkey_ssl

# The order matters: default before tpm2.
[stationkey_providers]
default = stationkey_default
tpm2 = stationkey_tpm2

[stationkey_default]
activate = 1

[stationkey_tpm2]
activate = 1

# Signatures by the TPM where it has the key; everything else in software.
[stationkey_algorithms]
default_properties = ?tpm2.signature=yes
{TAIL}"""

_SIGNS: Final = (
    # Messages of tpm2-tss.
    Sign(
        "tcti", "the TPM cannot be reached", "is --keystore right, and may this user open the device (group tss)?", True
    ),
    Sign(
        "0x00000902",
        "the TPM has no room for the key",
        "without a resource manager no slot is free for a TLS client; use tpm2:device:/dev/tpmrm0, or tpm2-abrmd",
        of_device=True,
    ),
    Sign(
        "Esys_Load() Esys Finish ErrorCode (0x000009a2)",
        "the storage root key has an authorisation value, and OpenSSL's tpm2 provider cannot give it",
        "keys that services use through OpenSSL must hang on a storage root key without [tpm] srk_auth",
    ),
    *(
        Sign(
            code, "the authorisation value is not the key's", "[tpm] key_auth must name the value that it was made with"
        )
        for code in ("0x000009a2", "0x0000098e")
    ),
    Sign("0x000001df", "the key is another TPM's", "a key works only in the TPM that made it; ask for a new one"),
    Sign(
        "0x0000018b",
        "the TPM has no primary key where the file says",
        "was the TPM cleared? Then ask for new keys",
        of_device=True,
    ),
)


def setup(tcti: str) -> Setup:
    """Return the setup for a TPM.

    Args:
        tcti: of the TPM. In the configuration it is a comment: tpm2-openssl 1.1 takes it from the environment only.

    Raises:
        ConfigurationError: the TCTI has a line break in it.
    """
    if not tcti.isprintable():
        raise ConfigurationError("the TCTI has a control character in it", reason="keystore_uri_invalid")
    return Setup(
        device="TPM",
        module="tpm2",
        package="tpm2-openssl",
        install="tpm2-openssl",
        configuration=_CONFIGURATION.format(tcti=tcti),
        variables={"TPM2OPENSSL_TCTI": tcti},
        shared=is_shared(tcti),
        servers=SERVERS,
        locked_part=_locked_part,
        signs=_SIGNS,
        reason="tls_tpm_failed",
    )


def _locked_part(name: str, content: bytes) -> bytes | None:
    """Return a key with an authorisation value; see `Setup`.

    Raises:
        TlsCheckFailed: the key has a policy, which OpenSSL cannot satisfy.
    """
    try:
        key = keyfile.read_pem(content)
    except ValueError:
        return None  # the check says so
    if key is None:
        return None
    if key.policy:
        raise TlsCheckFailed(
            f"{name}: the key is bound to PCRs, and OpenSSL's tpm2 provider cannot use such a key",
            reason="tls_policy",
            exit_code=EXIT_KEY,
            hint="keys that services use through OpenSSL must be made without [tpm] pcrs",
        )
    return None if key.empty_auth else key.der()
