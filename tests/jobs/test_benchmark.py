"""`jobs/benchmark.py` as a user runs it, on a network and an image small enough for a CPU."""

import json

import pytest
import torch

from jobs import benchmark
from jobs.benchmark import main
from pipeline.cli import benchmark_forms
from pipeline.model import timing
from pipeline.model.config import ModelConfig
from pipeline.model.deeplab import DeepLabV3


@pytest.fixture
def tiny(monkeypatch):
    """ResNet-18 stands in for whatever network is asked for."""

    def build(_, output_stride):
        config = ModelConfig(
            backbone="resnet18",
            num_classes=3,
            output_stride=output_stride,
            style="torchvision",
            multi_grid=(1, 1, 1),
        )
        return DeepLabV3(config).eval()

    monkeypatch.setattr(benchmark, "build", build)
    monkeypatch.setitem(timing._MATMUL_SIDE, "cpu", 64)


def arguments(*more):
    return ["--size", "33", "--backbones", "resnet50", "--output-strides", "16", *more]


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_each_row_is_measured_or_has_a_reason_in_table_and_json_alike(tmp_path, capsys):
    out = tmp_path / "out.json"
    forms = ("plain", "channels_last", "torchvision", "fast")
    assert main(arguments("--forms", *forms, "--repeats", "1", "--json", str(out))) == 0
    found = json.loads(out.read_text())
    rows = {(row["form"], row["protocol"]): row for row in found["rows"]}
    assert set(rows) == {(form, each) for form in forms for each in ("single", "multi")}
    printed = capsys.readouterr().out
    assert printed.count("| resnet18 | 16 |") == len(rows)
    for (form, _), row in rows.items():
        if form == "torchvision":
            assert "torchvision" in row["left_out"]
            continue
        assert row["left_out"] is None
        assert 0 < row["executed_flops"] < row["nominal_flops"]
        rate = found["product_flops"][row["dtype"]]
        assert row["share_of_products"] == pytest.approx(row["executed_flops"] / rate)
        assert row["peak_bytes"] > 10e6
    # 17.375 passes by hand: 2 x (1/4 + 9/16 + 1 + 25/16 + 9/4 + 49/16).
    work = {each: rows["plain", each] for each in ("single", "multi")}
    ratio = (work["multi"]["nominal_flops"] * work["multi"]["device_s"]) / (
        work["single"]["nominal_flops"] * work["single"]["device_s"]
    )
    assert 10 < ratio < 20  # on small maps rounded sizes weigh much
    assert printed.splitlines()[-1] == "benchmark finished rows=6 left_out=2"


@pytest.mark.usefixtures("tiny")
def test_rows_that_exceed_the_time_limit_are_marked_as_left_out(capsys):
    assert main(arguments("--forms", "plain", "--minutes", "0")) == 0
    printed = capsys.readouterr().out
    assert printed.count("not measured: takes about") == 2
    assert printed.splitlines()[-1] == "benchmark finished rows=0 left_out=2"


def test_invalid_arguments_are_exit_code_2(capsys):
    assert main(["--bulk-images", "images"]) == 2
    assert main(["--size", "0"]) == 2
    assert "--bulk-checkpoint" in capsys.readouterr().out


def test_a_form_gives_the_plain_logits():
    model = benchmark_forms.build("mobilenet_v2", 16)
    x = torch.randn(1, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model.logits(x)
        for form in ("plain", "channels_last", "fast"):
            built, left_out = benchmark_forms.form_of(
                model, form, torch.device("cpu"), (33, 33), multi=False
            )
            assert left_out is None
            found = built.model.logits(x.to(built.dtype))
            assert (found - wanted).abs().max() <= 0.05 * wanted.abs().max()


def test_a_matmul_rate_is_its_work_divided_by_its_time(monkeypatch):
    monkeypatch.setitem(timing._MATMUL_SIDE, "cpu", 128)
    monkeypatch.setattr(timing, "measure", lambda *_, **__: timing.Cost(0.5, 1.0, 0))
    rate = timing.matmul_rate(torch.device("cpu"), torch.float32)
    assert rate == 2 * 128**3 / 0.5
