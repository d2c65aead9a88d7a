"""Copy the documents into a package's tree, so that every link in them leads to a file that is installed.

Use: python scripts/installed_docs.py ROOT, after everything else is in ROOT. A link to a file of the repository becomes
one to where that is installed; a link to a file that is not installed becomes plain text.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parent.parent
DOC: Final = "usr/share/doc/stationkey"
PAGES: Final = ("README.md", "SECURITY.md", "CHANGELOG.md", "CONTRIBUTING.md")
PLACES: Final = (
    ("packaging/stationkey.toml", "etc/stationkey/stationkey.toml"),
    ("packaging/systemd/", "lib/systemd/system/"),
    ("packaging/", f"{DOC}/examples/"),
    ("LICENSE", f"{DOC}/copyright"),
    ("src/stationkey/", "usr/lib/stationkey/lib/python3.*/site-packages/stationkey/"),
    ("", f"{DOC}/"),
)
"""Where the files of the repository are installed: the first row whose beginning fits counts; a glob for the second."""
LINK: Final = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def installed(root: Path, path: str) -> Path | None:
    """Return where a file of the repository is in the tree, or None."""
    for beginning, place in PLACES:
        if path.startswith(beginning):
            return next(root.glob(place + path.removeprefix(beginning)), None)
    return None


def relinked(text: str, root: Path, page: str) -> str:
    """Return the text of a page of the repository with links for where it is installed."""
    directory = (root / DOC / page).parent

    def relink(link: re.Match[str]) -> str:
        image, words, target = link.groups()
        name, separator, fragment = target.partition("#")
        if not name or ":" in name:
            return link[0]
        place = installed(root, os.path.normpath(Path(page).parent / name))
        if place is None:
            return words
        return f"{image}[{words}]({os.path.relpath(place, directory)}{separator}{fragment})"

    return LINK.sub(relink, text)


def main(root: Path) -> None:
    """Copy documents and examples, then write their links for where they are."""
    doc = root / DOC
    for page in PAGES:
        shutil.copy(REPOSITORY / page, doc)
    shutil.copytree(REPOSITORY / "docs", doc / "docs", ignore=shutil.ignore_patterns("site"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "examples", doc / "examples", ignore=ignored, dirs_exist_ok=True)
    for folder in sorted(path for path in (REPOSITORY / "packaging").iterdir() if path.is_dir()):
        if folder.name not in {"debian", "systemd"}:
            shutil.copytree(folder, doc / "examples" / folder.name, ignore=ignored, dirs_exist_ok=True)
    for file in [*doc.glob("*.md"), *doc.glob("docs/*.md")]:
        file.write_text(relinked(file.read_text(), root, str(file.relative_to(doc))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
