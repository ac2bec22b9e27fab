"""A measured number beside the published one of the same model and protocol."""

from typing import Any

from fdkit.evaluation._protocols import Protocol
from fdkit.teachers.catalog import CATALOG

IMAGENET_VALIDATION = (1000, 50_000)
"""Classes and images of what the published figures were measured on."""


def against_published(protocol: Protocol, model: str, numbers: dict[str, Any]) -> dict[str, Any]:
    """What a result says of its protocol: name, version, pinned fields, source, departures, and the published figure.

    model: as the user named it. "published" is None where the catalog has no figure of that model by that protocol;
    "difference", in top-1, is None unless the images are as many, of as many classes, as ImageNet-1K's validation set.
    """
    row = CATALOG.get(model)
    is_known = row is not None and model.startswith(protocol.models)
    published = row.published.get(protocol.published) if row is not None and is_known else None
    test = numbers.get("test", {})
    measured_on = (test.get("num_classes"), test.get("num_images"))
    is_imagenet = measured_on == IMAGENET_VALIDATION
    return {
        "name": protocol.name,
        "version": protocol.version,
        "fields": dict(protocol.fields),
        "source": protocol.source,
        "departures": list(protocol.departures),
        "published": published,
        "published_source": row.published_source if row is not None and published is not None else None,
        "difference": numbers["top1"] - published if published is not None and is_imagenet else None,
    }


def show_protocol(named: dict[str, Any]) -> None:
    """The protocol, how it departs, and the published figure, on standard output."""
    print(f"protocol {named['name']}, version {named['version']}: {named['source']}")
    for departure in named["departures"]:
        print(f"  differs: {departure}")
    if named["published"] is None:
        return
    line = f"  published on ImageNet-1K: {100 * named['published']:.1f} % ({named['published_source']})"
    if named["difference"] is not None:
        line += f"; here {100 * named['difference']:+.1f} points"
    print(line)
