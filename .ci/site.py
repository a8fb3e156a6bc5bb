"""Hooks of the documentation site: the README and its neighbours as pages, the key reference, links out of docs/."""

import re
import sys
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
NEIGHBOURS = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
LINK = re.compile(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files, config):
    """Add the pages that are not in docs/."""
    sys.path.insert(0, str(ROOT))
    from vargpt_rl.cli.reference import as_markdown, keys_of_a_run

    pages = {"index.md": (ROOT / "README.md").read_text(), "keys.md": as_markdown(keys_of_a_run())}
    pages |= {page: (ROOT / name).read_text() for name, page in NEIGHBOURS.items()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links at pages of the site; of links to source files, keep the text."""

    def site_link(match):
        text, target, fragment = match[1], match[2], match[3] or ""
        name = target.removeprefix("../").removeprefix("docs/")
        name = NEIGHBOURS.get(name, name)
        if files.get_file_from_path(name):
            return f"[{text}]({name}{fragment})"
        return text if (ROOT / name).exists() or (ROOT / "docs" / name).exists() else match[0]

    return LINK.sub(site_link, markdown)
