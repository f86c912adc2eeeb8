"""Are there known vulnerabilities in what constraints.txt pins? `make audit`.

    python .ci/audit.py [OPTION OF PIP-AUDIT ...]

Asks pip-audit, which asks the package index (or with `-s osv --osv-url URL` another source), and
leaves out the exceptions of audit-exceptions.json: {"ID": {"until": "2027-01-31", "why": "..."}}.
Exits 0 where nothing is known; 1 where something is, where an exception has run out, and where a
package could not be looked up: a source that knows nothing is no clean bill.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXCEPTIONS = Path(__file__).with_name("audit-exceptions.json")


def main(options: Sequence[str], exceptions: Path = EXCEPTIONS) -> int:
    """Prints what is found, a line each; the exit code."""
    answer = _ask(options)
    if answer is None:
        print("audit failed: pip-audit gave no answer; its own words are above")
        return 1
    excepted = json.loads(exceptions.read_text())
    today = date.today().isoformat()
    bad = [f"exception {name} ran out on {each['until']}: {each['why']}"
           for name, each in excepted.items() if each["until"] < today]  # fmt: skip
    unknown = [each["name"] for each in answer["dependencies"] if "skip_reason" in each]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        bad.append(f"{len(unknown)} packages could not be looked up: {shown}")
    for package in answer["dependencies"]:
        for found in package.get("vulns", ()):
            names = {found["id"], *found.get("aliases", ())}
            if not names & set(excepted):
                fixed = ", ".join(found["fix_versions"]) or "no version"
                bad.append(
                    f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}"
                )
    looked = len(answer["dependencies"]) - len(unknown)
    print("\n".join([*bad, f"audit: {looked} packages looked up, {len(bad)} findings"]))
    return 1 if bad else 0


def _ask(options: Sequence[str]) -> dict[str, Any] | None:
    """What pip-audit says of the pinned packages; None where it fails."""
    command = ["pip-audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", *options]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        answer: dict[str, Any] = json.loads(said.stdout)
    except ValueError:
        return None
    return answer


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
