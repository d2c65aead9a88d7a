"""``make sbom``: what a station's stationkey is made of, as a CycloneDX document.

The packages are those of ``requirements/station.txt``, or of another file. cyclonedx-py reads it for versions and
hashes, and an environment where they are installed for licences and for what needs what. What a package has built in,
OpenSSL in cryptography for one, comes from the SBOM that the package brings along [PEP 770], and stands inside it.

Use: sbom.py [--python ENVIRONMENT'S] [--pinned FILE] [--debian PACKAGE ...] FILE
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.markers import Marker

ROOT = Path(__file__).parent.parent
PINNED = ROOT / "requirements/station.txt"

Component = dict[str, Any]


def time_of_sources() -> str:
    """The time of the last commit, or of the project's file: the same sources make the same document."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return commit or str(int((ROOT / "pyproject.toml").stat().st_mtime))


def cyclonedx(*arguments: str | Path) -> Component:
    """What cyclonedx-py says."""
    program = [sys.executable, "-W", "ignore", "-m", "cyclonedx_py"]
    options = (
        "--pyproject",
        ROOT / "pyproject.toml",
        "--output-reproducible",
        "--no-validate",
        "--spec-version",
        "1.6",
    )
    variables = {"SOURCE_DATE_EPOCH": time_of_sources()} | os.environ
    said = subprocess.run([*program, *arguments, *options], env=variables, capture_output=True, text=True, check=False)
    if said.returncode != 0:
        raise SystemExit(f"sbom: cyclonedx-py failed: {said.stderr.strip()}")
    document: Component = json.loads(said.stdout)
    return document


def name_of(component: Component) -> str:
    """A package's name in the one spelling that compares [PEP 503]."""
    return str(component["name"]).lower().replace("_", "-").replace(".", "-")


def inside(site_packages: Path, component: Component) -> list[Component]:
    """What a package says to have built into it [PEP 770]."""
    found: dict[str, Component] = {}
    distribution = f"{name_of(component).replace('-', '_')}-{component['version']}.dist-info"
    for path in sorted(site_packages.glob(f"{distribution}/sboms/*.json")):
        for part in json.loads(path.read_text()).get("components", []):
            kept = {key: part[key] for key in ("type", "name", "version", "purl", "licenses") if key in part}
            reference = f"{component['name']}/{part['name']}@{part.get('version', '')}"
            found[reference] = {"bom-ref": reference, **kept}
    return list(found.values())


def package_of_debian(name: str) -> Component:
    """A package of the system that ours depends on, in the version that was there when this was made."""
    fields = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}\\n${Architecture}\\n", name], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if len(fields) < 2:  # noqa: PLR2004 - the two that were asked for
        raise SystemExit(f"sbom: the Debian package {name} is not installed")
    purl = PackageURL("deb", "debian", name, fields[0], {"arch": fields[1]})
    return {
        "type": "library",
        "bom-ref": f"debian/{name}",
        "name": name,
        "version": fields[0],
        "purl": purl.to_string(),
        "scope": "required",
        "properties": [{"name": "stationkey:provided-by", "value": "the operating system"}],
    }


def not_for_here(requirements: str) -> set[str]:
    """The packages that are pinned for other systems or versions of Python [PEP 508]."""
    found = re.findall(r"^([\w.-]+)==\S+ ; ([^\\\n]+)", requirements, re.MULTILINE)
    return {name for name, marker in found if not Marker(marker.strip()).evaluate()}


def document(python: Path, debian: list[str], pinned_in: Path = PINNED) -> Component:
    """The whole SBOM."""
    others = not_for_here(pinned_in.read_text())
    listed = {name_of(component): component for component in cyclonedx("requirements", pinned_in)["components"]}
    pinned = {name: component for name, component in listed.items() if name not in others}
    sbom = cyclonedx("environment", python)
    installed = {name_of(component): component for component in sbom.get("components", [])}
    site_packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    components = []
    for name, pin in sorted(pinned.items()):
        component = installed.get(name)
        if component is None or component["version"] != pin["version"]:
            have = "not installed" if component is None else f"installed as {component['version']}"
            raise SystemExit(f"sbom: {name} is pinned to {pin['version']}, and {have}; make setup puts it right")
        component["externalReferences"] = [*component.get("externalReferences", []), *pin["externalReferences"]]
        if parts := inside(Path(site_packages), component):
            component["components"] = parts
        components.append(component)
    system = [package_of_debian(name) for name in debian]
    # cyclonedx-py reads pyproject.toml, where the version is dynamic.
    sbom["metadata"]["component"]["version"] = runpy.run_path(str(ROOT / "src/stationkey/_version.py"))["__version__"]
    root = sbom["metadata"]["component"]["bom-ref"]
    kept = {root, *(component["bom-ref"] for component in components)}
    needs = {
        entry["ref"]: sorted(set(entry.get("dependsOn", [])) & kept)
        for entry in sbom.get("dependencies", [])
        if entry["ref"] in kept
    }
    needs[root] += [component["bom-ref"] for component in system]
    return sbom | {
        "components": components + system,
        "dependencies": [{"ref": ref, "dependsOn": found} for ref, found in sorted(needs.items())],
    }


def main(arguments: list[str]) -> int:
    """Write it, if it is to the specification."""
    parser = argparse.ArgumentParser(description="Write the SBOM of what a station runs.")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="interpreter of the environment")
    parser.add_argument("--pinned", type=Path, default=PINNED, help="requirements file of the packages")
    parser.add_argument("--debian", nargs="*", default=[], metavar="PACKAGE", help="packages of the system in it")
    parser.add_argument("file", type=Path)
    options = parser.parse_args(arguments)
    text = json.dumps(document(options.python, options.debian, options.pinned), indent=2, ensure_ascii=False) + "\n"
    if (wrong := JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)) is not None:
        raise SystemExit(f"sbom: what was made is no CycloneDX: {wrong}")
    options.file.parent.mkdir(parents=True, exist_ok=True)
    options.file.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
