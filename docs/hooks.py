"""Pages that are made of what is there already: the start page and the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from aligndet import cli


def on_files(files: Any, *, config: Any) -> Any:
    """Adds the pages; called by MkDocs.

    Args:
        files: Of the site.
        config: Of the site.
    """
    readme = Path(config.config_file_path).with_name("README.md").read_text("utf-8")
    pages = {"index.md": readme.replace("](docs/", "]("), "commands.md": commands()}
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def commands() -> str:
    """The help of every command, as a page."""
    parts = ["# Commands\n"]
    for name, summary in cli.COMMANDS.items():
        _, parser = cli.parser_of(name)
        text = parser.format_help().rstrip()
        parts.append(f"## aligndet {name}\n\n{summary[0].upper()}{summary[1:]}.\n\n```text\n{text}\n```\n")
    return "\n".join(parts)
