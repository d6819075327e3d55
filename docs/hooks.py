"""What the site holds beside the pages of docs/: the commands, the notebook, and the files that pages link to.

A link out of docs/ leads to another page where there is one (BENCHMARKS.md), else to a copy of the file.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from hawk_trt.apps.cli.main import COMMANDS, make_app, where_it_lies

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "first_steps.ipynb"
AT_THE_ROOT = ("BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pages that are made here, and those that lie at the root of the repository."""
    made = {"cli.md": commands(), "notebook.md": notebook(NOTEBOOK)}
    made |= {name: (ROOT / name).read_text(encoding="utf-8") for name in AT_THE_ROOT}
    for name, content in made.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to files of the repository to their page or copy; a link to nothing is left for mkdocs to report."""
    folder = "" if page.file.src_uri in AT_THE_ROOT else "docs"

    def led(match: re.Match[str]) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/") or path in AT_THE_ROOT:
            return f"]({path.removeprefix('docs/')}{anchor})"
        if not (ROOT / path).is_file():
            return match[0]
        copy = f"files/{path}.txt"
        if files.get_file_from_path(copy) is None:
            files.append(File.generated(config, copy, abs_src_path=str(ROOT / path)))
        return f"]({copy})"

    return re.sub(r"\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", led, markdown)


def commands() -> str:
    """The help of every command, as a page."""
    app = make_app("hawk-trt")
    for name, (function, _) in COMMANDS.items():
        app.command(where_it_lies(function), name=name)
    # cyclopts' own table of contents says the same as the list of commands
    help_of_all = app.generate_docs(output_format="markdown")
    help_of_all = re.sub(r"^Example: (.*)$", r"```console\n\1\n```", help_of_all, flags=re.MULTILINE)
    return re.sub(r"^## Table of Contents\n.*?(?=^\*\*Commands)", "", help_of_all, flags=re.DOTALL | re.MULTILINE)


def notebook(path: Path) -> str:
    """A notebook and its outputs, as a page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/jpeg" in data:
                parts.append(f"![](data:image/jpeg;base64,{''.join(data['image/jpeg']).strip()})")
            else:
                text = "".join(output.get("text") or data["text/plain"]).rstrip()
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts)
