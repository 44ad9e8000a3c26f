"""What a request asks for: how tokens are drawn, when an answer ends, and what is returned with it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastllama import validate
from fastllama.engine.grammar import Grammar
from fastllama.kernels.sampling.controls import MAX_TOP_TOKENS

MAX_PENALTY = 2.0  # of presence and frequency, in both directions, as in OpenAI's API
MAX_BIAS = 100.0
MAX_STOP_STRINGS = 64
MAX_ANSWERS = 1024
MOST_TOKENS = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a request is answered. Values are checked at construction: ValueError names what was expected.

    Log-probabilities are those of the model, before temperature, top-p and all other settings.
    """

    max_gen_len: int | None = None  # the most tokens of an answer; None: up to the end of the context
    temperature: float = 0.6  # 0 takes the most likely token
    top_p: float = 0.9  # draw from the smallest set of tokens with this probability mass; 1 keeps all
    top_k: int = 0  # draw from the k most likely tokens; 0 keeps all
    min_p: float = 0.0  # draw from tokens of at least this share of the most likely one's probability
    seed: int | None = None  # makes the draws repeatable, in any company; None: different draws in every request
    n: int = 1  # answers, each from its own random stream
    stop: Sequence[str] = ()  # texts that end an answer, which does not hold them
    stop_token_ids: Sequence[int] = ()  # tokens that end an answer, beside the tokenizer's
    ignore_eos: bool = False  # do not end at the tokenizer's stop tokens
    min_tokens: int = 0  # draw no stop token before so many tokens
    logprobs: int | None = None  # log-probabilities of the tokens, and of so many most likely alternatives
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    echo: bool = False  # return the prompt first
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less likely
    presence_penalty: float = 0.0  # taken from the logits of tokens in the answer
    frequency_penalty: float = 0.0  # the same, times how often they occur
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    grammar: Grammar | None = None  # answers follow it; they end where it does, or may at a stop token

    def __post_init__(self) -> None:
        check = validate.whole_number
        values: dict[str, Any] = {
            "max_gen_len": None if self.max_gen_len is None else check("max_gen_len", self.max_gen_len, 0),
            "temperature": validate.temperature(self.temperature),
            "top_p": validate.top_p(self.top_p),
            "top_k": check("top_k", self.top_k, 0, MOST_TOKENS),
            "min_p": validate.real("min_p", self.min_p, 0.0, 1.0),
            "seed": None if self.seed is None else validate.seed(self.seed),
            "n": check("n", self.n, 1, MAX_ANSWERS),
            "stop": _stop_strings(self.stop),
            "stop_token_ids": tuple(check("a stop token id", i, 0) for i in self._list("stop_token_ids")),
            "ignore_eos": validate.flag("ignore_eos", self.ignore_eos),
            "min_tokens": check("min_tokens", self.min_tokens, 0, MOST_TOKENS),
            "echo": validate.flag("echo", self.echo),
            "repetition_penalty": validate.real("repetition_penalty", self.repetition_penalty, 1e-3, 1e3),
            "logit_bias": self._biases(),
            "grammar": self._grammar(),
        }
        for name in ("logprobs", "prompt_logprobs"):
            given = getattr(self, name)
            values[name] = None if given is None else check(name, given, 0, MAX_TOP_TOKENS)
        for name in ("presence_penalty", "frequency_penalty"):
            values[name] = validate.real(name, getattr(self, name), -MAX_PENALTY, MAX_PENALTY)
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if self.max_gen_len is not None and self.min_tokens > self.max_gen_len:
            raise ValueError(
                f"min_tokens must be at most max_gen_len, got {self.min_tokens} and {self.max_gen_len}: lower the one, "
                "or raise the other"
            )

    @property
    def needs_controls(self) -> bool:
        """Whether logits are changed before a token is drawn."""
        neutral = (0, 0.0, 1.0, 0.0, 0.0, 0)
        given = (self.top_k, self.min_p, self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return (*given, self.min_tokens) != neutral or bool(self.logit_bias)

    @property
    def is_greedy(self) -> bool:
        """Whether every token is the most likely one."""
        return self.temperature == 0 or self.top_p == 0

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are returned, too."""
        return self.prompt_logprobs is not None or (self.echo and self.logprobs is not None)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise ValueError for a token id outside the vocabulary."""
        for name, ids in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in ids:
                if token >= vocab_size:
                    raise ValueError(f"{name} must have token ids from 0 to {vocab_size - 1}, got {token}")

    def _list(self, name: str) -> list[Any]:
        return validate.listed(name, getattr(self, name))

    def _grammar(self) -> Grammar | None:
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar must be a Grammar, such as Grammar.json_schema(...), got {self.grammar!r:.80}")
        return self.grammar

    def _biases(self) -> dict[int, float]:
        if not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias must be a mapping of token ids to numbers, got {self.logit_bias!r:.80}")
        return {
            validate.whole_number("a token id in logit_bias", _id(token), 0): validate.real(
                "a value in logit_bias", value, -MAX_BIAS, MAX_BIAS
            )
            for token, value in self.logit_bias.items()
        }


def _id(token: Any) -> Any:
    """A token id; in JSON the names of an object's fields are texts."""
    return int(token) if isinstance(token, str) and token.isdecimal() else token


def _stop_strings(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else validate.listed("stop", value if value is not None else ())
    for text in texts:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop must be texts that are not empty, got {text!r:.80}")
    if len(texts) > MAX_STOP_STRINGS:
        raise ValueError(f"stop must be at most {MAX_STOP_STRINGS} texts, got {len(texts)}")
    return tuple(dict.fromkeys(texts))
