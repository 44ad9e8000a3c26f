"""Compares the vocabulary sizes of tokenizer and embedding, and explains a difference."""

import os
from pathlib import Path

from fastllama.checkpoint.base import Checkpoint
from fastllama.tokenizer_search import find_tokenizer_file


def in_same_folder(checkpoint: Checkpoint, tokenizer_path: str | os.PathLike[str]) -> bool:
    """Whether the tokenizer is in the checkpoint's folder, or in the folder that has the checkpoint in original/."""
    home = Path(os.path.realpath(checkpoint.path))
    if home.parent.name == "original":
        home = home.parent
    if home.name == "original":
        home = home.parent
    # The real path of the folder, not of the file: in a Hugging Face cache every file is a link to another folder.
    place = Path(os.path.realpath(find_tokenizer_file(tokenizer_path).parent))
    return home == place or home in place.parents


def vocabulary_mismatch(checkpoint: Checkpoint, tokenizer_path: str | os.PathLike[str], n_words: int) -> str | None:
    """None if the sizes fit, else what is wrong and what to do.

    They fit if the embedding has `n_words` rows, the tokenizer's size. In Hugging Face's layout and in GGUF it may have
    more than the tokenizer beside it: vocabularies are padded there.
    """
    rows, is_beside = checkpoint.params["vocab_size"], in_same_folder(checkpoint, tokenizer_path)
    if rows == n_words or (rows > n_words and is_beside and checkpoint.format != "meta"):
        return None
    if not is_beside:
        return (
            f"the checkpoint has a vocabulary of {rows} and the tokenizer one of {n_words}: "
            "use the tokenizer that belongs to the checkpoint"
        )
    resize = f"transformers' resize_token_embeddings({n_words}) and save_pretrained"
    if rows > n_words:
        return (
            f"the checkpoint's embedding has {rows} rows and the tokenizer beside it {n_words} tokens: the vocabulary "
            f"was padded or extended by {rows - n_words} rows, which Meta's layout does not allow; if no token uses "
            "them, cut them off"
        )
    return (
        f"the checkpoint's embedding has {rows} rows and the tokenizer beside it {n_words} tokens: {n_words - rows} "
        "tokens have no row; either they were added to the tokenizer alone, or one of the two is another model's; "
        f"download both again, or add the rows with {resize}, and train them"
    )
