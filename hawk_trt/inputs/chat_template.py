"""The checkpoint's chat template: turns in, the prompt as one string out.

A template is Jinja from a checkpoint, hence not trusted: it runs in Jinja's sandbox.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from hawk_trt.errors import BundleError, InvalidInput
from hawk_trt.inputs.messages import Turn
from hawk_trt.inputs.tools import JsonObject


class ChatTemplate:
    """One template, compiled when first used.

    Attributes:
        source: its Jinja.
    """

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        """Keep a template.

        Args:
            source: Jinja.
            variables: more variables for it: bos_token, eos_token and the like.
        """
        self.source = source
        self._variables = dict(variables)

    def render(self, turns: Sequence[Turn], tools: Sequence[JsonObject] = ()) -> str:
        """Render turns and the beginning of the assistant's answer.

        Args:
            turns: the messages.
            tools: JSON objects that tell the model what it may call.

        Raises:
            InvalidInput: the template does not compile, takes no tools where there are some, or refuses these turns.
        """
        messages = [{"role": turn.role, "content": _content(turn), **turn.more} for turn in turns]
        try:
            self._check_tools(turns, tools)
            return self._compiled.render(
                messages=messages, tools=list(tools) or None, add_generation_prompt=True, **self._variables
            )
        # A template is a program: beside Jinja's own errors it meets Python's, as for "a" + 1 or a missing key.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise InvalidInput(f"chat template: {error}. Change the messages, or the bundle's chat template") from error

    def _check_tools(self, turns: Sequence[Turn], tools: Sequence[JsonObject]) -> None:
        """Refuse what the template would leave out without a word."""
        calls = any("tool_calls" in turn.more for turn in turns)
        for name, given in (("tools", bool(tools)), ("tool_calls", calls)):
            if given and name not in self.source:
                raise InvalidInput(
                    f"{name}: got some, but the bundle's chat template takes none. Leave them out, or put a "
                    "chat_template.jinja that does into the checkpoint folder and export again: make export"
                )

    @cached_property
    def _compiled(self) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        return environment.from_string(self.source)


def template_source(jinja: str | None, processor: Mapping[str, Any], tokenizer: Mapping[str, Any]) -> str | None:
    """The Jinja of a checkpoint's chat template.

    Args:
        jinja: chat_template.jinja, which goes first.
        processor: chat_template.json, next.
        tokenizer: tokenizer_config.json, last.

    Returns:
        The template, the one named "default" where there are several; None where there is none.

    Raises:
        BundleError: several templates and none of them the default, or something that is no template.
    """
    if jinja is not None:
        return jinja
    found = processor.get("chat_template") or tokenizer.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default") or (next(iter(named.values())) if len(named) == 1 else named)
    if found is None or isinstance(found, str):
        return found
    raise BundleError(
        f"chat_template: got {type(found).__name__}, expected a string or a list with one named default. "
        "Put the template to use into chat_template.jinja in the checkpoint folder and export again: make export"
    )


def _content(turn: Turn) -> str | list[dict[str, str]]:
    """A turn's content as templates know it; sources stay out, since templates only look at their kind."""
    if isinstance(turn.content, str):
        return turn.content
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind, part.kind: ""}
        for part in turn.content
    ]


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes for HTML, which would change the prompt.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
