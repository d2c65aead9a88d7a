"""The documents in the Debian package, and the man page."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import click
import installed_docs
import man
import pytest

from stationkey import cli

ROOT: Final = Path(__file__).parents[2]
FENCE: Final = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package's tree as `scripts/deb` has it when the documents come."""
    root = tmp_path_factory.mktemp("root")
    packages = root / "usr/lib/stationkey/lib/python3.11/site-packages"
    for directory in (packages, root / "etc/stationkey", root / "lib/systemd/system", root / installed_docs.DOC):
        directory.mkdir(parents=True)
    (packages / "stationkey").symlink_to(ROOT / "src/stationkey")
    (root / "etc/stationkey/stationkey.toml").touch()
    (root / "lib/systemd/system/stationkey.service").touch()
    (root / installed_docs.DOC / "copyright").touch()
    installed_docs.main(root)
    return root


def test_every_link_leads_to_a_file_that_is_installed(tree: Path) -> None:
    pages = [*(tree / installed_docs.DOC).rglob("*.md")]
    found = 0
    for page in pages:
        for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
            if not target.startswith(("http:", "https:", "mailto:", "#")):
                found += 1
                assert (page.parent / target.partition("#")[0]).exists(), (page.name, target)
    assert len(pages) > 20
    assert found > 200


def test_a_link_to_what_is_not_installed_becomes_its_words(tree: Path) -> None:
    assert installed_docs.relinked("[a](../tests/x.py) [b](tls.md#t)", tree, "docs/tpm.md") == "a [b](tls.md#t)"


def test_the_package_has_what_the_documents_are_copied_by() -> None:
    build = (ROOT / "scripts/deb").read_text()
    assert '"$python" scripts/installed_docs.py "$root"\n' in build
    assert "scripts/man.py" in build


class TestManPage:
    def test_it_has_every_command_with_every_option(self) -> None:
        page = "\n".join(man.page()).replace("\\-", "-")
        for command, context in man.commands(cli.main, click.Context(cli.main, info_name="stationkey")):
            assert context.command_path in page
            for parameter in command.get_params(context):
                if isinstance(parameter, click.Option) and not parameter.hidden:
                    assert all(name in page for name in parameter.opts), (context.command_path, parameter.opts)

    def test_groff_takes_it(self) -> None:
        page = "\n".join(man.page())
        judged = subprocess.run(
            ["groff", "-man", "-Tutf8", "-z", "-ww"], input=page, capture_output=True, text=True, check=True
        )
        assert [line for line in judged.stderr.splitlines() if "cannot adjust line" not in line] == []
