"""A run's report as one HTML file, which people open without a server.

What comes from a bucket or a checkpoint is escaped wherever it stands (Jinja does that to every
value), and the page's own policy forbids scripts and other hosts besides.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pipeline.results.report import BINS, Report

_TEMPLATE = Path(__file__).with_name("report.html.jinja")


def render_html(report: Report) -> bytes:
    """The report as UTF-8."""
    jinja = Environment(
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    jinja.filters["base64"] = lambda data: base64.b64encode(data).decode()
    text: str = jinja.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        facts=_facts(report),
        scored=any(row.iou is not None for row in report.classes),
        bins=_bins(report.confidence),
    )
    return text.encode()


def _plain(value: Any) -> Any:
    """Text with what does not print, or turns the direction of what follows, spelled out."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def _facts(report: Report) -> list[tuple[str, str]]:
    """What stands at the top: name and value."""
    counted = f"{report.ok:,} segmented, {report.errors:,} errors"
    facts = [("results", report.results), ("photos", counted)]
    if report.labelled:
        mean = "" if report.mean_iou is None else f", mean IoU {report.mean_iou:.1%}"
        facts.append(("with labels", f"{report.labelled:,}{mean}"))
    if report.record is None:
        return [*facts, ("state", "unfinished: this is what was done when the report was made")]
    return facts + _of_record(report.record)


def _of_record(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("started", f"{record['started_at']:%Y-%m-%d %H:%M} UTC"),
        ("finished", f"{record['finished_at']:%Y-%m-%d %H:%M} UTC"),
        ("checkpoint", f"{record['checkpoint']} (sha256 {record['checkpoint_sha256']})"),
        ("arguments", _compact(record["arguments"])),
        ("code", record["code_version"]),
    ]
    if record["images_per_second"]:
        facts.append(("speed", f"{record['images_per_second']:,.1f} photos a second"))
    if record["gpu_seconds"]:
        price = "" if record["cost"] is None else f", which cost {record['cost']:,.2f}"
        facts.append(("GPU hours", f"{record['gpu_seconds'] / 3600:,.2f}{price}"))
    return facts


def _compact(arguments: str) -> str:
    """JSON's values by name, without those that are null or empty."""
    values = json.loads(arguments)
    return ", ".join(f"{name}={value}" for name, value in values.items() if value not in (None, []))


def _bins(counts: tuple[int, ...]) -> list[tuple[float, float, int]]:
    """(from, to, photos) of the histogram, from the first part that has a photo."""
    first = next((number for number, count in enumerate(counts) if count), len(counts))
    return [(i / BINS, (i + 1) / BINS, counts[i]) for i in range(first, len(counts))]
