"""A program that ends as it is told: python -m tests.pod.ends FILE CODE [CODE ...]

The n-th start ends with the n-th code, minus a signal, or "sleep": 7 once SIGTERM comes. Each adds
a line with its arguments to FILE.
"""

import os
import signal
import sys
import time
from pathlib import Path

file, *codes = sys.argv[1:]
codes = [code for code in codes if not code.startswith("--")]
with Path(file).open("a") as log:
    log.write(" ".join(sys.argv[1:]) + "\n")
code = codes[len(Path(file).read_text().splitlines()) - 1]
if code == "sleep":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
    Path(file).with_suffix(".asleep").touch()
    time.sleep(60)
if int(code) < 0:
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
