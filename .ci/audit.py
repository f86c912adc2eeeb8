"""Check the packages pinned in constraints.txt for known vulnerabilities: `make audit`.

    python .ci/audit.py [OPTION OF PIP-AUDIT ...]

Runs pip-audit, which queries the package index (or, with `-s osv --osv-url URL`, another source),
except for audit-exceptions.json: {"ID": {"until": "2027-01-31", "why": "..."}}. Exits 0 without
findings; 1 with findings, with an expired exception, and if a package could not be looked up.
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
    """Print the findings, one per line, and return the exit code."""
    report = _run_pip_audit(options)
    if report is None:
        print("audit failed: pip-audit gave no result; its output is above")
        return 1
    excepted = json.loads(exceptions.read_text())
    today = date.today().isoformat()
    bad = [f"exception {name} expired on {each['until']}: {each['why']}"
           for name, each in excepted.items() if each["until"] < today]  # fmt: skip
    unknown = [each["name"] for each in report["dependencies"] if "skip_reason" in each]
    if unknown:
        shown = ", ".join(unknown[:5]) + (", ..." if len(unknown) > 5 else "")
        bad.append(f"{len(unknown)} packages could not be looked up: {shown}")
    for package in report["dependencies"]:
        for found in package.get("vulns", ()):
            names = {found["id"], *found.get("aliases", ())}
            if not names & set(excepted):
                fixed = ", ".join(found["fix_versions"]) or "no version"
                bad.append(
                    f"{package['name']} {package['version']}: {found['id']}, fixed in {fixed}"
                )
    checked = len(report["dependencies"]) - len(unknown)
    print("\n".join([*bad, f"audit: {checked} packages looked up, {len(bad)} findings"]))
    return 1 if bad else 0


def _run_pip_audit(options: Sequence[str]) -> dict[str, Any] | None:
    """Return the report of pip-audit on the pinned packages, None if it fails."""
    command = ["pip-audit", "--requirement", str(ROOT / "constraints.txt"), "--no-deps"]
    command += ["--disable-pip", "--format", "json", "--progress-spinner", "off", *options]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    try:
        report: dict[str, Any] = json.loads(result.stdout)
    except ValueError:
        return None
    return report


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
