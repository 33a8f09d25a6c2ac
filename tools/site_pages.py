#!/usr/bin/env python
"""Collect the pages of the documentation site in build/site_pages, where mkdocs.yml looks for them.

    python tools/site_pages.py && mkdocs build --strict     # make site

The folders are those of the repository, so that a link works there and on the site: all pages, and
the files that they link to (source files, configs, pictures, the notebook). api.md has the
docstrings of the modules that users import. The page of the notebook is made from its cells.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["main", "pages", "write_pages"]

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build/site_pages"
API = (
    "reldn_d2.predictor",
    "reldn_d2.structures.scene_graph",
    "reldn_d2.pretrained",
    "reldn_d2.model_zoo",
    "reldn_d2.config",
    "reldn_d2.engine.defaults",
    "reldn_d2.checkpoint",
    "reldn_d2.data.dataset_mapper",
    "reldn_d2.data.datasets.coco",
    "reldn_d2.modeling.meta_arch",
    "reldn_d2.modeling.relation_head.head_base",
    "reldn_d2.modeling.relation_head.relation_head",
    "reldn_d2.modeling.detectors.base",
    "reldn_d2.modeling.losses.contrastive",
    "reldn_d2.evaluation",
    "reldn_d2.export",
    "reldn_d2.vis.visualizer",
)


def pages() -> list[str]:
    """Return the Markdown files of the site, as if all were in the repository."""
    files = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("*.ipynb")]
    docs = sorted(f"docs/{x.stem}.md" for x in files)
    others = ("CHANGELOG.md", "CONTRIBUTING.md", "datasets/README.md")
    return ["README.md", *others, "reldn_d2/pretrained/LICENSE.md", *docs]


def read_page(page: str) -> str:
    """Return the text of a page; if there is only a notebook of that name, its cells."""
    path = ROOT / page
    if path.is_file():
        return path.read_text()
    notebook = path.with_suffix(".ipynb")
    parts = []
    for cell in json.loads(notebook.read_text())["cells"]:
        text = "".join(cell["source"])
        parts.append(f"```python\n{text}\n```" if cell["cell_type"] == "code" else text)
    return "\n\n".join(parts) + "\n"


def linked_files(page: str) -> Iterator[str]:
    """Yield the files of the repository that a page links to, relative to the repository."""
    text = re.sub(r"^```.*?^```", "", read_page(page), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)[^)]*\)", text):
        path = (ROOT / page).parent.joinpath(target).resolve()
        if path.is_file() and path.is_relative_to(ROOT):
            yield path.relative_to(ROOT).as_posix()


def to_site(page: str) -> str:
    """Return the text of a page as MkDocs takes it.

    A fence may have its language and a title only, a link cannot lead to a folder, and a link to a
    notebook leads to its page.
    """

    def fence(match: re.Match) -> str:
        language, _, title = match[1].partition("no-run:")[0].strip().partition(" ")
        return f"```{language}" + (f' title="{title}"' if title else "")

    def link(match: re.Match) -> str:
        is_folder = (ROOT / page).parent.joinpath(match[2]).is_dir()
        return match[1] if is_folder else match[0].replace(".ipynb)", ".md)")

    text = re.sub(r"^```(\w.*)$", fence, read_page(page), flags=re.MULTILINE)
    return re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)\)", link, text)


def write_pages(folder: Path) -> None:
    """Write all files of the site's source into a folder, which is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    names = pages()
    for name in {x for page in names for x in linked_files(page)}:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(to_site(name))
    blocks = "\n\n".join(f"::: {module}" for module in API)
    (folder / "api.md").write_text(f"# API\n\nGenerated from the docstrings.\n\n{blocks}\n")


def main() -> int:
    """Write the pages; return the exit status."""
    write_pages(FOLDER)
    print(f"Wrote the pages to {FOLDER.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
