"""``python -m bench.protection``: what each protection of ``[tpm]`` adds to a request.

One daemon for each, with a TPM of its own, asked in turns: what is compared was measured in the same seconds.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from peers import Swtpm

from bench import ROOT
from bench.sides import GAP, KIND, LIFECYCLE, Act, StockMosquitto, station

KINDS: Final = ("P-256", "P-521")
REQUESTS: Final = 60
WARM_UP: Final = 10
PROTECTIONS: Final = {
    "none": "",
    "`key_auth` from a file": 'key_auth = "{secret}"\n',
    '`key_auth = "generated"`': 'key_auth = "generated"\n',
    "`pcrs = [0, 7]`": "pcrs = [0, 7]\n",
    '`session = "hmac"`': 'session = "hmac"\n',
    '`session = "encrypted"`': 'session = "encrypted"\n',
    "value, registers, encrypted": 'key_auth = "generated"\npcrs = [0, 7]\nsession = "encrypted"\n',
}


def main() -> None:
    """Measure, and print a table of medians."""
    base = ROOT / ".bench"
    base.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=base) as name, ExitStack() as stack:
        folder = Path(name)
        secret = folder / "secret"
        secret.write_text("the value of the keys")
        secret.chmod(0o600)
        broker = stack.enter_context(StockMosquitto(folder / "broker"))
        acts: dict[tuple[str, str], Act] = {}
        for number, (words, options) in enumerate(PROTECTIONS.items()):
            tpm = stack.enter_context(Swtpm(folder / f"tpm{number}"))
            configuration = f"{LIFECYCLE}[tpm]\n{options.format(secret=secret)}"
            one = stack.enter_context(station(folder, broker, tpm, f"daemon{number}", configuration=configuration))
            acts |= {(words, kind): one.asker.act(KIND[kind]) for kind in KINDS}
        samples: dict[tuple[str, str], list[float]] = {each: [] for each in acts}
        for act in acts.values():
            for _ in range(WARM_UP):
                act()
        for _ in range(REQUESTS):
            for each, act in acts.items():
                samples[each].append(act())
                time.sleep(GAP)
    print(f"| `[tpm]` | {' | '.join(KINDS)} |")  # noqa: T201 - what it is for
    print("| --- |" + " ---: |" * len(KINDS))  # noqa: T201 - same
    for words in PROTECTIONS:
        medians = [statistics.median(samples[words, kind]) for kind in KINDS]
        print(f"| {words} | " + " | ".join(f"{median:.2f} ms" for median in medians) + " |")  # noqa: T201 - same


if __name__ == "__main__":
    main()
