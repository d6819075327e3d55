"""The checkpoint's chat template: turns in, the prompt as texts and special tokens out.

A template is Jinja from a checkpoint, hence not trusted: it runs in Jinja's sandbox, for a bounded time. Special tokens
come from the template alone: one that a user spells out stays text. So that the two can be told apart after
rendering, a guard character goes before each place in a user's text where a special token starts, or could start with
what the next text adds.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MappingView, Sequence
from datetime import datetime
from functools import cached_property, reduce, wraps
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.turns import JsonObject, Turn, strings, with_strings

if TYPE_CHECKING:
    import jinja2
    from jinja2.nodes import Node
    from jinja2.parser import Parser

_SECONDS = 5.0
_rendering = threading.local()  # end: of the rendering under way, on the clock of the thread's own processor time
_MAX_SOURCE = 100_000  # characters of a template, whose compiling nothing interrupts
# Of a text or list that a template makes, and of base times exponent: beyond, memory is at stake.
_MAX_REPEATED = 10_000_000
_MAX_EXPONENT = 1000
_MAX_WIDTH = 64
_SHOWN = 300  # characters of an error
# Filters whose time nothing bounds on the way, and the longest text or list that they get.
_SLOW = {"wordwrap": 10_000, "urlize": 10_000, **dict.fromkeys(("groupby", "max", "min", "sort", "sum"), 1_000_000)}
# Filters that look at no more than the items of a list, and tests that look at all that is in it.
_SHALLOW = {
    *("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"),
    *("reject", "rejectattr", "reverse", "select", "selectattr", "slice"),
}
_DEEP_TESTS = {
    *("==", "eq", "equalto", "!=", "ne", ">", "gt", "greaterthan", ">=", "ge", "<", "lt", "lessthan", "<=", "le"),
    *("in", "lower", "upper"),
}


class ChatTemplate:
    """One template, compiled when first used."""

    def __init__(self, source: str, variables: Mapping[str, str], special: Collection[str]) -> None:
        """Keep Jinja, bos_token and the like as variables for it, and the special tokens as spelled, none empty."""
        self.source = source
        self._variables = dict(variables)
        self._special = special

    def pieces(self, turns: Sequence[Turn], tools: Sequence[JsonObject] = ()) -> Iterator[tuple[str, str | None]]:
        """Render turns and the beginning of the assistant's answer; tools tell the model what it may call.

        Yields pieces of text as the user wrote them, some empty, and the special token behind each, None at the end.
        Raises InvalidInput: the template does not compile, takes no tools where there are some, refuses these turns, or
        takes longer than 5 seconds.
        """
        import jinja2  # compiling and rendering need it, and nothing else

        texts = [text for turn in turns for text in turn.texts()]
        guard = Guard(self._special, [*texts, *strings(tools), self.source])
        messages = [
            {"role": turn.role, "content": _content(turn, guard)} | with_strings(turn.more, guard.apply)
            for turn in turns
        ]
        calls = any("tool_calls" in turn.more for turn in turns)
        for name, given in (("tools", bool(tools)), ("tool_calls", calls)):
            if given and name not in self.source:  # the template would leave it out without a word
                raise InvalidInput(
                    f"{name}: got some, but the bundle's chat template takes none. Leave them out, or put a "
                    "chat_template.jinja that does into the checkpoint folder and export again: hawk-trt "
                    "export CHECKPOINT --out FOLDER"
                )
        if len(self.source) > _MAX_SOURCE:
            raise InvalidInput(
                f"chat template: got {len(self.source):,} characters, expected at most {_MAX_SOURCE:,}. Change the "
                "bundle's chat template"
            )
        try:
            _rendering.end = time.thread_time() + _SECONDS
            rendered = self._compiled.render(
                messages=messages,
                tools=with_strings(tools, guard.apply) or None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
            )
        except RecursionError as error:
            raise InvalidInput("chat template: it calls itself without an end. Change the bundle's template") from error
        except TimeoutError as error:
            raise InvalidInput(
                f"chat template: not done after {_SECONDS:g} seconds. Change the bundle's chat template"
            ) from error
        # A template is a program: beside Jinja's own errors it meets Python's, as for "a" + 1 or a missing key.
        except (
            *(jinja2.TemplateError, ArithmeticError, AttributeError, LookupError),
            *(MemoryError, RuntimeError, SyntaxError, TypeError, ValueError),
        ) as error:
            why = str(error)[:_SHOWN].encode("utf-8", "replace").decode()
            raise InvalidInput(f"chat template: {why}. Change the messages, or the bundle's chat template") from error
        if len(rendered) > 2 * _MAX_REPEATED:
            raise InvalidInput(
                f"chat template: it makes {len(rendered):,} characters. Change the bundle's chat template"
            )
        return guard.split(rendered)

    @cached_property
    def _compiled(self) -> "jinja2.Template":
        return _compiled(self.source)


class Guard:
    """A character that no text of a prompt holds, and the special tokens that it guards."""

    def __init__(self, special: Collection[str], texts: Iterable[str]) -> None:
        """Choose the character; texts are all that will be in the rendered string: the prompt's and the template."""
        used = set().union(*texts, *special)
        # Private use first; a text with a million different characters would be needed to leave none.
        self._character = next(chr(code) for code in range(0xE000, 0x110000) if chr(code) not in used)
        self._special = tuple(special)
        longest_first = "|".join(re.escape(token) for token in sorted(special, key=len, reverse=True))
        self._cuts = re.compile(f"{self._character}.|({longest_first or '(?!)'})", re.DOTALL)

    def apply(self, text: str) -> str:
        """The text with its special tokens guarded."""
        starts = self._open_ends(text)
        for token in self._special:
            start = text.find(token)
            while start >= 0:
                starts.add(start)
                start = text.find(token, start + 1)
        bounds = [0, *sorted(starts), len(text)]
        return self._character.join(text[begin:end] for begin, end in pairwise(bounds))

    def split(self, rendered: str) -> Iterator[tuple[str, str | None]]:
        """Cut a rendered string at the special tokens that are not guarded; see ChatTemplate.pieces."""
        begin = 0
        for match in self._cuts.finditer(rendered):
            if match[1] is not None:
                yield rendered[begin : match.start()].replace(self._character, ""), match[1]
                begin = match.end()
        yield rendered[begin:].replace(self._character, ""), None

    def _open_ends(self, text: str) -> set[int]:
        """Where the text's end, which templates may trim, is the beginning of a special token."""
        end = len(text.rstrip())
        longest = max(map(len, self._special), default=0)
        return {
            start
            for start in range(max(0, end - longest + 1), end)
            if any(token.startswith(text[start:end]) for token in self._special)
        }


def _content(turn: Turn, guard: Guard) -> str | list[dict[str, str]]:
    """A turn's content as templates know it; sources stay out, since templates only look at their kind."""
    if isinstance(turn.content, str):
        return guard.apply(turn.content)
    return [
        {"type": "text", "text": guard.apply(part)} if isinstance(part, str) else {"type": part.kind, part.kind: ""}
        for part in turn.content
    ]


def _compiled(source: str) -> "jinja2.Template":
    """A template in an environment that has all that transformers' has, in Jinja's sandbox, and bounds what is made."""
    import jinja2.ext
    from jinja2.exceptions import SecurityError
    from jinja2.nodes import Add, CallBlock, Compare, Concat, Const, Expr, Filter, For, Getitem, Pair, Slice
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    class Generation(jinja2.ext.Extension):
        """{% generation %}, which marks the assistant's text for training, and changes no prompt."""

        tags = {"generation"}  # noqa: RUF012 - as the class above it has them

        def parse(self, parser: "Parser") -> "Node":
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: "jinja2.runtime.Macro") -> str:
            return str(caller())

    def bounded(name: str, *values: object) -> None:
        if _is_large(name, *values):
            raise SecurityError(f"{name} makes a value that is too large")

    def whole(value: Any) -> Any:  # noqa: ANN401 - what a template has
        """The same value, unless a text or look at all of it, which nothing interrupts, would take too long."""
        if not isinstance(value, str) and _weight(value, {}) > 2 * _MAX_REPEATED:
            raise SecurityError("it uses a list or object that is too large as a whole")
        return value

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: "jinja2.runtime.Context", operator: str, left: object, right: object) -> object:
            bounded(operator, left, right)
            if operator == "%":
                whole(right)
            return super().call_binop(context, operator, left, right)

        def call(self, context: "jinja2.runtime.Context", function: Any, /, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            _check_time()
            text = getattr(function, "__self__", None)
            if not isinstance(function, jinja2.runtime.Macro):
                whole([*args, *kwargs.values()])
            if isinstance(text, str):
                bounded(function.__name__, text, *args, *kwargs.values())
            return super().call(context, function, *args, **kwargs)

        def wrap_str_format(self, value: Any) -> Any:  # noqa: ANN401
            text = getattr(value, "__self__", None)
            if isinstance(text, str) and value.__name__ in ("format", "format_map"):
                bounded("format", text)
            return super().wrap_str_format(value)

    def limited(name: str, filter_: Callable[..., Any]) -> Callable[..., Any]:
        first = int(hasattr(filter_, "jinja_pass_arg"))  # behind the context, which some take

        @wraps(filter_)
        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - as the filter has them
            _check_time()
            bounded(name, *args[first:], *kwargs.values())
            if name not in _SHALLOW:
                whole([*args[first:], *kwargs.values()])
            made = filter_(*args, **kwargs)
            return _watched(made) if isinstance(made, Iterator) else made

        return call

    class Bounds(NodeTransformer):
        """Makes a sum of each ~, which the sandbox could not look at, and watches the time of each loop.

        What is compared, or hashed as a key, is looked at as a whole.
        """

        def filtered(self, node: "Node", name: str) -> Expr:
            added = Filter(node, name, [], [], None, None)
            added.set_lineno(node.lineno).set_environment(environment)
            return added

        def visit_Compare(self, node: Compare) -> "Node":  # noqa: N802 - the name of the node's class
            self.generic_visit(node)
            node.expr = self.filtered(node.expr, "whole")
            for operand in node.ops:
                operand.expr = self.filtered(operand.expr, "whole")
            return node

        def visit_Getitem(self, node: Getitem) -> "Node":  # noqa: N802 - the name of the node's class
            self.generic_visit(node)
            if not isinstance(node.arg, Const | Slice):
                node.arg = self.filtered(node.arg, "whole")
            return node

        def visit_Pair(self, node: Pair) -> "Node":  # noqa: N802 - the name of the node's class
            self.generic_visit(node)
            node.key = self.filtered(node.key, "whole")
            return node

        def visit_For(self, node: For) -> "Node":  # noqa: N802 - the name of the node's class
            self.generic_visit(node)
            node.iter = self.filtered(node.iter, "watched")
            return node

        def visit_Concat(self, node: Concat) -> "Node":  # noqa: N802 - the name of the node's class
            self.generic_visit(node)
            texts: list[Any] = [Filter(part, "string", [], [], None, None) for part in node.nodes]
            total: Node = reduce(Add, texts)
            return total.set_lineno(node.lineno).set_environment(environment)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters = {name: limited(name, filter_) for name, filter_ in environment.filters.items()}
    environment.filters["tojson"] = limited("tojson", _to_json)
    environment.filters |= {"watched": _watched, "whole": whole}
    tests: dict[str, Any] = environment.tests
    environment.tests = tests | {name: limited(name, tests[name]) for name in _DEEP_TESTS}
    environment.finalize = whole
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment.from_string(Bounds().visit(environment.parse(source)))


def _is_large(name: str, *values: Any) -> bool:  # noqa: ANN401 - what a template has
    """Whether an operator, filter or method makes a value of these, or takes a time, that no prompt needs."""
    lengths = [len(value) for value in values if isinstance(value, str | list | tuple)]
    if name == "+":
        return sum(lengths) > _MAX_REPEATED
    if name in ("*", "**"):
        numbers = [abs(value) for value in values if isinstance(value, int | float)]
        return math.prod(lengths + numbers) > (_MAX_REPEATED if name == "*" else _MAX_EXPONENT)
    if name in ("%", "format"):
        return isinstance(values[0], str) and re.search(r"\d{7}", values[0]) is not None
    if name == "replace" and len(lengths) > 2:
        return str(values[0]).count(values[1]) * lengths[2] > _MAX_REPEATED
    if name == "join":
        return math.prod(lengths[:2]) > _MAX_REPEATED
    if name == "translate" or (lengths and lengths[0] > _SLOW.get(name, math.inf)):
        return True
    if name in ("indent", "expandtabs", "tojson"):  # for every line, tab or element
        widths = [value for value in values[1:] if isinstance(value, int)]
        return max([_weight(values[1:], {}), *widths]) > _MAX_WIDTH
    return any(isinstance(value, int) and value > _MAX_REPEATED for value in values[1:])


def _weight(value: Any, known: dict[int, int]) -> int:  # noqa: ANN401 - what a template has
    """Characters and items of all that is in a value, as often as they are in it, however few lists hold them."""
    if isinstance(value, str):
        return len(value)
    if type(value).__name__ == "Namespace":  # it hides its own attributes
        value = object.__getattribute__(value, "_Namespace__attrs")
    if not isinstance(value, Mapping | MappingView | list | tuple):
        return 1
    if id(value) not in known:
        known[id(value)] = 1  # until it is known: one that holds itself
        parts: Any = [*value.keys(), *value.values()] if isinstance(value, Mapping) else value
        known[id(value)] += sum(_weight(part, known) for part in parts)
    return known[id(value)]


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes for HTML, which would change the prompt.
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    parts, size = [], 0
    for part in _watched(encoder.iterencode(value)):  # an indent counts anew for every item, however deep it lies
        size += len(part)
        if size > _MAX_REPEATED:
            raise ValueError("tojson makes a value that is too large")
        parts.append(part)
    return "".join(parts)


def _check_time() -> None:
    """Raise TimeoutError where this thread has rendered for too long: loops, calls and filters of a template ask here.

    The thread's processor time counts, so that a busy machine refuses no template.
    """
    if time.thread_time() > _rendering.end:
        raise TimeoutError


def _watched(values: Iterable[Any]) -> Iterator[Any]:
    """The same values, as long as there is time."""
    for value in values:
        _check_time()
        yield value
