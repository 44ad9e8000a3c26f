"""What `fastllama inspect` says of a checkpoint's tokenizer and chat format."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastllama.checkpoint import Checkpoint

SPECIAL_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")


def describe_tokenizer(path: str, checkpoint: "Checkpoint", named: bool) -> dict[str, Any] | None:
    """The tokenizer as JSON values. None if the folder has none; AssertionError if a given path (`named`) has none."""
    from fastllama.chat_format import choose_format
    from fastllama.checkpoint.vocabulary import vocabulary_mismatch
    from fastllama.tokenizer_open import open_tokenizer
    from fastllama.tokenizer_search import find_tokenizer_file

    try:
        tokenizer = open_tokenizer(path, llama31=checkpoint.params["use_scaled_rope"])
    except AssertionError:
        if named:
            raise
        return None
    known = tokenizer.special_tokens
    found = find_tokenizer_file(path)
    chat_format = choose_format(tokenizer, [checkpoint.path, found.parent], is_meta=checkpoint.format == "meta")
    mismatch = vocabulary_mismatch(checkpoint, path, tokenizer.n_words)
    return {
        "path": str(found),
        "chat_format": chat_format.name,
        "n_words": tokenizer.n_words,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "special_tokens": {name: known[name] for name in SPECIAL_TOKENS if name in known},
        "stop_tokens": sorted({*tokenizer.stop_tokens, *checkpoint.stop_token_ids}),
        "fits_checkpoint": mismatch is None,
        "misfit": mismatch,
    }


def tokenizer_section(tokenizer: dict[str, Any], n_rows: int) -> tuple[str, list[tuple[str, str]]]:
    """The title and the lines of the tokenizer's section; n_rows: rows of the embedding."""
    ends = {"begin_of_text": tokenizer["bos_id"], "end_of_text": tokenizer["eos_id"]}
    special = {name: token for name, token in ends.items() if token >= 0} | tokenizer["special_tokens"]
    misfit = f", NOT the checkpoint's vocabulary of {n_rows}"
    if tokenizer["fits_checkpoint"]:
        n_padding = n_rows - tokenizer["n_words"]
        misfit = f", and {n_padding} rows of the embedding without a token" if n_padding else ""
    rows = [(name.strip("<|>"), str(token)) for name, token in special.items()]
    return f"tokenizer: {tokenizer['n_words']} tokens{misfit}", [
        *([] if tokenizer["fits_checkpoint"] else [("misfit", tokenizer["misfit"])]),
        ("path", tokenizer["path"]),
        *rows,
        ("stop tokens", ", ".join(map(str, tokenizer["stop_tokens"]))),
        ("chat format", tokenizer["chat_format"]),
    ]
