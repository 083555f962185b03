"""The tools of a request: what the prompt says about them, and what the reply parser needs of their schemas.

Source: `encoding/encoding_dsv4.py` of the V4-Flash checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ds4jax.errors import InputError
from ds4jax.text.parts import Part, template, valid

_HEAD = """\
## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any \
tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_TAIL = """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""
_FORMAT = "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
_CHOICES = ("auto", "none", "required")
_PLAIN_FORMATS = ("text", "json_object")

Functions = Sequence[Mapping[str, Any]]


def functions(tools: Any, tool_choice: Any = None) -> list[dict[str, Any]]:
    """The functions that a request offers, in its order. Tools of other types are left out; the model cannot be shown them.

    Args:
        tools: a list in OpenAI's form, or None.
        tool_choice: "none" offers nothing; "auto", "required", a function by name and None offer all.

    Raises:
        InputError: not in that form.
    """
    if tools is not None and not isinstance(tools, list | tuple):
        raise InputError(f"tools: is a {type(tools).__name__}; it must be a list")
    found = []
    for i, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise InputError(f"tools[{i}]: is a {type(tool).__name__}; it must be an object")
        if tool.get("type") not in (None, "function"):
            continue
        function = tool.get("function")
        if not isinstance(function, dict):
            raise InputError(f"tools[{i}].function: missing or no object; a tool is named and described there")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise InputError(f"tools[{i}].function.name: missing or no text; a tool needs a name")
        found.append(function)
    _check_choice(tool_choice)
    return [] if tool_choice == "none" else found


def tools_text(offered: Functions) -> list[Part]:
    """What the prompt says about the tools: DeepSeek's own text, with each function as one line of JSON.

    Raises:
        InputError: a function is no JSON or not valid Unicode.
    """
    lines = [as_json(function, f"tools: {function['name']!r:.60}") for function in offered]
    return [*template(_HEAD), Part("\n".join(lines)), *template(_TAIL)]


def schema_of(response_format: Any) -> Any:
    """The JSON schema that a reply must follow; None where the prompt says nothing about the format.

    Args:
        response_format: in OpenAI's form: of type text, json_object or json_schema; or None.

    Raises:
        InputError: of another form.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, dict):
        raise InputError(f"response_format: is a {type(response_format).__name__}; it must be an object")
    kind = response_format.get("type")
    if kind in _PLAIN_FORMATS:
        return None
    if kind != "json_schema":
        known = ", ".join((*_PLAIN_FORMATS, "json_schema"))
        raise InputError(f"response_format.type: {str(kind)[:60]!r} is unknown; it must be one of {known}")
    described = response_format.get("json_schema")
    if not isinstance(described, dict):
        raise InputError("response_format.json_schema: missing or no object; the schema stands in it")
    return described.get("schema")


def format_text(schema: Any) -> list[Part]:
    """What the prompt says about a schema.

    Raises:
        InputError: the schema is no JSON or not valid Unicode.
    """
    return [Part(_FORMAT + as_json(schema, "response_format.json_schema.schema"))]


def as_json(value: Any, where: str) -> str:
    """A value as one line of JSON: separators with a space, keys in their order, everything but control characters unescaped.

    Raises:
        InputError: it is no JSON or not valid Unicode; the message begins with `where`.
    """
    try:
        return valid(json.dumps(value, ensure_ascii=False), where)
    except (TypeError, RecursionError) as error:
        raise InputError(f"{where}: cannot be written as JSON: {error}") from None
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{where}: cannot be written as JSON: {error}") from None


def _check_choice(choice: Any) -> None:
    if choice is None or (isinstance(choice, str) and choice in _CHOICES):
        return
    if not isinstance(choice, dict):
        raise InputError(f"tool_choice: {str(choice)[:60]!r} is unknown; it must be one of {', '.join(_CHOICES)} or a function")
    function = choice.get("function")
    if choice.get("type") != "function" or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InputError("tool_choice: it must name a function as {'type': 'function', 'function': {'name': ...}}")
