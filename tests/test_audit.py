"""`make audit` passes only if every pinned package was looked up and no vulnerability is known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
GOOD: dict[str, Any] = {"name": "good", "version": "1", "vulns": []}
BAD: dict[str, Any] = {
    "name": "bad",
    "version": "2",
    "vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["3"]}],
}
UNKNOWN: dict[str, Any] = {"name": "unknown", "skip_reason": "not found"}


@pytest.mark.process
@pytest.mark.parametrize(
    ("dependencies", "exceptions", "code", "says"),
    [
        ([GOOD], {}, 0, "1 packages looked up, 0 findings"),
        ([GOOD, BAD], {}, 1, "bad 2: PYSEC-1, fixed in 3"),
        ([BAD], {"PYSEC-1": "2999-01-01"}, 0, "1 packages looked up, 0 findings"),
        ([BAD], {"CVE-1": "2999-01-01"}, 0, "0 findings"),
        ([BAD], {"PYSEC-1": "2001-01-01"}, 1, "exception PYSEC-1 expired on 2001-01-01"),
        ([BAD], {"PYSEC-11": "2999-01-01"}, 1, "PYSEC-1, fixed in 3"),
        ([GOOD, UNKNOWN], {}, 1, "1 packages could not be looked up: unknown"),
        (None, {}, 1, "pip-audit gave no result"),
    ],
)
def test_the_audit_reports_findings_and_exceptions(
    tmp_path: Path, dependencies: Any, exceptions: dict[str, str], code: int, says: str
) -> None:
    response = "no answer" if dependencies is None else json.dumps({"dependencies": dependencies})
    program = tmp_path / "pip-audit"
    # exits 1 with findings, as the real one does
    program.write_text(f"#!{sys.executable}\nimport sys\nprint({response!r})\nsys.exit(1)\n")
    program.chmod(0o755)
    (tmp_path / "audit.py").write_bytes((ROOT / ".ci" / "audit.py").read_bytes())
    dated = {name: {"until": until, "why": "not used"} for name, until in exceptions.items()}
    (tmp_path / "audit-exceptions.json").write_text(json.dumps(dated))
    found = subprocess.run(
        [sys.executable, str(tmp_path / "audit.py")],
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stdout + found.stderr
    assert says in found.stdout


def test_every_known_exception_has_a_date_and_a_reason() -> None:
    known = json.loads((ROOT / ".ci" / "audit-exceptions.json").read_text())
    assert all(set(each) == {"until", "why"} and each["why"] for each in known.values())
