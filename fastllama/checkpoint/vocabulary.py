"""Whether a tokenizer and an embedding have the same vocabulary, and where they have not, what that means."""

import os
from pathlib import Path

from fastllama.checkpoint.base import Checkpoint
from fastllama.tokenizer_files import find_tokenizer_file


def come_together(checkpoint: Checkpoint, tokenizer_path: str | os.PathLike[str]) -> bool:
    """Whether the tokenizer lies in the checkpoint's folder, or in the one that has the checkpoint under original/."""
    home = Path(os.path.realpath(checkpoint.path))
    if home.parent.name == "original":
        home = home.parent
    if home.name == "original":
        home = home.parent
    # The folder's real path, not the file's: in a Hugging Face cache every file is a link to somewhere else.
    place = Path(os.path.realpath(find_tokenizer_file(tokenizer_path).parent))
    return home == place or home in place.parents


def misfit(checkpoint: Checkpoint, tokenizer_path: str | os.PathLike[str], n_words: int) -> str | None:
    """What is wrong where the embedding's rows are not the tokenizer's `n_words` tokens, and what to do; else None."""
    rows = checkpoint.params["vocab_size"]
    if rows == n_words:
        return None
    if not come_together(checkpoint, tokenizer_path):
        return (
            f"the checkpoint has a vocabulary of {rows} and the tokenizer one of {n_words}: "
            "use the tokenizer that belongs to the checkpoint"
        )
    resize = f"transformers' resize_token_embeddings({n_words}) and save_pretrained"
    if rows > n_words:
        return (
            f"the checkpoint's embedding has {rows} rows and the tokenizer beside it {n_words} tokens: the vocabulary "
            f"was padded or extended by {rows - n_words} rows, which fastllama does not support yet; where no token "
            f"uses them, cut them off with {resize}"
        )
    return (
        f"the checkpoint's embedding has {rows} rows and the tokenizer beside it {n_words} tokens: {n_words - rows} "
        "tokens have no row, because they were added to the tokenizer alone or one of the two is another model's; "
        f"download both again, or add the rows with {resize}, and train them"
    )
