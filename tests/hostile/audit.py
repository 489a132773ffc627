"""Ask pip-audit about the pinned versions. Exit code 1 if one has a known vulnerability.

Where the tool is not installed or its service cannot be reached, this says so and is no failure: nothing was found
out either way.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
UNREACHABLE = ("ConnectionError", "ServiceError", "Max retries", "Temporary failure", "HTTPError", "timed out")


def main() -> int:
    if importlib.util.find_spec("pip_audit") is None:
        print("Skipped: pip-audit is not installed (pip install pip-audit). Nothing was audited.")
        return 0
    command = [sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off"]
    try:
        done = subprocess.run([*command, "-r", str(CONSTRAINTS)], capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        print("Skipped: pip-audit's service did not answer in five minutes. Nothing was audited.")
        return 0
    if done.returncode and any(word in done.stderr for word in UNREACHABLE):
        print("Skipped: pip-audit's service cannot be reached. Nothing was audited.")
        return 0
    print(done.stdout + done.stderr, end="")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
