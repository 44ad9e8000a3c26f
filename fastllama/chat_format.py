"""How a model's conversations are written: Llama 3's format, or the chat template of its checkpoint."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastllama import llama3_tools
from fastllama.chat_template import INPUTS, ChatTemplate, check_tools, is_llama3, writes_tools
from fastllama.chat_template_files import TOOL_USE, find_chat_template, read_source, read_special_tokens
from fastllama.tokenizer import CHAT_TOKENS, ChatFormat, Dialog, Tokenizer, check_dialog
from fastllama.tokenizer_base import DEFAULT_TEMPLATE, BaseTokenizer

LLAMA3 = "llama3"
TOOL_ROLE = "tool"  # of a message with the result of a call
Tools = Sequence[Mapping[str, Any]]
STOPS = ("<|eot_id|>", "<|eom_id|>")  # at which Llama 3's format ends a message


class TemplateFormat:
    """Encodes conversations with a chat template.

    Attributes:
        name: where the template comes from.
        tokenizer: the model's tokenizer.
        template: the ChatTemplate.
        tool_template: the ChatTemplate of dialogs that bring tools of their own.
        tools: the JSON schemas of the functions that the model may call; None if it gets none.
        template_args: variables of the template beside the dialog and the tools.
    """

    def __init__(
        self,
        tokenizer: BaseTokenizer,
        template: ChatTemplate,
        template_args: Mapping[str, Any],
        tool_template: ChatTemplate | None = None,
    ) -> None:
        self.name = template.name
        self.tokenizer = tokenizer
        self.template = template
        self.tool_template = tool_template or template
        self.template_args = dict(template_args)
        self.tools = self.template_args.pop("tools", None)

    def encode_dialog_prompt(self, dialog: Dialog, tools: Tools | None = None) -> list[int]:
        """The dialog and the beginning of the assistant's next message.

        tools: JSON schemas in place of those that were given at the build. Messages may have tool_calls, whose
        arguments are objects, and the role tool. Raises ValueError if `dialog` is not a dialog, or the template refuses
        it.
        """
        check_dialog(dialog, may_call=True)
        template = self.template if tools is None and not has_calls(dialog) else self.tool_template
        schemas = self.tools if tools is None else tools
        pieces = template.render(dialog, tools=schemas, template_args=self.template_args)
        return self.tokenizer.encode_pieces(pieces)

    def __repr__(self) -> str:
        return f"TemplateFormat({self.name!r})"


class Llama3Format(ChatFormat):
    """Llama 3's format. Tools are written by the checkpoint's template, where it has one that does, or by us.

    Attributes:
        tool_format: the format of dialogs with tools; None if the checkpoint has none.
    """

    def __init__(self, tokenizer: BaseTokenizer, tool_format: TemplateFormat | None = None) -> None:
        super().__init__(tokenizer)
        self.tool_format = tool_format

    def encode_dialog_prompt(self, dialog: Dialog, tools: Tools | None = None) -> list[int]:
        """As ChatFormat. tools: JSON schemas. Messages may have tool_calls, and the role tool, as in TemplateFormat."""
        check_dialog(dialog, may_call=True)
        if tools is not None or has_calls(dialog):
            if self.tool_format is not None:
                return self.tool_format.encode_dialog_prompt(dialog, tools)
            dialog = llama3_tools.plain_dialog(dialog, tools or ())
        return super().encode_dialog_prompt(dialog)


class NoFormat:
    """Stands for the format of a model without one: encoding raises ValueError."""

    name = "none: a base model, or its format is not known"

    def __init__(self, reason: str) -> None:
        self.reason = reason

    def encode_dialog_prompt(self, dialog: Dialog, tools: Tools | None = None) -> list[int]:
        """Raises ValueError, always."""
        raise ValueError(self.reason)

    def __repr__(self) -> str:
        return "NoFormat()"


Formatter = Llama3Format | TemplateFormat | NoFormat


def has_calls(dialog: Dialog) -> bool:
    """Whether a dialog has calls of tools, or their results."""
    return any(message.get("role") == TOOL_ROLE or message.get("tool_calls") for message in dialog)


def choose_format(
    tokenizer: BaseTokenizer,
    folders: Sequence[Path],
    *,
    is_meta: bool,
    chosen: str | os.PathLike[str] | None = None,
    template_args: Mapping[str, Any] | None = None,
) -> Formatter:
    """The format of a checkpoint. Its chat templates are in the first of the folders that has any.

    is_meta: whether the checkpoint has Meta's layout, in which Llama 3's format needs no template. chosen: the path of
    a template, the name of one of the folder's, or "llama3"; None takes the folder's usual one, or with tools the one
    named "tool_use" if there is one, as dialogs with tools of their own do. template_args: the template's variables;
    "tools" are JSON schemas. Without tools, a template that writes Llama 3's format gives a Llama3Format, and the
    tokens at which its messages end become stop tokens.

    Raises ValueError for a template that does not exist or is not valid, for template_args without a template, and for
    tools that are not a list of dicts.
    """
    _check_arguments(chosen, template_args)
    has_tools = template_args is not None and template_args.get("tools") is not None
    speaks_llama3 = all(name in tokenizer.special_tokens for name in CHAT_TOKENS)
    template, problem = None, f"{folders[0]} has no chat template, so this is a base model or its format is not known"
    if chosen != LLAMA3 and not (is_meta and chosen is None):
        try:
            template = _template(tokenizer, folders, chosen, has_tools)
        except ValueError as error:
            if chosen is not None or template_args:
                raise
            problem = str(error)  # which must not keep anyone from completing texts
    uses_template = has_tools or chosen is not None or not speaks_llama3
    tool_template = _tool_template(tokenizer, folders, template) if chosen is None else template
    if template is not None and (uses_template or not is_llama3(template)):
        return TemplateFormat(tokenizer, template, template_args or {}, tool_template)
    if template_args:
        raise ValueError("template_args are for a chat template, and this model uses none: leave them out")
    if speaks_llama3 and (is_meta or chosen == LLAMA3 or template is not None):
        if not isinstance(tokenizer, Tokenizer):  # which has the stop tokens of its version
            known = tokenizer.special_tokens
            tokenizer.stop_tokens |= {known[name] for name in STOPS if name in known}
        if tool_template is None or not writes_tools(tool_template):
            return Llama3Format(tokenizer)
        return Llama3Format(tokenizer, TemplateFormat(tokenizer, tool_template, {}))
    if chosen == LLAMA3:
        missing = [name for name in CHAT_TOKENS if name not in tokenizer.special_tokens]
        raise ValueError(f'chat_template="llama3" needs the special tokens {", ".join(missing)}: this model has others')
    what = 'or chat_template="llama3", ' if speaks_llama3 else ""
    return NoFormat(
        f"{problem}: complete texts with it (text_completion, fastllama complete), or give the path of a template as "
        f"chat_template=, {what}to chat"
    )


def _check_arguments(chosen: object, template_args: object) -> None:
    if chosen is not None and not isinstance(chosen, str | os.PathLike):
        raise ValueError(f'chat_template must be a path, the name of a template or "llama3", got {chosen!r:.80}')
    if template_args is not None and not isinstance(template_args, Mapping):
        raise ValueError(f"template_args must be a mapping of names to values, got {template_args!r:.80}")
    if taken := [name for name in INPUTS if name != "tools" and name in (template_args or ())]:
        raise ValueError(f"template_args must not hold {', '.join(taken)}, which a dialog gives to its template")
    check_tools((template_args or {}).get("tools"))


def _template(
    tokenizer: BaseTokenizer, folders: Sequence[Path], chosen: str | os.PathLike[str] | None, has_tools: bool
) -> ChatTemplate | None:
    """The chosen template; None if the folders have none and none was chosen."""
    folder, found = folders[0], dict(tokenizer.chat_templates)
    for other in folders:
        if not found:
            folder, found = other, find_chat_template(other)
    usual = TOOL_USE if has_tools and TOOL_USE in found else DEFAULT_TEMPLATE
    name = usual if chosen is None else os.fspath(chosen)
    if name in found:
        source, label = found[name], f"{folder}, chat template {name!r}"
    elif chosen is None:
        if not found:
            return None
        raise ValueError(f"{folder} has no usual chat template, only {', '.join(map(repr, found))}: choose one")
    elif os.path.isfile(name):
        source, label = read_source(Path(name)), name
    else:
        known = f", a name of {', '.join(map(repr, found))}" if found else ""
        raise ValueError(f'chat_template must be the path of a template, "llama3"{known}, got {name!r}')
    named = tokenizer.named_tokens or read_special_tokens(folder) or _named_tokens(tokenizer)
    return ChatTemplate(source, name=label, special_tokens=named, special_names=tokenizer.special_tokens)


def _tool_template(
    tokenizer: BaseTokenizer, folders: Sequence[Path], template: ChatTemplate | None
) -> ChatTemplate | None:
    """The template of dialogs with tools; `template` is that of others."""
    if template is None:
        return None
    try:
        return _template(tokenizer, folders, None, True)
    except ValueError:  # which must not keep anyone from chatting without tools
        return template


def _named_tokens(tokenizer: BaseTokenizer) -> dict[str, str]:
    """bos_token and eos_token, for a folder that does not name them."""
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    return {name: names[number] for name, number in ids.items() if number in names}
