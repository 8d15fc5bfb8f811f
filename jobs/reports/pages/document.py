"""HTML documents from the templates: each is one file without links to other hosts, and all names in it are escaped."""

import base64
import functools
import importlib.metadata
import json
import platform
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jobs.reports.pages import charts
from jobs.reports.pages.metrics import metric

TEMPLATES = Path(__file__).parent.parent / "templates"
PACKAGES = ("tokenmill", "torch", "ray", "numpy")
CARD_ID = "tokenmill-card"  # of the element that holds a page's summary, for index.html
INDEX = "index.html"


@dataclass
class Header:
    """The top of a page. kind: of the page, such as "evaluation". lead: sentences that say the result. facts: what was
    done, on what: label and value. headline: names of numbers to show large. thumbnail: an image as a data URL.
    """

    kind: str
    title: str
    lead: str
    facts: dict[str, Any] = field(default_factory=dict)
    headline: list[str] = field(default_factory=list)
    command: str = ""
    thumbnail: str = ""
    in_run: bool = True  # whether index.html of the run is beside it
    made: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()))


def render(template: str, header: Header, numbers: dict[str, Any], **context: Any) -> bytes:
    """The page. numbers: shown in tiles (those of header.headline) and in a table, explained by METRICS."""
    page = environment().get_template(template)
    card = json_for_script(_card(header, numbers))
    return page.render(header=header, numbers=numbers, card=card, versions=versions(), **context).encode()


def fragment(template: str, **context: Any) -> str:
    """A part of a page."""
    return environment().get_template(template).render(**context)


def _card(header: Header, numbers: dict[str, Any]) -> dict[str, Any]:
    """The summary of a page, for index.html."""
    shown = {metric(name).label: metric(name).with_unit(numbers[name]) for name in header.headline if name in numbers}
    facts = ("kind", "title", "lead", "made", "thumbnail")
    return {**{name: getattr(header, name) for name in facts}, "numbers": shown}


def card_of(page: bytes) -> dict[str, Any] | None:
    """The summary in a page; None for a page of an earlier version."""
    _, found, rest = page.decode(errors="replace").partition(f'id="{CARD_ID}">')
    return json.loads(rest.partition("</script>")[0]) if found else None


@functools.cache
def environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.globals |= {"metric": metric, "charts": charts, "index": INDEX, "card_id": CARD_ID}
    env.globals |= {"style": _source("style.css"), "script": _source("page.js")}
    env.globals |= {"python": platform.python_version()}
    env.filters |= {"json": json_for_script, "count": lambda number: f"{number:,}"}
    return env


def _source(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text())


def json_for_script(value: Any) -> Markup:
    """JSON that can stand in a <script> element: no text in it can end the element."""
    text = json.dumps(value, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@functools.cache
def versions() -> str:
    """Names and versions of what made a page."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:  # tokenmill in a checkout that is not installed
            continue
    return ", ".join(found)


def data_url(data: bytes, mime: str) -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"


def in_words(shards: Any) -> str:
    """The value of data.shards: a pattern, or the first of a list and how many there are."""
    if not isinstance(shards, list):
        return str(shards)
    return f"{shards[0]} and {len(shards) - 1} more" if len(shards) > 1 else "".join(map(str, shards))
