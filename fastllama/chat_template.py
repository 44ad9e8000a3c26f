"""Renders the chat templates of Hugging Face checkpoints: Jinja programs that write a conversation as a prompt.

transformers turns the rendered text into tokens as a whole, so a message that spells `<|eot_id|>` ends its own turn.
Here a special token is special only where the template writes it; in a message the same spelling is plain text, as in
Meta's ChatFormat. For that, spellings in the inputs are broken by a character that occurs nowhere else. It is removed
after the rendered text has been cut at the special tokens. Inputs without such a spelling reach the template unchanged,
and their text is exactly transformers'.
"""

import functools
import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2

from fastllama.checkpoint.json_config import short_repr
from fastllama.template_limits import MAX_DEPTH, Limits, limited
from fastllama.template_sandbox import TemplateEnvironment

MAX_SOURCE_CHARS = 100_000
MAX_REASON_CHARS = 300
# The private-use characters of Unicode that have four hexadecimal digits.
PRIVATE_USE = range(0xE000, 0xF900)
INPUTS = ("messages", "tools", "add_generation_prompt")


class Piece(NamedTuple):
    """A part of a rendered prompt: the name of a special token that the template wrote, or plain text."""

    text: str
    is_special: bool


def check_tools(tools: object) -> None:
    """Raise ValueError for tools that are neither None nor a list of dicts."""
    if tools is not None and not (isinstance(tools, list | tuple) and all(isinstance(one, Mapping) for one in tools)):
        raise ValueError(
            f"tools: expected a list of JSON schemas, which are dicts, got {short_repr(tools)}; transformers' "
            "get_json_schema writes the schema of a Python function"
        )


class ChatTemplate:
    """A chat template, compiled once.

    Attributes:
        name: what errors call the template, such as its file.
        source: the template's text.
        special_tokens: the variables that name special tokens, such as `bos_token`, and their spellings.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "chat template",
        special_tokens: Mapping[str, str | None] | None = None,
        special_names: Collection[str] | None = None,
    ) -> None:
        """Compile a template.

        `special_names` are the spellings of all special tokens; by default those in `special_tokens`.

        Raises ValueError, with the name, the line and the reason, if the source is not a valid template.
        """
        self.name = name
        self.source = source
        self.special_tokens = {key: value for key, value in (special_tokens or {}).items() if value is not None}
        names = {one for one in (self.special_tokens.values() if special_names is None else special_names) if one}
        self._special_names = sorted(names, key=lambda one: (-len(one), one))
        longest_first = "|".join(map(re.escape, self._special_names)) or "(?!)"
        self._special = longest_first
        self._spelling = re.compile(f"(?={longest_first})")
        if len(source) > MAX_SOURCE_CHARS:
            raise ValueError(f"{name}: the template has {len(source)} characters; at most {MAX_SOURCE_CHARS} are read")
        environment = TemplateEnvironment()
        self._reserved = {*INPUTS, *environment.globals, *self.special_tokens}
        try:
            self._template = environment.compile_template(source)
        except jinja2.TemplateSyntaxError as error:
            raise ValueError(f"{name}, line {error.lineno}: not a valid template: {_reason(error)}") from error
        except Exception as error:  # Python's compiler may raise several, for example if the nesting is too deep
            raise ValueError(f"{name}: not a valid template: {_reason(error)}") from error

    def __reduce__(self) -> tuple[Callable[..., "ChatTemplate"], tuple[str]]:
        """How another process makes the same: it compiles the source."""
        make = functools.partial(
            ChatTemplate, name=self.name, special_tokens=self.special_tokens, special_names=self._special_names
        )
        return make, (self.source,)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_args: Mapping[str, Any] | None = None,
    ) -> list[Piece]:
        """The prompt of a conversation, cut into special tokens and plain text. The texts joined are the prompt.

        `tools` are JSON schemas. `template_args` are other variables of the template, such as `enable_thinking`. Fields
        of a message that are None count as absent, as in transformers.

        Raises ValueError if an argument is not what a template can get, or if the template raises an error, does what
        templates may not, or takes too much time or memory. The error names the template and the reason.
        """
        inputs = self._inputs(messages, tools, template_args or {})
        mark = None
        if any(self._spelling.search(text) for text in _texts(inputs)):
            mark = self._free_mark([self.source, *self.special_tokens.values(), *_texts(inputs)])
            inputs = _map_texts(inputs, functools.partial(self._broken, mark=mark))
        variables = self.special_tokens | inputs["template_args"]
        variables |= {"messages": inputs["messages"], "tools": inputs["tools"]}
        variables["add_generation_prompt"] = add_generation_prompt
        return self._pieces(self._text(variables), mark)

    def _inputs(self, messages: Any, tools: Any, template_args: Any) -> dict[str, Any]:
        """Checked copies, of plain types, of what the caller passes."""
        if not isinstance(messages, list | tuple) or not messages:
            raise ValueError(f"messages: expected a non-empty list of messages, got {short_repr(messages)}")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise ValueError(f"message {index}: expected a dict with a 'role', got {short_repr(message)}")
        present = [{key: value for key, value in message.items() if value is not None} for message in messages]
        check_tools(tools)
        if not isinstance(template_args, Mapping) or not all(isinstance(key, str) for key in template_args):
            raise ValueError(f"template_args: expected a dict with names as keys, got {short_repr(template_args)}")
        if taken := sorted(self._reserved & set(template_args)):
            raise ValueError(f"template_args: {', '.join(taken)} cannot be set there; {self.name} has it already")
        return {
            "messages": _plain(present, "messages"),
            "tools": _plain(tools, "tools"),
            "template_args": {"documents": None} | _plain(template_args, "template_args"),
        }

    def _text(self, variables: dict[str, Any]) -> str:
        """The rendered text."""
        chunks, total = [], 0
        try:
            limits = Limits([list(variables.values())])
            with limited(limits):
                for chunk in self._template.generate(variables):
                    limits.step()
                    total += len(chunk)
                    limits.need(total)
                    chunks.append(chunk)
        except Exception as error:  # a template can raise whatever Python's operators and methods raise
            raise ValueError(f"{self.name}: the template cannot be rendered: {_reason(error)}") from error
        return "".join(chunks)

    def _pieces(self, text: str, mark: str | None) -> list[Piece]:
        # A special token of one character cannot be broken inside; in an input, the mark follows it.
        pattern = f"({self._special})" + (f"(?!{mark})" if mark else "")
        cut = re.split(pattern, text)  # text, special token, text, ...
        pieces = [Piece(_without(one, mark), index % 2 == 1) for index, one in enumerate(cut)]
        return [piece for piece in pieces if piece.text]

    def _broken(self, text: str, mark: str) -> str:
        """The text with the mark after the first character of every spelling, also of those that overlap."""
        cuts = [0, *(match.start() + 1 for match in self._spelling.finditer(text)), len(text)]
        return mark.join(text[begin:end] for begin, end in itertools.pairwise(cuts))

    def _free_mark(self, texts: Collection[str]) -> str:
        """A character that no text has, neither itself nor escaped as in JSON."""
        everything = "\0".join(texts).lower()
        free = (chr(code) for code in PRIVATE_USE if chr(code) not in everything and f"\\u{code:x}" not in everything)
        mark = next(free, None)
        if mark is None:
            raise ValueError(
                f"{self.name}: the messages hold the name of a special token and all {len(PRIVATE_USE)} private-use "
                "characters, one of which must be free; remove these characters"
            )
        return mark


# Contents and orders of roles at which templates differ from each other.
PROBES: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "\t1 < 2 & é\n\n3 "}],
    [{"role": "system", "content": "A"}, {"role": "system", "content": "B"}, {"role": "user", "content": ""}],
    [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}] * 3,
    [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}, {"role": "ipython", "content": "{}"}],
)

TOOL_PROBE = "name_of_the_probe"


def is_llama3(template: ChatTemplate) -> bool:
    """Whether a template writes Llama 3's own format, as ChatFormat does, for all PROBES with a generation prompt."""
    for messages in PROBES:
        try:
            pieces = template.render(messages)
        except ValueError:
            return False
        if pieces != list(_llama3_pieces(messages)):
            return False
    return True


def writes_tools(template: ChatTemplate) -> bool:
    """Whether a template writes the tools that it gets into the prompt."""
    function = {"name": TOOL_PROBE, "description": TOOL_PROBE, "parameters": {"type": "object", "properties": {}}}
    try:
        pieces = template.render(PROBES[0], tools=[{"type": "function", "function": function}])
    except ValueError:
        return False
    return any(TOOL_PROBE in piece.text for piece in pieces)


def _llama3_pieces(messages: Sequence[Mapping[str, str]]) -> Iterator[Piece]:
    yield Piece("<|begin_of_text|>", True)
    for message in (*messages, {"role": "assistant"}):
        yield from (Piece("<|start_header_id|>", True), Piece(message["role"], False), Piece("<|end_header_id|>", True))
        yield Piece("\n\n" + message.get("content", "").strip(), False)
        if "content" in message:
            yield Piece("<|eot_id|>", True)


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """A copy of plain types: other objects have methods that the sandbox does not know. ValueError for other types."""
    if depth > MAX_DEPTH:
        raise ValueError(f"{name}: expected lists and dicts nested at most {MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int | float):
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return {_plain(key, name, depth + 1): _plain(one, name, depth + 1) for key, one in value.items()}
    if isinstance(value, list | tuple):
        kind = tuple if isinstance(value, tuple) else list
        return kind(_plain(one, name, depth + 1) for one in value)
    raise ValueError(f"{name}: expected values as in JSON, got {short_repr(value)}, a {type(value).__name__}")


def _texts(value: Any) -> Iterator[str]:
    """Every text in a value of plain types, keys of dicts too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for one in (*value.keys(), *value.values()) if isinstance(value, dict) else value:
            yield from _texts(one)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    """The value of plain types with every text changed, keys of dicts too."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {_map_texts(key, change): _map_texts(one, change) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map_texts(one, change) for one in value)
    return value


def _without(text: str, mark: str | None) -> str:
    """The text without the mark, which filters such as tojson may have escaped."""
    return text if mark is None else text.replace(mark, "").replace(f"\\u{ord(mark):x}", "")


def _reason(error: Exception) -> str:
    """The error in one line. Those of templates say what is wrong; others need their type."""
    text = " ".join(str(error).split())[:MAX_REASON_CHARS]
    return text if text and isinstance(error, jinja2.TemplateError) else f"{type(error).__name__} {text}".strip()
