"""The documents as a site, by Sphinx: `make docs`. The source directory is the root of the repository."""

from __future__ import annotations

import html
import sys
from pathlib import Path
from typing import ClassVar

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "src"))

project = "stationkey"
copyright = "the stationkey authors"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "LICENSE"]
html_theme = "furo"
html_title = "stationkey"
html_static_path = ["../../build/mermaid"]  # made by scripts/site
html_js_files = ["mermaid.min.js", ("", {"body": "mermaid.initialize({startOnLoad: true})"})]
html_copy_source = False
html_show_sphinx = False
templates_path: list[str] = []

myst_heading_anchors = 4
myst_fence_as_directive = ["mermaid"]
suppress_warnings = [
    "myst.header",  # a role page begins with its list
]

autodoc_mock_imports = ["prometheus_client", "tpm2_pytss"]  # a station's libraries, not needed for their words
autodoc_member_order = "groupwise"
autodoc_typehints = "signature"

NAVIGATION = {
    "Start": ["quickstart", "glossary"],
    "By role": [f"for-{role}" for role in ("firmware-engineers", "field-engineers", "operators")]
    + [f"for-{role}" for role in ("back-end-engineers", "auditors")],
    "Use": [
        *("install", "container", "configuration", "commands", "integration", "broker"),
        *("tls", "tpm", "pkcs11", "attestation"),
    ],
    "Operate": ["operations", "lifecycle", "doctor", "reasons", "metrics", "hardening"],
    "Reference": ["contract", "ocpp", "api", "architecture", "performance"],
    "Assurance": ["reliability", "threat-model", "security-checklist"],
}
"""The pages of docs/ below each heading; any other comes below the last one."""
_LISTED = {page for pages in NAVIGATION.values() for page in pages}
NAVIGATION["Assurance"] += sorted({path.stem for path in (ROOT / "docs").glob("*.md")} - _LISTED)


def add_navigation(_: Sphinx, document: str, source: list[str]) -> None:
    """Append the tables of contents to the front page."""
    if document != root_doc:
        return
    for caption, pages in NAVIGATION.items():
        paths = [f"docs/{page}" for page in pages]
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *paths, "```", ""])
    more = ["SECURITY", "CONTRIBUTING", "CHANGELOG"]
    source[0] += "\n".join(["", "```{toctree}", ":hidden:", ":caption: Project", "", *more, "```", ""])


class Mermaid(Directive):
    """A chart, drawn by mermaid.js in the browser."""

    has_content: ClassVar[bool] = True

    def run(self) -> list[nodes.Node]:
        """Return the chart's text for mermaid.js."""
        chart = html.escape("\n".join(self.content))
        return [nodes.raw("", f'<pre class="mermaid">{chart}</pre>', format="html")]


def setup(app: Sphinx) -> None:
    """Register the navigation and the charts."""
    app.connect("source-read", add_navigation)
    app.add_directive("mermaid", Mermaid)
