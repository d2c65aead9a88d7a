"""MQTT brokers by other hands than Mosquitto's, on free loopback ports."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from judges import NODE, PACKAGES, VENV
from peers import Mosquitto, Peer, free_port, is_listening


class Amqtt(Mosquitto):
    """A broker that speaks MQTT 3.1.1 only, and answers a CONNECT of MQTT 5 with silence. It keeps no sessions."""

    program = str(VENV / "amqtt")

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        (directory / "amqtt.yaml").write_text(
            f"listeners:\n  default:\n    type: tcp\n    bind: 127.0.0.1:{self.port}\n"
            "plugins:\n  amqtt.plugins.authentication.AnonymousAuthPlugin:\n    allow_anonymous: true\n"
        )

    def command(self) -> list[str]:
        return ["-c", str(self.directory / "amqtt.yaml")]


class Aedes(Mosquitto):
    """A broker of Node.js; its sessions are in memory, and end with it."""

    program = str(NODE)

    def command(self) -> list[str]:
        return [str(Path(__file__).with_name("broker.mjs")), str(PACKAGES), str(self.port)]


class StoredAedes(Aedes):
    """The same with its sessions on disk."""

    def command(self) -> list[str]:
        return [*super().command(), str(self.directory / "sessions")]


class Epmd(Peer):
    """Erlang's port mapper, which a broker would start as a daemon and leave behind."""

    program = "epmd"

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.port = free_port()

    def command(self) -> list[str]:
        return ["-port", str(self.port), "-address", "127.0.0.1"]

    def listening(self) -> bool:
        return is_listening(self.port)


class RabbitMq(Mosquitto):
    """RabbitMQ with its MQTT plugin, alone in its folder: home, cookie, node name, database, port mapper."""

    program = "/usr/lib/rabbitmq/bin/rabbitmq-server"  # the one in PATH changes user and folder
    start_timeout = 60.0

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self._mapper = Epmd(directory / "epmd")
        amqp, distribution = free_port(), free_port()
        (directory / "rabbitmq.conf").write_text(
            f"listeners.tcp.1 = 127.0.0.1:{amqp}\nmqtt.listeners.tcp.1 = 127.0.0.1:{self.port}\n"
            "log.console = true\nlog.file = false\n"
        )
        (directory / "enabled_plugins").write_text("[rabbitmq_mqtt].\n")
        self.environment = {
            "HOME": str(directory),
            "RUNNING_UNDER_SYSTEMD": "true",  # no shell in between, and it ends by SIGTERM
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": str(self._mapper.port),
            "RABBITMQ_NODENAME": f"stationkey-{self.port}@localhost",
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
            "RABBITMQ_CONF_ENV_FILE": "/dev/null",
            "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(directory / "database"),
            "RABBITMQ_LOG_BASE": str(directory / "logs"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
        }

    def command(self) -> list[str]:
        return []

    def start(self) -> Self:
        if self._mapper.process is None:
            self._mapper.start()
        return super().start()

    def kill(self) -> None:
        super().kill()
        self._mapper.kill()

    def __exit__(self, *_: object) -> None:
        self.terminate()  # so that its own children end with it
        self._mapper.kill()
