"""MkDocs hook: files outside of docs/ that the pages link to become part of the site, at their path in the repository.

README.md is the home page. A link to a file that is not published, such as a YAML file, becomes plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PUBLISHED = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "samples/README.md", "samples/speech/README.md"),
    *("results/*/*.md", "results/*/*.png"),
)
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\n)*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    files.append(File.generated(config, "index.md", abs_src_path=str(ROOT / "README.md")))
    for pattern in PUBLISHED:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, str(path.relative_to(ROOT)), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites each relative link from where the file lies in the repository to where it lies in the site."""
    source = page.file.src_uri
    in_repository = source if page.file.generated_by else f"docs/{source}"
    if source == "index.md":
        in_repository = "README.md"

    def rewritten(match: re.Match[str]) -> str:
        image, text, link = match.groups()
        if re.match(r"[a-z]+:|#|/", link):
            return match[0]
        path, _, anchor = link.partition("#")
        target = posixpath.normpath(posixpath.join(posixpath.dirname(in_repository), path))
        target = target.removeprefix("docs/")
        if files.get_file_from_path(target) is None and (ROOT / target).exists():
            return text if text.startswith("`") else f"{text} (`{target}`)"
        relative = posixpath.relpath(target, posixpath.dirname(source) or ".")
        return f"{image}[{text}]({relative}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(rewritten, markdown)
