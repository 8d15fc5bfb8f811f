"""HTML pages with tables, images and audio players, each in a single file."""

import base64
import html
from dataclasses import dataclass
from typing import Any


@dataclass
class Example:
    """An original and its reconstruction. views: both as PNGs. files: both as media files of type mime."""

    key: str
    mime: str
    views: tuple[bytes, ...]
    files: tuple[bytes, ...]


def page(title: str, sections: list[str]) -> bytes:
    """A page that needs no other file. sections: HTML."""
    style = (
        "body{font-family:sans-serif;max-width:70em;margin:2em auto;padding:0 1em}table{border-collapse:collapse}"
        "td,th{border:1px solid #ccc;padding:.3em .6em;text-align:left}figure{display:inline-block;margin:.4em}"
        "figcaption{font-size:.8em;color:#555}.pair img{height:160px;image-rendering:auto}img{max-width:100%}"
        ".pair span{display:inline-block}audio{width:20em}"
    )
    body = "\n".join(sections)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        f"<style>{style}</style><h1>{html.escape(title)}</h1>\n{body}</html>\n"
    ).encode()


def table(rows: dict[str, Any]) -> str:
    cells = "".join(f"<tr><th>{html.escape(k)}<td>{html.escape(_short(v))}" for k, v in rows.items())
    return f"<table>{cells}</table>"


def picture(png: bytes, caption: str = "") -> str:
    return f"<figure><img src='{_data_url(png)}'><figcaption>{html.escape(caption)}</figcaption></figure>"


def side_by_side(example: Example) -> str:
    """Original left, reconstruction right; media other than images get a player below."""
    cells = [
        f"<span><img src='{_data_url(view)}'>{_player(example.mime, data)}</span> "
        for view, data in zip(example.views, example.files, strict=True)
    ]
    return f"<figure class=pair>{''.join(cells)}<figcaption>{html.escape(example.key)}</figcaption></figure>"


def _player(mime: str, data: bytes) -> str:
    kind = mime.split("/")[0]
    return "" if kind == "image" else f"<br><{kind} controls preload=none src='{_data_url(data, mime)}'></{kind}>"


def _short(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
