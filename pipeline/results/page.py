"""Render a run's report as one self-contained HTML file.

Jinja escapes every value, as URIs and class names come from buckets and checkpoints; in addition,
the page's Content-Security-Policy forbids scripts and other hosts.
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
    """Return the report as HTML in UTF-8."""
    jinja = Environment(
        autoescape=True,
        finalize=_visible,
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


def _visible(value: Any) -> Any:
    """Return text with control and bidirectional characters escaped, other values unchanged."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in value)


def _facts(report: Report) -> list[tuple[str, str]]:
    """Return (name, value) of the table at the top."""
    counts = f"{report.ok:,} segmented, {report.errors:,} errors"
    facts = [("results", report.results), ("images", counts)]
    if report.labeled:
        facts.append(("labeled images", f"{report.labeled:,}"))
        if report.mean_iou is not None:
            facts.append(("mean IoU", f"{report.mean_iou:.1%}"))
    if report.record is None:
        return [*facts, ("state", "unfinished; shows the images completed so far")]
    return facts + _record_facts(report.record)


def _record_facts(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [
        ("started", f"{record['started_at']:%Y-%m-%d %H:%M} UTC"),
        ("finished", f"{record['finished_at']:%Y-%m-%d %H:%M} UTC"),
        ("checkpoint", f"{record['checkpoint']} (sha256 {record['checkpoint_sha256']})"),
        ("arguments", _compact(record["arguments"])),
        ("code version", record["code_version"]),
    ]
    if record["images_per_second"]:
        facts.append(("speed", f"{record['images_per_second']:,.1f} images per second"))
    if record["gpu_seconds"]:
        price = "" if record["cost"] is None else f", cost {record['cost']:,.2f}"
        facts.append(("GPU hours", f"{record['gpu_seconds'] / 3600:,.2f}{price}"))
    return facts


def _compact(arguments: str) -> str:
    """Return the values of a JSON object as name=value, without those that are null or empty."""
    values = json.loads(arguments)
    return ", ".join(f"{name}={value}" for name, value in values.items() if value not in (None, []))


def _bins(counts: tuple[int, ...]) -> list[tuple[float, float, int]]:
    """Return (low, high, images) of the histogram, from the first non-empty bin on."""
    first = next((number for number, count in enumerate(counts) if count), len(counts))
    return [(i / BINS, (i + 1) / BINS, counts[i]) for i in range(first, len(counts))]
