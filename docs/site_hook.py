"""MkDocs hook: pages of the repository that are not in docs/, with links that work on GitHub and on the site.

A link is read as GitHub reads it, relative to its file in the repository. README.md is the first page of the site. What
is in docs/ is at the root of the site. Every other file keeps its path, and is copied to the site if a page names it.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")


def place(path: str) -> str:
    """Where a file of the repository is on the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")


def original(uri: str) -> str:
    """The inverse of :func:`place`, for pages."""
    if uri == "index.md":
        return "README.md"
    return uri if uri in PAGES else f"docs/{uri}"


def targets(path: str, text: str) -> set[str]:
    """Files of the repository that a page links to."""
    here = os.path.dirname(path)
    return {os.path.normpath(os.path.join(here, match[2])) for match in LINK.finditer(text)}


def on_files(files: Files, config) -> Files:
    """Add the pages outside docs/, and every file that a page names."""
    for path in PAGES:
        files.append(File.generated(config, place(path), abs_src_path=str(ROOT / path)))
    for page in list(files.documentation_pages()):
        path = original(page.src_uri)
        for target in targets(path, (ROOT / path).read_text(encoding="utf-8")):
            if (ROOT / target).is_file() and place(target) not in files.src_uris:
                files.append(File.generated(config, place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_content(html: str, page, config, files) -> str:
    """Sphinx's roles in docstrings mean nothing here; the name after them stays."""
    return re.sub(r":(?:class|func|meth|mod|attr):(?=<code)", "", html)


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links as the site has them."""
    path = original(page.file.src_uri)
    here, there = os.path.dirname(path), os.path.dirname(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(os.path.join(here, match[2]))
        if not (ROOT / target).is_file():  # a folder, or text that only looks like a link
            return match[0]
        return f"{match[1]}{os.path.relpath(place(target), there or '.')}{match[3] or ''})"

    return LINK.sub(moved, markdown)
