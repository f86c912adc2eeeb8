"""Render a folder like `kubectl kustomize`, for the features that cluster/ uses.

Resources, namespace, ConfigMaps from literals and files, JSON patches, images, replacements; any
other key of a kustomization is refused, so that nothing is left out in silence. ConfigMaps get no
hash in their names. Where kubectl is at hand, a test compares the two.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import yaml

Resource = dict[str, Any]

_KEYS = {"apiVersion", "kind", "namespace", "resources", "configMapGenerator"}
_KEYS |= {"patches", "images", "replacements"}
_WITHOUT_NAMESPACE = {"Namespace"}


def render(folder: Path) -> list[Resource]:
    """Return the resources that the folder's kustomization.yaml renders to."""
    given = yaml.safe_load((folder / "kustomization.yaml").read_text())
    unknown = set(given) - _KEYS
    assert not unknown, f"{folder}: this renderer does not know {unknown}"
    found: list[Resource] = []
    for name in given["resources"]:
        path = folder / name
        if path.is_dir():
            found += render(path.resolve())
        else:
            # a file's anchors are one object in several places: patches must not see that
            found += [
                copy.deepcopy(_unshared(each)) for each in yaml.safe_load_all(path.read_text())
            ]
    found += [_config_map(folder, each) for each in given.get("configMapGenerator", [])]
    for each in found:
        if each["kind"] not in _WITHOUT_NAMESPACE:
            each["metadata"]["namespace"] = given["namespace"]
    for patch in given.get("patches", []):
        for each in _selected(found, patch["target"]):
            for operation in yaml.safe_load(patch["patch"]):
                _apply(each, operation)
    for image in given.get("images", []):
        _set_image(found, image)
    for replacement in given.get("replacements", []):
        _replace(found, replacement)
    return found


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(each) for key, each in value.items()}
    return [_unshared(each) for each in value] if isinstance(value, list) else value


def _config_map(folder: Path, given: dict[str, Any]) -> Resource:
    data = dict(each.split("=", 1) for each in given.get("literals", []))
    data |= {name: (folder / name).read_text() for name in given.get("files", [])}
    metadata = {"name": given["name"]}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _selected(resources: list[Resource], target: dict[str, str]) -> list[Resource]:
    assert set(target) <= {"kind", "name"}
    found = [
        each
        for each in resources
        if each["kind"] == target["kind"]
        and re.fullmatch(target.get("name", ".*"), each["metadata"]["name"])
    ]
    assert found, f"nothing is {target}"
    return found


def _apply(resource: Resource, operation: dict[str, Any]) -> None:
    """Apply one operation of a JSON patch (RFC 6902): add or replace."""
    *parents, last = operation["path"].strip("/").split("/")
    place: Any = resource
    for name in parents:
        place = place[int(name)] if isinstance(place, list) else place[name]
    key = int(last) if isinstance(place, list) else last
    assert operation["op"] in ("add", "replace")
    assert isinstance(place, dict | list)
    if operation["op"] == "replace":
        place[key]  # raises where there is nothing to replace
    place[key] = copy.deepcopy(operation["value"])


def _set_image(value: Any, image: dict[str, str]) -> None:
    """Replace the image in all lists of containers below `value`."""
    if isinstance(value, list):
        for each in value:
            _set_image(each, image)
    elif isinstance(value, dict):
        for container in [*value.get("containers", []), *value.get("initContainers", [])]:
            if container.get("image") == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
        for each in value.values():
            _set_image(each, image)


def _replace(resources: list[Resource], replacement: dict[str, Any]) -> None:
    source = replacement["source"]
    [origin] = _selected(resources, {key: source[key] for key in ("kind", "name")})
    value: Any = origin
    for name in source["fieldPath"].split("."):
        value = value[name]
    for target in replacement["targets"]:
        for each in _selected(resources, target["select"]):
            for path in target["fieldPaths"]:
                *parents, last = path.split(".")
                place = each
                for name in parents:
                    place = place.setdefault(name, {})
                place[last] = copy.deepcopy(value)
