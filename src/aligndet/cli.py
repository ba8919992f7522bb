"""The command line: parse, then call one function of `aligndet.commands`."""

from __future__ import annotations

import json
import os
import re
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib import import_module
from inspect import signature
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from aligndet import __version__
from aligndet.commands._settings import in_one_line
from aligndet.commands.recipes import section_of

COMMANDS = {
    "quickstart": "the main job on built-in data in minutes: does pre-training help?",
    "sample-data": "write a small data set of photographic objects, labelled",
    "check-data": "validate a data set, labelled or not, and say what is in it",
    "split": "hold images out for validation; draw low-data splits, nested, in folds",
    "propose": "find boxes in images without labels (selective search)",
    "cluster": "group the boxes by what they look like, for query-based detectors",
    "pretrain-backbone": "pre-train a trunk on images alone, where no ImageNet weights are wanted",
    "pretrain": "pre-train neck and heads on these images and boxes",
    "export": "weights for torchvision or transformers out of a pre-training run",
    "finetune": "train on labelled images, from pre-trained parts or from scratch",
    "compare": "does pre-training help on these labels? arms at equal budgets, in one table",
    "report": "one HTML page of runs and comparisons: tables, curves, pictures, settings",
    "evaluate": "COCO's figures of a detector on labelled images",
    "predict": "boxes and pictures for images without labels",
    "recipes": "the paper's settings, for --config recipe:NAME",
}

_DESCRIPTION = f"""aligndet {__version__}: pre-train every module of an object detector on your own images.

  aligndet propose images/ --output proposals                            1. boxes, no labels (once)
  aligndet pretrain images/ --proposals proposals --output pretrained    2. neck and heads learn
  aligndet finetune train.json --init-from pretrained --output tuned     3. your labels (few: --steps 1000)
  aligndet evaluate tuned val.json                                       4. average precision
  aligndet predict tuned new_images/ --output predictions                5. boxes and pictures

commands:
{chr(10).join(f"  {name:<19}{line}" for name, line in COMMANDS.items())}

aligndet COMMAND --help tells all options of a command; every one can also stand in a YAML file
(--config file.yaml; --print_config writes one with the defaults; --config recipe:NAME takes the paper's).
Set ALIGNDET_DEBUG=1 to see where an error came from."""

_CONFIG_HELP = (
    "YAML file with any of the options below, at the top or in a section with the command's name;"
    " FILE:SECTION takes another section, recipe:NAME the paper's settings (see `aligndet recipes`)"
)


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Without the program's name; by default of this process.

    Returns:
        The exit status: 0, 1 where check-data found problems, 2 for a mistake in the input, 130 when
        interrupted.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_DESCRIPTION)
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        print(
            f"aligndet: unknown command {arguments[0]!r}; there are: {', '.join(COMMANDS)}", file=sys.stderr
        )
        return 2
    if not sys.stderr.isatty():  # a log file: read when tqdm is imported
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    try:
        result = run(arguments[0], arguments[1:])
        if arguments[0] == "check-data" and result["problems"]:
            return 1
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning ends an interrupted training with an exit of its own
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(stop.__context__, KeyboardInterrupt):
            raise
        print("aligndet: interrupted", file=sys.stderr)
        return 130
    except ArgumentError as error:
        message = f"{in_one_line(str(error))}; see aligndet {arguments[0]} --help"
        print(f"aligndet {arguments[0]}: {message}", file=sys.stderr)
        return 2
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        if os.environ.get("ALIGNDET_DEBUG"):
            raise
        print(f"aligndet {arguments[0]}: {' '.join(_message(error).splitlines())}", file=sys.stderr)
        return 2
    return 0


def _message(error: Exception) -> str:
    """What an error says, without the traceback that torch puts before what a loader's process has said."""
    message = str(error)
    if not message.startswith("Caught "):
        return message
    return re.split(r"^[A-Za-z_][\w.]*: ", message, flags=re.MULTILINE)[-1]


def run(command: str, arguments: Sequence[str]) -> Any:
    """Calls one command's function with arguments in the form of the command line.

    Args:
        command: A key of `COMMANDS`.
        arguments: What follows it.

    Returns:
        What the function returns.
    """
    function, parser = parser_of(command)
    options = _as_options(function, arguments)
    deep = _take_deep(options)
    values = parser.parse_args(options).as_dict()
    values.pop("config", None)
    for (root, *path, last), value in deep.items():
        if "dict" not in str(signature(function).parameters.get(root)):
            raise ValueError(f"--{root} has no settings of its own; see aligndet {command} --help")
        place = values[root] = values[root] or {}
        for name in path:
            place = place.setdefault(name, {})
        place[last] = value
    return function(**values)


def _as_options(function: Any, arguments: Sequence[str]) -> list[str]:
    """Lets options be written as people do.

    --batch-size for --batch_size, --resume for --resume=true, --init neck,head for --init=[neck,head],
    --config recipe:fcos for what that recipe has for the command; and where a command takes a list without an
    option's name, a b for [a,b].
    """
    parameters = signature(function).parameters.values()
    kinds = {f"--{p.name}": p.annotation for p in parameters}
    positional = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    takes_list = any(str(p.annotation).startswith("tuple") for p in positional)
    configs, options, listed, rest = [], [], [], list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            is_list = str(kinds.get(name)).startswith("tuple")
            if kinds.get(name) in (bool, "bool") and not equals and rest[:1] not in (["true"], ["false"]):
                equals, value = "=", "true"
            elif (
                (is_list or takes_list or name == "--config" or name.count(".") > 1)
                and not equals
                and rest
                and not rest[0].startswith("--")
            ):
                equals, value = "=", rest.pop(0)
            if is_list and equals and not value.startswith("["):
                value = f"[{value}]"
            if name == "--config" and equals:
                configs.append(_config(value, function))
                continue
        elif takes_list and not name.startswith("-"):
            listed.append(name + equals + value)
            continue
        options.append(name + equals + value)
    # whatever its place on the command line, a file gives way to options
    return [*configs, *([json.dumps(listed)] if listed else []), *options]


def _config(source: str, function: Any) -> str:
    """What a file or a recipe has for a command, as an option that needs no file.

    Raises:
        ValueError: If the command has no such option.
    """
    content, known = section_of(source, function.__name__), signature(function).parameters
    for name in content:
        if name.partition(".")[0] not in known:
            command = function.__name__.replace("_", "-")
            raise ValueError(f"--config {source}: {name!r} is no option, see aligndet {command} --help")
    return f"--config={yaml.safe_dump(content, default_flow_style=True, width=10**6)}"


def _take_deep(arguments: list[str]) -> dict[tuple[str, ...], Any]:
    """Takes settings of more than one level, --finetuning.options.size=3, out of the arguments.

    jsonargparse reads one level of a dict's settings; of deeper ones it keeps the last.
    """
    deep = [a for a in arguments if a.startswith("--") and a.partition("=")[0].count(".") > 1]
    settings = {}
    for argument in deep:
        arguments.remove(argument)
        name, equals, text = argument[2:].partition("=")
        if not equals:
            raise ValueError(f"--{name}: write the value behind an equals sign, --{name}=VALUE")
        if any(a.startswith("--print_config") for a in arguments):
            raise ValueError(f"--print_config does not know --{name}; write it into the file by hand")
        try:
            settings[tuple(name.split("."))] = json.loads(text)
        except json.JSONDecodeError:
            settings[tuple(name.split("."))] = text
    return settings


def parser_of(command: str) -> tuple[Any, Any]:
    """Builds a command's parser from the signature and docstring of its function.

    Returns:
        The function and the parser.
    """
    name = command.replace("-", "_")
    function = getattr(import_module(f"aligndet.commands.{name}"), name)
    summary, _, rest = (function.__doc__ or "").partition("\n\n")
    details = rest.partition("Args:")[0]
    parser = _Parser(prog=f"aligndet {command}", description=f"{summary}\n\n{details}", exit_on_error=False)
    parser.add_argument("--config", action="config", help=_CONFIG_HELP)
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    return function, parser


class _Parser(ArgumentParser):
    """Shows options the way people write them."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """The help text, with dashes in names and switches without a value."""
        text = super().format_help(*args, **kwargs).replace(" {true,false}", "")
        text = re.sub(r"--(?!print_config)\w+", lambda name: name[0].replace("_", "-"), text)
        return re.sub(r"<class\s+'(\w+)'>", r"\1", text)
