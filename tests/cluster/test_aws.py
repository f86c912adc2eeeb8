"""cluster/aws.yaml against Ray's reader and AWS's description of its API."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.validate
import pytest
import yaml
from botocore.model import ServiceModel
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

FILE = Path(__file__).parents[2] / "cluster" / "aws.yaml"
CONSTRAINTS = FILE.parents[1] / "constraints.txt"

# what Ray reads of a node_config and does not hand on, or adds itself
_LAUNCH = {"MinCount": 1, "MaxCount": 1}


@pytest.fixture
def given() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return found


def test_ray_accepts_the_file(given: dict[str, Any]) -> None:
    config = prepare_config(given)
    validate_config(config)
    assert config["available_node_types"]["head"]["max_workers"] == 0
    broken = copy.deepcopy(config)
    broken["available_node_types"]["gpu"]["minworkers"] = 1
    with pytest.raises(ValidationError, match="minworkers"):
        validate_config(broken)


def test_the_head_has_no_cpus_and_gpu_workers_are_spot_instances(
    given: dict[str, Any],
) -> None:
    nodes = given["available_node_types"]
    assert given["head_node_type"] == "head"
    assert nodes["head"]["resources"] == {"CPU": 0, "GPU": 0}
    assert nodes["gpu"]["min_workers"] == 0
    assert nodes["gpu"]["max_workers"] == given["max_workers"]
    assert nodes["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in nodes["head"]["node_config"]
    [start] = [line for line in given["head_start_ray_commands"] if "ray start" in line]
    assert "--num-cpus=0" in start
    assert "--dashboard-host=127.0.0.1" in start


def test_ec2_accepts_the_instances(given: dict[str, Any]) -> None:
    described = botocore.loaders.Loader().load_service_model("ec2", "service-2")
    shape = ServiceModel(described).operation_model("RunInstances").input_shape
    checker = botocore.validate.ParamValidator()
    for node in given["available_node_types"].values():
        report = checker.validate({**node["node_config"], **_LAUNCH}, shape)
        assert not report.has_errors(), report.generate_report()
        misspelt = {**node["node_config"], "IamInstanceProfil": {}, **_LAUNCH}
        assert checker.validate(misspelt, shape).has_errors()


def test_instances_have_their_own_roles_and_no_keys(given: dict[str, Any]) -> None:
    profiles = {
        name: node["node_config"]["IamInstanceProfile"]["Name"]
        for name, node in given["available_node_types"].items()
    }
    assert profiles == {"head": "deeplab-head", "gpu": "deeplab-worker"}
    for node in given["available_node_types"].values():
        assert node["node_config"]["MetadataOptions"]["HttpTokens"] == "required"
    assert "SECRET_ACCESS_KEY" not in FILE.read_text()


def test_every_node_requires_the_token(given: dict[str, Any]) -> None:
    assert "--env RAY_AUTH_MODE=token" in given["docker"]["run_options"]
    assert given["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}


def test_boto3_has_the_version_of_botocore(given: dict[str, Any]) -> None:
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().split())
    [install] = given["head_setup_commands"]
    assert f"boto3=={pins['botocore']}" in install
