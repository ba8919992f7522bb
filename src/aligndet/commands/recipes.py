"""`aligndet recipes`: the paper's settings, as YAML files that the other commands take by name."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

_PREFIX = "recipe:"


def recipes(*, show: str | None = None) -> str:
    """Lists the paper's settings, or prints those of one detector.

    A recipe has sections for commands: `aligndet pretrain --config recipe:fcos` takes "pretrain",
    `aligndet finetune --config recipe:fcos` takes "finetune", and `--config recipe:fcos:scratch` the one that
    is named: fine-tuning without pre-training. Options on the command line win. A copy can be changed
    and given as a file: `--config fcos.yaml`, `--config fcos.yaml:scratch`.

    Args:
        show: Name of the recipe to print.

    Returns:
        What was printed.

    Raises:
        ValueError: If there is no such recipe.
    """
    if show is not None:
        text = _recipe(show)
    else:
        text = "".join(f"{name:<20}{_title(text)}\n" for name, text in sorted(_texts().items()))
    print(text, end="")
    return text


def section_of(source: str, command: str) -> dict[str, Any]:
    """Finds the part of a configuration that is meant for a command.

    Args:
        source: "recipe:NAME", "recipe:NAME:SECTION", or a YAML file, whose sections, if it has any, are named
            as those of a recipe are.
        command: Whose section is taken unless another one is named.

    Returns:
        The section, or all of a file without sections; options by the names that functions have.

    Raises:
        ValueError: If there is no such recipe or section, or the file is no YAML of options.
        OSError: If the file cannot be read.
    """
    if source.startswith(_PREFIX):
        name, _, section = source.removeprefix(_PREFIX).partition(":")
        content = _by_functions_names(yaml.safe_load(_recipe(name)))
    else:
        name, section = _split(source)
        content = _content(Path(name))
        if not section and not isinstance(content.get(command, 0), dict | None):
            return content
    section = section.replace("-", "_") or command
    if not isinstance(content.get(section, 0), dict | None):
        raise ValueError(
            f"--config {source}: no section {section!r}; there are: {', '.join(map(str, content))}"
        )
    return content[section] or {}


def _by_functions_names(content: Any) -> Any:
    """Sections and options, with dashes or underscores, by the names that functions and arguments have."""
    if not isinstance(content, dict):
        return content
    return {str(name).replace("-", "_"): _by_functions_names(value) for name, value in content.items()}


def _texts() -> dict[str, str]:
    """All recipes by name."""
    paths = (path for path in (files("aligndet") / "recipes").iterdir() if path.name.endswith(".yaml"))
    return {path.name.removesuffix(".yaml"): path.read_text("utf-8") for path in paths}


def _recipe(name: str) -> str:
    texts = _texts()
    if name not in texts:
        raise ValueError(f"no recipe {name!r}; there are: {', '.join(sorted(texts))}")
    return texts[name]


def _title(text: str) -> str:
    return text.partition("\n")[0].lstrip("# ")


def _split(source: str) -> tuple[str, str]:
    """A file's name and the section after its last colon, if that is no part of the name."""
    name, _, section = source.rpartition(":")
    return (name, section) if not Path(source).is_file() and Path(name).is_file() else (source, "")


def _content(path: Path) -> dict[str, Any]:
    try:
        content = _by_functions_names(yaml.safe_load(path.read_bytes()))
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no text, or no date
        raise ValueError(f"--config {path}: no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: holds no options (NAME: VALUE, one a line)")
    return content
