"""What the documents say and a machine can check."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import click
import msgspec
import pytest
from peers import Mosquitto

from stationkey import cli
from stationkey.cli.request import EXIT_NO_ANSWER, EXIT_REJECTED
from stationkey.cli.serve import serve
from stationkey.config.options import options_of
from stationkey.config.settings import CsrOverrides, PolicyTerms, Settings
from stationkey.contract import messages
from stationkey.contract.profiles import ALGORITHMS, PROFILES, Algorithm, CertificateProfile, CertificateType
from stationkey.errors import MessageError

ROOT = Path(__file__).parent.parent
IGNORED = [".git", ".coverage.*", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().split())]


def files_of(directory: Path) -> Iterator[Path]:
    """Every file that belongs to the repository."""
    for path in sorted(directory.iterdir()):
        if any(fnmatch(path.name, ignored) for ignored in IGNORED):
            continue
        if path.is_dir():
            yield from files_of(path)
        else:
            yield path


FILES = list(files_of(ROOT))
DOCUMENTS = [pytest.param(path, id=str(path.relative_to(ROOT))) for path in FILES if path.suffix == ".md"]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs/commands.md").read_text()
CONFIGURATION = (ROOT / "docs/configuration.md").read_text()
CONTRACT = (ROOT / "docs/contract.md").read_text()
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
REASONS = (ROOT / "docs/reasons.md").read_text()

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return FENCE.sub("", text)


def rows(text: str) -> list[list[str]]:
    """The cells of every table row."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def anchors(text: str) -> set[str]:
    """The fragments that a heading can be linked by."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestLinks:
    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_every_relative_link_leads_to_a_file_of_the_repository(self, document: Path) -> None:
        targets = re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text()))
        for target in targets:
            if target.startswith(("http:", "https:", "mailto:")):
                continue
            name, _, fragment = target.partition("#")
            path = (document.parent / name).resolve() if name else document
            assert path in FILES, target
            assert not fragment or fragment in anchors(path.read_text()), target

    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_every_path_named_in_the_text_is_there(self, document: Path) -> None:
        named = re.findall(
            r"`((?:src|tests|docs|examples|packaging|requirements|scripts)/[^`\s*]*)`", prose(document.read_text())
        )
        assert [name for name in named if not (ROOT / name.partition("::")[0]).exists()] == []


def command_lines(text: str) -> Iterator[list[str]]:
    """The words of every ``stationkey`` command in the shell blocks, as a shell would split them."""
    for language, block in FENCE.findall(text):
        if language != "sh":
            continue
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, "|"]:
                if set(word) <= set("|&;<>()"):
                    if words[:1] == ["stationkey"]:
                        yield words[1:]
                    words = []
                else:
                    words.append(word)


def subcommand(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = cli.main
    while isinstance(command, click.Group) and words:
        found = command.get_command(click.Context(command), words[0])  # one that stands in a module of its own, too
        if found is None:
            break
        command, words = found, words[1:]
    return command, words


class TestCommands:
    def test_the_readme_shows_commands(self) -> None:
        assert {words[0] for words in command_lines(README)} >= {"doctor", "request", "keys"}

    def test_every_command_is_on_the_page_of_commands(self) -> None:
        named = {words.split()[0] for words in re.findall(r"^\| `stationkey ([a-z][^`]*)`", COMMANDS, re.MULTILINE)}
        assert set(cli.main.list_commands(click.Context(cli.main))) - {"request", "help"} <= named

    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_every_command_shown_is_understood(
        self, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for words in command_lines(document.read_text()):
            command, arguments = subcommand(words)
            assert not isinstance(command, click.Group), words
            for word in arguments:  # the files that it reads, where they must be there
                if word.endswith(".pem") and not Path(word).is_absolute():
                    Path(word).parent.mkdir(parents=True, exist_ok=True)
                    Path(word).touch()
            command.make_context(command.name, arguments)  # raises where the command line is wrong

    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_every_command_named_in_the_text_is_there(self, document: Path) -> None:
        for named in re.findall(r"`stationkey ([a-z][^`]*)`", prose(document.read_text())):
            command, arguments = subcommand(shlex.split(named))
            known = {option for parameter in command.params for option in parameter.opts}
            assert command is not cli.main, named
            assert {argument for argument in arguments if argument.startswith("-")} <= known, named

    def test_the_exit_statuses_are_those_of_the_command(self) -> None:
        statuses = {cells[0]: cells[1] for cells in rows(COMMANDS) if cells[0].isdigit()}
        assert statuses["0"].startswith("accepted")
        assert statuses[str(EXIT_REJECTED)].startswith("rejected")
        assert statuses[str(EXIT_NO_ANSWER)].startswith("no answer in time")
        assert statuses[str(click.UsageError.exit_code)] == "wrong usage"
        assert set(statuses) == {"0", "1", "2", "3", "4"}


OPTION_ROWS = {cells[0].strip("`").split()[0]: cells for cells in rows(CONFIGURATION) if cells[0].startswith("`--")}
OPTIONS = {option.opts[0]: option for option in serve.params if isinstance(option, click.Option)}


class TestOptions:
    def test_the_table_has_every_option(self) -> None:
        assert set(OPTION_ROWS) == set(OPTIONS)

    @pytest.mark.parametrize("name", OPTION_ROWS)
    def test_each_row_has_the_option_s_own_words(self, name: str) -> None:
        option = OPTIONS[name]
        shown, variable, key, default = OPTION_ROWS[name]
        said = re.search(r"\[default: (.*)\]", option.help or "")
        metavar = "|".join(option.type.choices) if isinstance(option.type, click.Choice) else option.metavar
        assert shown == f"`{name} {metavar}`" if metavar else f"`{name}`"
        assert variable == f"`{option.envvar}`"
        assert key == ("" if name in {"--config", "--site"} else f"`{option.name}`")
        assert default.replace("`", "") == said[1] if said else default in {"no", "none"}

    def test_every_name_of_the_file_is_on_the_page(self) -> None:
        options = [(option.table or option.name) for option in options_of(Settings)]
        assert [name for name in options if f"`{name}`" not in CONFIGURATION and f"[{name}" not in CONFIGURATION] == []

    def test_the_rules_of_the_policy_have_their_defaults(self) -> None:
        policy, told = PolicyTerms(), dict[str, str]()
        for cells in rows(OPERATIONS):
            names = re.findall(r"`(\w+)`", cells[0])
            if len(cells) == 4 and set(names) & {option.name for option in options_of(PolicyTerms)}:
                told |= dict(zip(names, re.split(r", ", cells[1]), strict=True))
        for name, default in told.items():
            value = getattr(policy, name)
            few = (
                {(): "any", tuple(CertificateType): "all", tuple(Algorithm): "all"} if isinstance(value, tuple) else {}
            )
            assert default.strip("`") == few.get(value, f"{value:g}" if isinstance(value, float) else str(value)), name
        assert set(told) == {option.name for option in options_of(PolicyTerms)} - {"payload_bytes"}

    def test_every_override_of_a_profile_is_in_the_contract(self) -> None:
        names = [option.name for option in options_of(CsrOverrides)]
        assert [name for name in names if f"`{name}`" not in CONTRACT] == []


def profile_row(profile: CertificateProfile) -> list[str]:
    def extension(critical: bool, values: tuple[str, ...]) -> str:
        return f"{'! ' if critical else ''}{', '.join(values)}" if values else "none"

    if profile.required_algorithm:
        algorithms = f"{profile.required_algorithm} only"
    elif profile.preferred_algorithm:
        algorithms = f"any, {profile.preferred_algorithm} preferred"
    else:
        algorithms = "any"
    return [
        f"`{profile.certificate_type}`",
        f"C, O, CN, DC={profile.domain_component}" if profile.domain_component else "C, O, CN",
        extension(True, profile.key_usage),
        extension(profile.extended_key_usage_critical, profile.extended_key_usage),
        "SECC ID" if profile.secc_id else "serial number",
        algorithms,
    ]


class TestContract:
    def test_the_table_of_profiles_is_that_of_the_code(self) -> None:
        shown = [cells for cells in rows(CONTRACT) if len(cells) == 6]
        assert shown[2:] == [profile_row(profile) for profile in PROFILES.values()]

    def test_the_table_of_algorithms_is_that_of_the_code(self) -> None:
        shown = [cells for cells in rows(CONTRACT) if cells[0].strip("`") in set(ALGORITHMS)]
        assert shown == [
            [f"`{profile.algorithm}`", ", else ".join(map(str, profile.key_types)), profile.signature_oid]
            for profile in ALGORITHMS.values()
        ]

    def test_its_examples_are_messages_of_the_contract(self) -> None:
        examples = [block.encode() for language, block in FENCE.findall(CONTRACT) if language == "json"]
        read = [messages.decode(example) or messages.decode_response(example) for example in examples]
        assert [type(message) for message in read] == [
            messages.GenerateCsrRequest,
            messages.GenerateCsrResponse,
            messages.CertificateInstallationStatus,
        ]


def text_of(node: ast.expr) -> str | None:
    """A string as it stands in the source, ``FIELD`` for what is filled in at run time."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(str(part.value) if isinstance(part, ast.Constant) else "FIELD" for part in parts)
    return None


IDENTIFIER = re.compile(r"(FIELD|[a-z0-9]+)(_[a-z0-9]+)+")


def reasons_in(source: str) -> Iterator[str]:
    """Each ``reason=`` of an error, and each pair or triple of a reason and its sentence."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.keyword(arg="reason", value=value):
                reason = text_of(value)
                # The history of a key takes prose as its reason.
                if reason is not None and IDENTIFIER.fullmatch(reason):
                    yield reason
            case ast.Tuple(elts=[first, second, *rest]) if len(rest) < 2:
                reason, sentence = text_of(first), text_of(second)
                if reason is None or sentence is None or not IDENTIFIER.fullmatch(reason):
                    continue
                if sentence == "" or " " in sentence:
                    yield reason


def members_of_families() -> set[str]:
    """The reasons that ``FIELD_missing`` and ``FIELD_invalid`` stand for."""
    structs: list[type[msgspec.Struct]] = [messages.GenerateCsrRequest, messages.GenerateCsrData]
    structs += [messages.CertificateInstallationStatus, messages.CertificateInstallationStatusData]
    fields = {field.encode_name for struct in structs for field in msgspec.structs.fields(struct)}
    return {f"{field}_{what}" for field in fields for what in ("missing", "invalid")}


class TestReasons:
    def test_the_list_is_that_of_the_code(self) -> None:
        """A family stands for its members; one that differs from the others has its own row."""
        in_code = {reason for path in (ROOT / "src").rglob("*.py") for reason in reasons_in(path.read_text())}
        listed = [cells[0].strip("`") for cells in rows(REASONS) if cells[0].startswith("`")]
        assert len(listed) == len(set(listed))
        assert {"id_invalid", "FIELD_invalid", "tpm_lockout", "disk_full", "nested_too_deep"} <= in_code
        assert set(listed) - in_code == set()
        assert in_code - set(listed) - members_of_families() == set()

    @pytest.mark.parametrize(
        "payload",
        [
            pytest.param(b"\xff", id="not UTF-8"),
            pytest.param(b"{", id="not JSON"),
            pytest.param(b"[" * 10_000, id="nested"),
            pytest.param(b'{"name": "generate_csr", "name": "generate_csr"}', id="two names"),
            pytest.param(b'{"name": "generate_csr", "type": "request", "id": "1"}', id="no UUID"),
            pytest.param(
                b'{"name": "generate_csr", "type": "request", "id": "123e4567-e89b-12d3-a456-426614174000"}',
                id="no data",
            ),
        ],
    )
    def test_the_reason_of_a_refused_message_is_on_the_list(self, payload: bytes) -> None:
        with pytest.raises(MessageError) as refused:
            messages.decode(payload)
        family = re.sub(r"^\w+_(missing|invalid)$", r"FIELD_\1", refused.value.reason)
        assert f"`{refused.value.reason}`" in REASONS or f"`{family}`" in REASONS


class TestArchitecture:
    def test_every_dependency_has_its_reason(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        named = [
            *project["dependencies"],
            *(name for extra in project["optional-dependencies"].values() for name in extra),
        ]
        for path in sorted((ROOT / "requirements").glob("*.in")):
            named += [line for line in path.read_text().splitlines() if line[:1].isalpha()]
        names = [re.split(r"[^\w-]", name)[0] for name in named]
        assert [name for name in names if f"`{name}`" not in ARCHITECTURE] == []

    def test_every_module_has_its_row(self) -> None:
        modules = [path for path in (ROOT / "src/stationkey").iterdir() if not path.name.startswith("__")]
        cells = " ".join(row[0] for row in rows(ARCHITECTURE))
        names = [path.stem for path in modules if path.suffix == ".py" or (path / "__init__.py").exists()]
        assert [name for name in names if f"`{name}`" not in cells] == []

    def test_every_table_of_the_ledger_is_described(self) -> None:
        tables = re.findall(r"CREATE TABLE (\w+)", (ROOT / "src/stationkey/ledger/migrations.py").read_text())
        assert tables
        assert [table for table in tables if f"`{table}`" not in ARCHITECTURE] == []


def test_the_broker_configuration_that_is_shipped_is_taken_by_a_broker(tmp_path: Path) -> None:
    shipped = ROOT / "packaging/mosquitto"
    assert "set_tcp_nodelay true" in (shipped / "stationkey.conf").read_text().splitlines()
    with Mosquitto(tmp_path, f"include_dir {shipped}") as broker:
        assert f"Loading config file {shipped}/stationkey.conf" in broker.log


@pytest.mark.parametrize(
    "words",
    [
        # In pieces, or this file would be found.
        pytest.param(["py" + "pi.org", "python" + "hosted.org"], id="the Python package index"),
        pytest.param(["registry.npm" + "js.org"], id="the npm registry"),
        pytest.param(["deb.deb" + "ian.org", "archive.ubu" + "ntu.com"], id="the Debian mirrors"),
        pytest.param(["/wo" + "rk/", "/ro" + "ot/", "/ho" + "me/"], id="a path of somebody's machine"),
    ],
)
def test_no_file_names(words: list[str]) -> None:
    found = [
        f"{path.relative_to(ROOT)}: {word}"
        for path in FILES
        for word in words
        if word in path.read_text(errors="ignore")
    ]
    assert found == []
