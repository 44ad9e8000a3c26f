"""/tokenize and /detokenize, with vLLM's fields."""

from typing import Any

from fastllama import validate
from fastllama.openai_api.errors import InvalidRequest
from fastllama.openai_api.fields import flag, text
from fastllama.openai_api.requests import chat_request, encode
from fastllama.server.service import Service

FLAGS = {"add_special_tokens": True, "return_token_strs": False, "add_generation_prompt": True}  # and their defaults


def tokenized(service: Service, body: object) -> dict[str, Any]:
    """The tokens of a prompt, or of a chat's messages. Raises InvalidRequest."""
    fields = _fields(service, body)
    flags = {name: flag(fields, name, default=default) for name, default in FLAGS.items()}
    engine, tokenizer = service.engine, service.served.tokenizer
    if "messages" in fields:
        if not flags["add_generation_prompt"]:
            raise InvalidRequest(
                "add_generation_prompt must be true: a chat is encoded as far as the answer's begin",
                param="add_generation_prompt",
                code="unsupported_parameter",
            )
        chat = {name: fields[name] for name in ("messages", "tools") if name in fields}
        (tokens,) = encode(engine, chat_request(chat, formatter=engine.llm.formatter))
    elif isinstance(fields.get("prompt"), str):
        tokens = tokenizer.encode(fields["prompt"], bos=flags["add_special_tokens"], eos=False)
    else:
        raise InvalidRequest(
            f"the body must have prompt, a text, or messages, got {fields.get('prompt')!r:.60}", param="prompt"
        )
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": engine.llm.model.params.max_seq_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if flags["return_token_strs"]:
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
