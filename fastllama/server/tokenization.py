"""/tokenize and /detokenize, with vLLM's fields."""

from typing import Any

from fastllama import validate
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import flag, text
from fastllama.openai_api.requests import chat_request, encode
from fastllama.server.service import Service

OWN_FIELDS = ("prompt", "return_token_strs")  # that a chat does not have


def tokenized(service: Service, body: object) -> dict[str, Any]:
    """The tokens of a prompt, or of a chat's messages. Raises InvalidRequest.

    A chat may have all fields that /v1/chat/completions takes, and is refused what that refuses.
    """
    fields = _fields(service, body)
    has_texts = flag(fields, "return_token_strs")
    engine, tokenizer = service.engine, service.served.tokenizer
    if "messages" in fields:
        chat = {name: value for name, value in fields.items() if name not in OWN_FIELDS}
        (tokens,) = encode(engine, chat_request(chat, formatter=engine.facts.formatter, allow_unknown=True))
    elif isinstance(fields.get("prompt"), str):
        bos = flag(fields, "add_special_tokens", default=True)
        tokens = tokenizer.encode(fields["prompt"], bos=bos, eos=False)
    else:
        raise InvalidRequest(
            f"the body must have prompt, a text, or messages, got {fields.get('prompt')!r:.60}", param="prompt"
        )
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": engine.facts.max_seq_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if has_texts:
        found["token_strs"] = [tokenizer.decode_bytes([token]).decode(errors="replace") for token in tokens]
    return found


def detokenized(service: Service, body: object) -> dict[str, Any]:
    """The text of tokens. Raises InvalidRequest."""
    fields = _fields(service, body)
    try:
        tokens = [
            validate.whole_number("a token", token, 0) for token in validate.listed("tokens", fields.get("tokens"))
        ]
        return {"prompt": service.served.tokenizer.decode(tokens)}
    except ValueError as error:
        raise InvalidRequest(str(error), param="tokens") from None


def _fields(service: Service, body: object) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be an object, got {body!r:.60}")
    fields = {name: value for name, value in body.items() if value is not None}
    service.check_model(text(fields, "model"))
    return fields
