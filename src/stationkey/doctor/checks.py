"""Every check, as a row: its id, what it looks at, who judges, what it depends on. The order is that of the report."""

from __future__ import annotations

from typing import Final

from stationkey.doctor.broker import reachability as broker
from stationkey.doctor.broker import rights
from stationkey.doctor.config import certificates, consistency, file, secrets
from stationkey.doctor.host import clock, machine, software
from stationkey.doctor.runner import Check
from stationkey.doctor.state import daemon, directory, disk, keys
from stationkey.doctor.tpm import capabilities, device, facts
from stationkey.doctor.tpm import reachability as tpm
from stationkey.doctor.tpm import state as condition
from stationkey.doctor.tpm.reachability import Told

_CONFIGURATION: Final = (
    Check("config.file", file.look_at_file, file.judge_file),
    Check("config.rights", file.look_at_rights, file.judge_rights),
    Check("config.environment", file.look_at_environment, file.judge_environment),
    Check("config.sense", consistency.look_at_settings, consistency.judge_settings),
    Check("config.secrets", secrets.look_at_secrets, secrets.judge_secrets),
    Check("config.tls", certificates.look_at_tls, certificates.judge_tls),
    Check("config.certificate_dir", secrets.look_at_certificate_dir, secrets.judge_certificate_dir),
)
_WAY: Final = ("tpm.keystore",)
_ANSWERS: Final = ("tpm.reachable",)
_TPM: Final = ("tpm",)
"""The section of the configuration file."""
_KEY_STORE: Final = (
    Check("tpm.keystore", tpm.look_at_keystore, tpm.judge_keystore, reads=("keystore",)),
    Check("tpm.device", device.look_at_device, device.judge_device, _WAY),
    Check("tpm.manager", tpm.look_at_way, tpm.judge_manager, _WAY),
    Check("tpm.reachable", tpm.look_at_tpm, tpm.judge_reachable, ("tpm.device",)),
    Check("tpm.started", Told(), condition.judge_started, _ANSWERS),
    Check("tpm.self_test", Told(), condition.judge_self_test, _ANSWERS),
    Check("tpm.version", Told(*facts.VERSION), capabilities.judge_version, _ANSWERS),
    Check("tpm.firmware", Told(*facts.MAKER, *facts.PT_FIRMWARE), capabilities.judge_firmware, _ANSWERS),
    Check("tpm.simulated", Told(*facts.MAKER), capabilities.judge_simulated, _ANSWERS),
    Check("tpm.algorithms", Told(*facts.ALGORITHMS), capabilities.judge_algorithms, _ANSWERS),
    Check("tpm.certificate_types", Told(*facts.ALGORITHMS), capabilities.judge_certificate_types, _ANSWERS),
    Check("tpm.hierarchies", Told(facts.PT_STARTUP_CLEAR), condition.judge_hierarchies, _ANSWERS),
    Check("tpm.srk", Told("srk", *facts.ROOM_FOR_SRK), condition.judge_srk, _ANSWERS, _TPM),
    Check("tpm.authorisation", Told(facts.PT_PERMANENT), condition.judge_authorisation, _ANSWERS, _TPM),
    Check("tpm.lockout", Told(*facts.LOCKOUT), condition.judge_lockout, _ANSWERS),
    Check("tpm.slots", Told("transient", facts.PT_TRANSIENT_AVAIL), condition.judge_slots, _ANSWERS),
    Check("tpm.sessions", Told("loaded_sessions", *facts.SESSIONS), condition.judge_sessions, _ANSWERS, _TPM),
    Check("tpm.pcrs", Told("banks"), condition.judge_pcrs, _ANSWERS, _TPM),
    Check("tpm.attestation_key", Told(), condition.judge_attestation_key, _ANSWERS, _TPM),
    Check("tpm.keys", Told(), condition.judge_keys, _ANSWERS, _TPM),
)
_LEDGER: Final = ("state.ledger",)
_STATE_DIR: Final = ("state_dir",)
_STATE: Final = (
    Check("state.directory", directory.look_at_directory, directory.judge_directory, reads=_STATE_DIR),
    Check("state.files", directory.look_at_files, directory.judge_files, ("state.directory",)),
    Check("state.daemon", daemon.look_at_daemon, daemon.judge_daemon, reads=_STATE_DIR),
    Check("state.settings", daemon.look_at_command, daemon.judge_settings),
    Check("state.disk", disk.look_at_room, disk.judge_room, reads=_STATE_DIR),
    Check("state.filesystem", disk.look_at_filesystem, disk.judge_filesystem, reads=_STATE_DIR),
    Check("state.ledger", keys.look_at_ledger, keys.judge_ledger, reads=_STATE_DIR),
    Check("state.keys", keys.look_at_keys, keys.judge_keys, _LEDGER),
    Check("state.active", keys.look_at_active, keys.judge_active, _LEDGER),
)
_MQTT: Final = ("mqtt",)
_TLS: Final = ("broker.tls",)
_TALKS: Final = ("broker.publish",)
_BROKER: Final = (
    Check("broker.url", broker.look_at_url, broker.judge_url, reads=("broker",)),
    Check("broker.name", broker.look_at_name, broker.judge_name, ("broker.url",)),
    Check("broker.port", broker.look_at_port, broker.judge_port, ("broker.name",)),
    Check("broker.tls", broker.look_at_tls, broker.judge_tls, ("broker.port",), _MQTT),
    Check("broker.login", rights.look_at_login, rights.judge_login, _TLS, ("topic_prefix",)),
    Check("broker.version", rights.look_at_visit, rights.judge_version, _TLS, ("topic_prefix",)),
    Check("broker.publish", rights.look_at_visit, rights.judge_publish, ("broker.login",)),
    Check("broker.subscribe", rights.look_at_visit, rights.judge_subscribe, _TALKS),
    Check("broker.own_rights", rights.look_at_reach, rights.judge_own_rights, _TALKS),
    Check("broker.anonymous", rights.look_at_reach, rights.judge_anonymous, _TLS, ("topic_prefix",)),
    Check("broker.josev", rights.look_at_visit, rights.judge_josev, _TALKS),
    Check("broker.retained", rights.look_at_visit, rights.judge_retained, ("broker.subscribe",)),
    Check("broker.delay", rights.look_at_visit, rights.judge_delay, _TALKS),
)
_CLOCK: Final = (
    Check("clock.time", clock.look_at_clocks, clock.judge_time),
    Check("clock.synchronised", clock.look_at_clocks, clock.judge_synchronised),
    Check("clock.battery", clock.look_at_clocks, clock.judge_battery),
)
_MACHINE: Final = (
    Check("machine.user", machine.look_at_user, machine.judge_user),
    Check("machine.unit", machine.look_at_unit, machine.judge_unit),
    Check("machine.sandbox", machine.look_at_sandbox, machine.judge_sandbox, reads=("broker", "keystore", "state_dir")),
    Check("machine.core_dumps", machine.look_at_core_dumps, machine.judge_core_dumps),
    Check("machine.memory", machine.look_at_memory, machine.judge_memory),
    Check("software.tss", software.look_at_tss, software.judge_tss, _WAY),
    Check("software.openssl", software.look_at_openssl, software.judge_openssl, _WAY),
)
CHECKS: Final = {
    "Configuration": _CONFIGURATION,
    "Key store": _KEY_STORE,
    "State": _STATE,
    "Broker": _BROKER,
    "Clock": _CLOCK,
    "Machine": _MACHINE,
}
"""The checks of each area; an area is a heading of the report."""
