"""Finds the chat templates of a Hugging Face folder, and the special tokens that they may name."""

from pathlib import Path

from fastllama.checkpoint.json_config import JsonConfig
from fastllama.tokenizer_base import DEFAULT_TEMPLATE

TOOL_USE = "tool_use"  # the usual template of conversations with tools
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"


def find_chat_template(folder: Path) -> dict[str, str]:
    """The sources of a folder's chat templates by name; "default" is the usual one. {} if there is none.

    Files of Jinja replace the templates in `tokenizer_config.json`, as in transformers. Raises ValueError, with the
    file, if it is damaged.
    """
    files = {path.stem: path for path in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if (folder / TEMPLATE_FILE).is_file():
        files[DEFAULT_TEMPLATE] = folder / TEMPLATE_FILE
    if files:
        return {name: read_source(path) for name, path in files.items()}
    if not (folder / CONFIG_FILE).is_file():
        return {}
    config = JsonConfig.read(folder / CONFIG_FILE)
    value = config.values.get("chat_template")
    if value is None:
        return {}
    entries = value if isinstance(value, list) else [{"name": DEFAULT_TEMPLATE, "template": value}]
    for entry in entries:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise config.error("chat_template", 'a text or a list of {"name": ..., "template": ...}')
    return {entry["name"]: entry["template"] for entry in entries}


def read_special_tokens(folder: Path) -> dict[str, str]:
    """The special tokens that a folder's files name, such as `bos_token`, for the variables of a template.

    `tokenizer_config.json` goes before `special_tokens_map.json`. Raises ValueError, with the file, if it is damaged.
    """
    tokens: dict[str, str] = {}
    for path in (folder / SPECIAL_TOKENS_FILE, folder / CONFIG_FILE):
        config = JsonConfig.read(path) if path.is_file() else JsonConfig(path, {})
        for key, value in config.values.items():
            content = value.get("content") if isinstance(value, dict) else value
            # add_bos_token and the like are settings, not tokens.
            if not key.endswith("_token") or isinstance(content, bool) or value is None:
                continue
            if not isinstance(content, str):
                raise config.error(key, 'the text of a token or {"content": text}')
            tokens[key] = content
    return tokens


def read_source(path: Path) -> str:
    """A template's text. ValueError, with the file, if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected a template in UTF-8 ({error}); download it again") from error
