"""How models write calls of tools: the grammar of an answer with calls, and the patterns by which a parser finds them.

A call is an object with the function's name and its arguments. Formats differ in what stands around it.
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fastllama.engine.grammar import JSON_SPACE as SPACE  # in a call
from fastllama.engine.grammar import Grammar
from fastllama.tokenizer_base import BaseTokenizer

EDGE = r"[\x20\x0A\x0D\x09]{0,20}"  # around a call
TYPE = rf'("type"{SPACE}:{SPACE}"function"{SPACE},{SPACE})?'  # which some models write before the name
NAME_KEY = rf'\{{{SPACE}{TYPE}"name"'
ANYTHING = "(?s:.*)"
Instead = Literal["text", "json"] | None  # of calls, in an answer
CACHED_GRAMMARS = 32
ID_CHARS = 9  # of a call in Mistral's templates


@dataclass(frozen=True)
class Function:
    """A function that may be called."""

    name: str
    parameters: Mapping[str, Any]  # a JSON schema
    is_strict: bool = False  # whether a keyword of the schema that is not supported is an error


@dataclass(frozen=True)
class CallPatterns:
    """Regular expressions around the arguments of calls. `first` and `following` have the group "name"."""

    trigger: str  # the beginning of `first`, after which it is a call
    first: str  # from the end of the text to the brace of the first arguments
    following: str | None  # from the end of arguments to the brace of the next ones; None: as `end`, then `first`
    end: str  # from the end of arguments to that of the calls
    is_anywhere: bool = True  # whether text may come before calls


class CallFormat(ABC):
    """A format of calls.

    Attributes:
        name: of the format.
        key: of a call's arguments in its object.
        has_several: whether an answer may have several calls.
    """

    name: str
    key = "arguments"
    has_several = True

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        self._tokenizer = tokenizer

    def grammar(
        self,
        functions: Sequence[Function],
        *,
        is_required: bool,
        has_several: bool,
        answer: Mapping[str, Any] | None = None,
    ) -> Grammar:
        """The grammar of an answer.

        is_required: it has calls, and no text before them. has_several: it may have several calls, if the format allows
        them. answer: the JSON schema that it follows if it has no calls; None: any text. Raises ValueError for a schema
        that is not supported.
        """
        instead: Instead = None if is_required else "text" if answer is None else "json"
        rules = self._calls(functions, instead, has_several)
        if instead == "text":
            rules |= self._text()
        elif answer is not None:
            rules["answer"] = _json(answer, {})
        for index, function in enumerate(functions):
            options = {} if function.is_strict else {"lenient": True}
            rules[f"arguments_{index}"] = _json(function.parameters, options)
        choices = " | ".join(name for name in ("calls", "answer", "text") if name in rules)
        lines = [f"start: {choices}", *(f"{name}: {rule}" for name, rule in rules.items())]
        return _grammar("\n".join(lines))

    def template_id(self, call_id: str) -> str:
        """The id of a call in the form that templates of this format take."""
        return call_id

    @abstractmethod
    def patterns(self, names: Iterable[str]) -> CallPatterns:
        """The patterns of calls of these functions."""

    @abstractmethod
    def _calls(self, functions: Sequence[Function], instead: Instead, has_several: bool) -> dict[str, str]:
        """The rules of `calls`.

        instead: what may come in their place. Text may come before them, too. Beside JSON, no lexeme may begin as JSON
        does and go on otherwise, because the lexer takes the longest.
        """

    @abstractmethod
    def _text(self) -> dict[str, str]:
        """The rules of `text`, which has no calls."""

    def _head(self, name: str) -> str:
        """The beginning of a call's object, up to its arguments."""
        return rf'\{{{SPACE}"name"{SPACE}:{SPACE}"{name}"{SPACE},{SPACE}"{self.key}"{SPACE}:{SPACE}'

    def _token(self, marker: str) -> str | None:
        """A marker that is one special token, in Lark; None if the tokenizer has none that is written so."""
        token = self._tokenizer.special_tokens.get(marker)
        return f"<[{token}]>" if token is not None and self._tokenizer.decode([token]) == marker else None

    def _other_tokens(self, markers: Iterable[str]) -> str | None:
        """All special tokens that may be in a text, in Lark."""
        special = self._tokenizer.special_tokens
        taken = {special[name] for name in markers if name in special} | self._tokenizer.stop_tokens
        ids = sorted(set(special.values()) - taken)
        return f"<[{','.join(map(str, ids))}]>" if ids else None


class Llama3Calls(CallFormat):
    """Llama 3.1's: the whole answer is one object. <|python_tag|> may come before it."""

    name = "llama3"
    key = "parameters"
    has_several = False
    tag = "<|python_tag|>"

    def patterns(self, names: Iterable[str]) -> CallPatterns:
        """The patterns of calls of these functions."""
        tag = rf"(?:{_escaped(self.tag)})?{EDGE}"
        first = rf"{tag}{self._head(_named(names))}\{{"
        return CallPatterns(rf"{_escaped(self.tag)}|{EDGE}{NAME_KEY}", first, None, rf"{SPACE}\}}", is_anywhere=False)

    def _calls(self, functions: Sequence[Function], instead: Instead, has_several: bool) -> dict[str, str]:
        tag = self._token(self.tag) if instead is not None else None
        rules = {"calls": (f"{tag}? " if tag else "") + _choice("call", functions), "SPACE": f"/{SPACE}/"}
        for index, function in enumerate(functions):
            rules[f"call_{index}"] = f"HEAD_{index} arguments_{index} END"
            # Where a call must come, white space before it would only cost tokens.
            rules[f"HEAD_{index}"] = f"/{'' if instead is None else EDGE}{self._head(function.name)}/"
            if instead == "json":  # the same tokens as in JSON
                names = json.dumps(json.dumps("name")), json.dumps(json.dumps(function.name))
                key = json.dumps(json.dumps(self.key))
                head = f'"{{" SPACE {names[0]} SPACE ":" SPACE {names[1]} SPACE "," SPACE {key} SPACE ":" SPACE'
                rules[f"call_{index}"] = f'{head} arguments_{index} SPACE "}}"'
                del rules[f"HEAD_{index}"]
        return rules if instead == "json" else rules | {"END": rf"/{SPACE}\}}/"}

    def _text(self) -> dict[str, str]:
        others = self._other_tokens([self.tag])
        return {
            "text": "TEXT?" + (f" ({others} ANYTHING?)*" if others else ""),
            "TEXT": f"/{ANYTHING}/ & ~/{EDGE}{NAME_KEY}{ANYTHING}/",
            "ANYTHING": f"/{ANYTHING}/",
        }

    def _head(self, name: str) -> str:
        return super()._head(name).replace('"name"', TYPE + '"name"', 1)


class MarkedCalls(CallFormat):
    """A format in which a marker begins the calls, so that text may come before them."""

    marker: str

    def _text(self) -> dict[str, str]:
        return {"text": ("before " if self._others() else "") + "TEXT?"} | self._text_lexemes()

    def _text_lexemes(self) -> dict[str, str]:
        others = self._others()
        rules = {"before": f"(TEXT? {others})*"} if others else {}
        marker = _escaped(self.marker)
        return rules | {"TEXT": f"/{ANYTHING}/ & ~/{ANYTHING}{marker}{ANYTHING}/"}

    def _others(self) -> str | None:
        return self._other_tokens([self.marker])


class HermesCalls(MarkedCalls):
    """Hermes's and Qwen's: each call stands between <tool_call> and </tool_call>."""

    name = "hermes"
    marker = "<tool_call>"
    end_marker = "</tool_call>"

    def patterns(self, names: Iterable[str]) -> CallPatterns:
        """The patterns of calls of these functions."""
        trigger = EDGE + _escaped(self.marker)
        first = rf"{trigger}{SPACE}{self._head(_named(names))}\{{"
        return CallPatterns(trigger, first, None, rf"{SPACE}\}}{SPACE}{_escaped(self.end_marker)}")

    def _calls(self, functions: Sequence[Function], instead: Instead, has_several: bool) -> dict[str, str]:
        begin, end = self._token(self.marker), self._token(self.end_marker)
        following = f" (({_choice('next', functions)}) end)*" if has_several else ""
        rules = {
            "calls": f"({_choice('first', functions)}) end{following}",
            "end": "END" + (f" | BRACE {end}" if end else ""),
            "BRACE": rf"/{SPACE}\}}{SPACE}/",
            "END": f'BRACE "{self.end_marker}"',
            "EDGE": f"/{EDGE}/",
        }
        if instead == "text" and self._others():
            rules["calls"] = f"before {rules['calls']}"
        for index, function in enumerate(functions):
            text = "TEXT" if instead == "text" else ""
            token = f" | {text + '? ' if text else ''}{begin} HEAD_{index}" if begin else ""
            rules[f"first_{index}"] = f"(FIRST_{index}{token}) arguments_{index}"
            rules[f"FIRST_{index}"] = f'{text} "{self.marker}" HEAD_{index}'
            token = f" | EDGE {begin} HEAD_{index}" if begin else ""
            if has_several:
                rules[f"next_{index}"] = f"(NEXT_{index}{token}) arguments_{index}"
                rules[f"NEXT_{index}"] = f'EDGE "{self.marker}" HEAD_{index}'
            rules[f"HEAD_{index}"] = f"/{SPACE}{self._head(function.name)}/"
        return rules


class MistralCalls(MarkedCalls):
    """Mistral's: the special token [TOOL_CALLS], and a list of calls."""

    name = "mistral"
    marker = "[TOOL_CALLS]"

    def __init__(self, tokenizer: BaseTokenizer) -> None:
        super().__init__(tokenizer)
        self._begin = self._token(self.marker)
        if self._begin is None:
            raise ValueError(f"calls begin with {self.marker}, and the tokenizer has no such token")

    def template_id(self, call_id: str) -> str:
        """Mistral's templates take ids of nine letters and digits."""
        if len(call_id) == ID_CHARS and call_id.isascii() and call_id.isalnum():
            return call_id
        return hashlib.blake2b(call_id.encode(errors="surrogatepass")).hexdigest()[:ID_CHARS]

    def patterns(self, names: Iterable[str]) -> CallPatterns:
        """The patterns of calls of these functions."""
        head = rf"{SPACE}{self._head(_named(names))}\{{"
        trigger = EDGE + _escaped(self.marker)
        first = rf"{trigger}{SPACE}\[{head}"
        return CallPatterns(trigger, first, rf"{SPACE}\}}{SPACE},{head}", rf"{SPACE}\}}{SPACE}\]")

    def _calls(self, functions: Sequence[Function], instead: Instead, has_several: bool) -> dict[str, str]:
        before = ("before " if self._others() else "") + "TEXT? " if instead == "text" else ""
        following = f" ({_choice('next', functions)})*" if has_several else ""
        rules = {
            "calls": f"{before}{self._begin} ({_choice('first', functions)}){following} END",
            "END": rf"/{SPACE}\}}{SPACE}\]/",
        }
        for index, function in enumerate(functions):
            head = f"{SPACE}{self._head(function.name)}"
            rules[f"first_{index}"] = f"FIRST_{index} arguments_{index}"
            rules[f"FIRST_{index}"] = rf"/{SPACE}\[{head}/"
            if has_several:
                rules[f"next_{index}"] = f"NEXT_{index} arguments_{index}"
                rules[f"NEXT_{index}"] = rf"/{SPACE}\}}{SPACE},{head}/"
        return rules


@functools.lru_cache(maxsize=CACHED_GRAMMARS)
def _grammar(text: str) -> Grammar:
    """A checked grammar: clients send the same tools again and again."""
    return Grammar.lark(text)


def _json(schema: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """A JSON schema as a part of a Lark rule."""
    return "%json " + json.dumps({**schema, "x-guidance": {"whitespace_pattern": SPACE, **options}})


def _choice(rule: str, functions: Sequence[Function]) -> str:
    return " | ".join(f"{rule}_{index}" for index in range(len(functions)))


def _named(names: Iterable[str]) -> str:
    """A pattern of any of the names, which hold no characters with a meaning in patterns."""
    return f"(?P<name>{'|'.join(names)})"


def _escaped(marker: str) -> str:
    return "".join(f"\\{char}" if char in "[]/|" else char for char in marker)
