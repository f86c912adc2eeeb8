"""KubeRay's schemas as JSON schemas that refuse unknown fields.

A custom resource definition is structural: Kubernetes drops unknown fields in silence, which is how
a misspelt field goes unnoticed until the night it was needed. Here they are errors.
"""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

VARIABLE = "KUBERAY_CRD"


def schemas() -> dict[str, jsonschema.Draft7Validator]:
    """Kind -> validator of ray.io/v1. Skips the test if the schemas are missing."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(
            f"${VARIABLE} names no folder with KubeRay 1.7's definitions as JSON "
            "(ray.io_rayclusters.json, ray.io_rayjobs.json), which are not copied into the project"
        )
    return _schemas(Path(folder))


@cache
def _schemas(folder: Path) -> dict[str, jsonschema.Draft7Validator]:
    found = {}
    for name in ("rayclusters", "rayjobs"):
        definition = json.loads((folder / f"ray.io_{name}.json").read_text())
        [version] = [each for each in definition["spec"]["versions"] if each["name"] == "v1"]
        schema = _strict(version["schema"]["openAPIV3Schema"])
        for field in ("apiVersion", "kind", "metadata"):  # the API server's own
            schema["properties"][field] = {}
        found[definition["spec"]["names"]["kind"]] = jsonschema.Draft7Validator(schema)
    return found


def _strict(schema: Any) -> Any:
    """The schema with every object closed, and Kubernetes' integers-or-strings as both."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    strict = {key: _strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict):
        strict["properties"] = {name: _strict(each) for name, each in schema["properties"].items()}
        if "additionalProperties" not in schema and not _is_open(schema):
            strict["additionalProperties"] = False
    if schema.get("x-kubernetes-int-or-string") is True:
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return strict


def _is_open(schema: dict[str, Any]) -> bool:
    return schema.get("x-kubernetes-preserve-unknown-fields") is True
