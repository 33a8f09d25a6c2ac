"""Values of config keys as users write them: ``KEY VALUE`` options, and values of a wrong type."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode

__all__ = ["Options", "list_options", "wrong_value_message"]

# KEY VALUE options of a function: [key, value, key, value, ...] or {key: value, ...}
Options = Sequence[Any] | Mapping[str, Any]


def list_options(opts: Options | None) -> list[Any]:
    """Return ``KEY VALUE`` options as ``[key, value, key, value, ...]``.

    Raises:
        ValueError: if they are a string, or a key is none.
    """
    if isinstance(opts, Mapping):
        opts = [x for pair in opts.items() for x in pair]
    if isinstance(opts, str) or any(not isinstance(x, str) for x in list(opts or [])[::2]):
        raise ValueError(
            f"opts is {opts!r}; expected [key, value, key, value, ...] or {{key: value, ...}}, "
            "such as ['SEED', 1]."
        )
    return list(opts or [])


def wrong_value_message(cfg: CfgNode, error: ValueError, source: str) -> str:
    """Return the message about a value of another type than the key's, with the expected form.

    Args:
        cfg: the config, still with the key's own value.
        error: from yacs; that of anything else keeps its message.
        source: where the value comes from.
    """
    pattern = r"Type mismatch \(.*?\) with values \((.*)\) for config key: (\S+)"
    match = re.fullmatch(pattern, str(error), re.DOTALL)
    if match is None:
        return f"{source}: {error}"
    key, value = match[2], cfg
    for part in key.split("."):
        value = value[part]
    given = match[1].removeprefix(f"{value} vs. ")
    return f"{key} is {given!r} in {source}; expected {_expected_form(value, given)}"


def _expected_form(value: Any, given: str) -> str:
    """Describe the values of a key.

    Args:
        value: its present value.
        given: the wrong one, as text.
    """
    if isinstance(value, (list, tuple)):
        items = [x.strip(" '\"") for x in given.strip("[]() ").split(",")]
        numbers = [_literal(x) for x in items]
        is_names = any(isinstance(x, str) for x in (*value, *numbers))
        form = str(items if is_names else numbers)
        return f'a list, in quotes on a command line: "{form}"'
    if isinstance(value, bool):
        return "True or False"
    if isinstance(value, int):
        return f"an integer, such as {value}"
    if isinstance(value, float):
        try:
            return f"a number with a decimal point: {float(given)}"
        except ValueError:
            return f"a number, such as {value}"
    if isinstance(value, str):
        return f"text, in quotes: \"'{given}'\""
    return f"a value like {value!r} ({type(value).__name__})"


def _literal(text: str) -> Any:
    """Return the number, bool or None that a text stands for in Python; else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
