"""How a model's conversations are written: Llama 3's format, or the chat template of its checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastllama.chat_template import ChatTemplate, is_llama3
from fastllama.chat_template_files import DEFAULT, find_chat_template, read_special_tokens
from fastllama.tokenizer import CHAT_TOKENS, ChatFormat, Dialog, check_dialog
from fastllama.tokenizer_base import BaseTokenizer

LLAMA3 = "llama3"


class TemplateFormat:
    """Encodes conversations with a chat template.

    Attributes:
        name: where the template comes from.
        tokenizer: the model's tokenizer.
        template: the ChatTemplate.
        template_args: variables of the template beside the dialog.
    """

    def __init__(self, tokenizer: BaseTokenizer, template: ChatTemplate, template_args: Mapping[str, Any]) -> None:
        self.name = template.name
        self.tokenizer = tokenizer
        self.template = template
        self.template_args = dict(template_args)

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """The dialog and the beginning of the assistant's next message.

        Raises ValueError if `dialog` is not a dialog, or the template refuses it.
        """
        check_dialog(dialog)
        return self.tokenizer.encode_pieces(self.template.render(dialog, template_args=self.template_args))

    def __repr__(self) -> str:
        return f"TemplateFormat({self.name!r})"


class NoFormat:
    """Stands for the format of a model without one: encoding raises ValueError."""

    name = "none: a base model, or its format is not known"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def encode_dialog_prompt(self, dialog: Dialog) -> list[int]:
        """Raises ValueError, always."""
        raise ValueError(self.reason)

    def __repr__(self) -> str:
        return "NoFormat()"


Formatter = ChatFormat | TemplateFormat | NoFormat


def choose_format(
    tokenizer: BaseTokenizer,
    folder: Path,
    *,
    is_meta: bool,
    chosen: str | os.PathLike[str] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Formatter:
    """The format of a checkpoint whose chat templates, if it has any, are in a folder.

    is_meta: whether the checkpoint has Meta's layout, in which Llama 3's format needs no template. chosen: the path of
    a template, the name of one of the folder's, or "llama3"; None takes the folder's usual one. A template that writes
    Llama 3's format gives a ChatFormat.

    Raises ValueError for a template that does not exist or is not valid, and for template_args without a template.
    """
    speaks_llama3 = all(name in tokenizer.special_tokens for name in CHAT_TOKENS)
    template = None
    if chosen != LLAMA3 and not (is_meta and chosen is None):
        template = _template(tokenizer, folder, chosen)
    if template is not None and not (speaks_llama3 and chosen is None and is_llama3(template)):
        return TemplateFormat(tokenizer, template, template_args or {})
    if template_args:
        raise ValueError("template_args are for a chat template, and this model uses none: leave them out")
    if speaks_llama3 and (is_meta or chosen == LLAMA3 or template is not None):
        return ChatFormat(tokenizer)
    if chosen == LLAMA3:
        missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
        raise ValueError(f'chat_template="llama3" needs the special tokens {", ".join(missing)}: this model has others')
    what = 'or chat_template="llama3", ' if speaks_llama3 else ""
    return NoFormat(
        f"{folder} has no chat template, so this is a base model or its format is not known: complete texts with it "
        f"(text_completion, fastllama complete), or give the path of a template as chat_template=, {what}to chat"
    )


def _template(tokenizer: BaseTokenizer, folder: Path, chosen: str | os.PathLike[str] | None) -> ChatTemplate | None:
    """The chosen template; None if the folder has none and none was chosen."""
    found = find_chat_template(folder)
    name = DEFAULT if chosen is None else os.fspath(chosen)
    if name in found:
        source, label = found[name], f"{folder}, chat template {name!r}"
    elif chosen is None and not found:
        return None
    elif chosen is not None and os.path.isfile(name):
        source, label = Path(name).read_text(encoding="utf-8"), name
    else:
        known = f", a name of {', '.join(map(repr, found))}" if found else ""
        raise ValueError(f'chat_template must be the path of a template, "llama3"{known}, got {name!r}')
    named = read_special_tokens(folder) or _named_tokens(tokenizer)
    return ChatTemplate(source, name=label, special_tokens=named, special_names=tokenizer.special_tokens)


def _named_tokens(tokenizer: BaseTokenizer) -> dict[str, str]:
    """bos_token and eos_token, for a folder that does not name them."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: names[number] for name, number in ids.items() if number in names}
