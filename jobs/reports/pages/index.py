"""RUN/reports/index.html: a card for each page of the run, and links to its other reports."""

from typing import Any

from jobs.reports.pages.document import INDEX, Header, card_of, render
from pipeline import storage

ORDER = ("comparison", "evaluation", "training", "codebook")  # of the kinds of pages, the most looked at first
TITLES = {
    "train.jsonl": "training log, a row of JSON for each logged step",
    "train.png": "training curves",
    "skipped.jsonl": "samples that could not be decoded, with reasons",
    "profile.json": "where the time of the training went",
    "compare.md": "comparison as Markdown",
    "compare.csv": "comparison as CSV",
    "compare.json": "comparison, with the numbers of each trial",
}
KINDS = {  # start and end of other names
    ("evaluate-", ".json"): "numbers of the evaluation",
    ("evaluate-", ".png"): "originals and reconstructions",
    ("codebook-", ".json"): "numbers of the codebook",
    ("compare-", ".png"): "plots and pictures of the comparison",
    ("nan-step-", ".json"): "samples of the step in which the loss was not finite",
}
INTERNAL = ("train-live.json", "train-film.json")  # files that only pages and resumed runs read


def write_index(folder: str) -> None:
    """Makes RUN/reports/index.html of the reports that are in the folder now. folder: the URL of RUN/reports."""
    names = [url.rsplit("/", 1)[1] for url in storage.list_files(folder)]
    pages = [name for name in names if name.endswith(".html") and name != INDEX]
    cards = [card for name in pages if (card := _card(folder, name))]
    cards.sort(key=lambda card: (ORDER.index(card["kind"]) if card["kind"] in ORDER else len(ORDER), card["name"]))
    files = {name: _about(name) for name in names if name not in pages and _is_listed(name)}
    storage.replace(storage.join(folder, INDEX), index_page(folder.rsplit("/", 2)[1], cards, files))


def index_page(run: str, cards: list[dict[str, Any]], files: dict[str, str]) -> bytes:
    """cards: summaries of pages, with the name of the file. files: other reports and what they are."""
    kinds = ", ".join(dict.fromkeys(card["kind"] for card in cards))
    many = f"{len(cards)} pages ({kinds})" if len(cards) != 1 else f"one page ({kinds})"
    header = Header("run", run, f"This run has {many}.", in_run=False)
    return render("index.html", header, {}, cards=cards, files=files)


def _about(name: str) -> str:
    kinds = (words for (start, end), words in KINDS.items() if name.startswith(start) and name.endswith(end))
    return TITLES.get(name) or next(kinds, "")


def _is_listed(name: str) -> bool:
    return name != INDEX and not name.startswith(".") and name not in INTERNAL


def _card(folder: str, name: str) -> dict[str, Any] | None:
    """The summary of a page; its name alone if an earlier version made it. None if it has gone since it was listed."""
    page = storage.read_if_exists(storage.join(folder, name))
    if page is None:
        return None
    card = card_of(page) or {"kind": "earlier version", "title": name, "lead": "", "made": "", "thumbnail": ""}
    return {"numbers": {}, **card, "name": name}
