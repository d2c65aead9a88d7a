"""``stationkey``, with the reason of a failure in the file that ``REASON_FILE`` names."""

from __future__ import annotations

import os
from pathlib import Path

from reasons import noted_reasons

from stationkey.cli import main

with noted_reasons() as noted:
    try:
        main(prog_name="stationkey")
    finally:
        Path(os.environ["REASON_FILE"]).write_text(noted[-1] if noted else "")
