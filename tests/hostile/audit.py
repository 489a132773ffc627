"""Ask pip-audit about the pinned versions. Exit code 1 if one has a known vulnerability.

Where its service cannot be reached, or answers without knowing a single pin, this says so and is no failure:
nothing was found out either way.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
# Every dependency has its line, so nothing is left to resolve.
COMMAND = (sys.executable, "-m", "pip_audit", "--no-deps", "--disable-pip", "--progress-spinner", "off")
UNREACHABLE = ("ConnectionError", "ServiceError", "Max retries", "Temporary failure", "HTTPError", "timed out")


def main() -> int:
    command = [*COMMAND, "--format", "json", "-r", str(CONSTRAINTS)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return _skipped("pip-audit's service did not answer in five minutes")
    if not done.stdout.strip():
        if any(word in done.stderr for word in UNREACHABLE):
            return _skipped("pip-audit's service cannot be reached")
        print(done.stderr, end="", file=sys.stderr)
        return done.returncode or 1
    pins = json.loads(done.stdout)["dependencies"]
    known = [pin for pin in pins if "skip_reason" not in pin]
    if not known:
        return _skipped(f"pip-audit's service answers, but knows none of the {len(pins)} pins")
    vulnerable = [pin for pin in known if pin["vulns"]]
    for pin in vulnerable:
        for found in pin["vulns"]:
            mended = ", ".join(found["fix_versions"]) or "no version"
            print(f"{pin['name']} {pin['version']}: {found['id']}, mended in {mended}")
    for pin in pins:
        if "skip_reason" in pin:
            print(f"Not audited: {pin['name']}")
    print(f"{len(known)} of {len(pins)} pins audited, {len(vulnerable)} with a known vulnerability.")
    return 1 if vulnerable else 0


def _skipped(why: str) -> int:
    print(f"Skipped: {why}. Nothing was audited.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
