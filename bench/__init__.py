"""Measure stationkey beside the TPM alone and beside other programs. Run: ``python -m bench``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parent.parent
"""The repository."""

# The broker and the TPM that demo and tests start as well; `scripts` is a folder of programs and no package.
sys.path.append(str(ROOT / "scripts"))
