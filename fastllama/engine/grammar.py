"""Grammars that answers follow, in the language of llguidance, which the extra `serve` installs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Between the tokens of JSON. Without a limit, a model that is not sure what to write may write spaces for ever.
JSON_SPACE = r"[\x20\x0A\x0D\x09]{0,20}"
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Grammar:
    """A grammar, checked at construction: ValueError says what is wrong with it."""

    source: str  # in the language of llguidance

    def __post_init__(self) -> None:
        if problem := matcher_class().validate_grammar(self.source):
            raise ValueError(problem)

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any]) -> "Grammar":
        """JSON texts of a JSON schema."""
        options = {"whitespace_pattern": JSON_SPACE}
        return cls(matcher_class().grammar_from_json_schema(json.dumps(schema), overrides=options))

    @classmethod
    def json_object(cls) -> "Grammar":
        """JSON objects."""
        return cls.json_schema(ANY_OBJECT)

    @classmethod
    def lark(cls, text: str) -> "Grammar":
        """A grammar in llguidance's variant of Lark."""
        return cls(matcher_class().grammar_from_lark(text))


def is_installed() -> bool:
    """Whether grammars can be made."""
    try:
        matcher_class()
    except ValueError:
        return False
    return True


def matcher_class() -> Any:
    """llguidance's LLMatcher. ValueError if it is not installed."""
    try:
        from llguidance import LLMatcher
    except ImportError:
        raise ValueError("grammars need the package llguidance: pip install 'fastllama[serve]'") from None
    return LLMatcher
