"""The files beside the weights of a quantised folder: tokenizer, chat template and settings of generation."""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Pipeline
from tokenizers.processors import TemplateProcessing

from fastllama.checkpoint.base import Checkpoint
from fastllama.checkpoint.huggingface_config import GENERATION_CONFIG_NAME
from fastllama.gguf_header import is_gguf_file
from fastllama.tokenizer_base import DEFAULT_TEMPLATE, BaseTokenizer
from fastllama.tokenizer_gguf import GgufTokenizer
from fastllama.tokenizer_open import open_tokenizer
from fastllama.tokenizer_search import find_tokenizer_file, first_bytes, is_json

COPIED = (
    GENERATION_CONFIG_NAME,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "LICENSE*",
    "NOTICE*",
)
# Beside the tokenizer's file, of a Hugging Face folder.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATE_NAME, MORE_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
TEMPLATE_WORD = re.compile(r"[A-Za-z0-9_-]+")
# Llama 3's format, which chats of a checkpoint in Meta's layout have.
LLAMA3_TEMPLATE = (
    "{{- '<|begin_of_text|>' }}{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
)


def write_other_files(checkpoint: Checkpoint, ckpt_dir: str, tokenizer_path: str | None, folder: Path) -> str | None:
    """Write the files beside the weights to a folder: copies, or what Meta's layout and GGUF say in other ways.

    ckpt_dir: from which the checkpoint was opened. tokenizer_path: of the tokenizer, a file or the folder to find it
    in, which must exist; None: that in ckpt_dir. Returns the name of the tokenizer's file, None if there is none.
    """
    is_huggingface = checkpoint.format == "huggingface"
    if is_huggingface:
        _copy(checkpoint.path, COPIED, folder)
    try:
        found = find_tokenizer_file(tokenizer_path or ckpt_dir)
        name = "tokenizer.json" if is_json(first_bytes(found)) else "tokenizer.model"
        if is_huggingface and not is_gguf_file(found):
            _copy(found.parent, TOKENIZER_FILES, folder)
            shutil.copyfile(found, folder / name)
            return name
        tokenizer = open_tokenizer(found, llama31=bool(checkpoint.params["use_scaled_rope"]))
    except AssertionError:  # there is none
        if tokenizer_path is not None:
            raise
        return None
    ends = sorted({*tokenizer.stop_tokens, *checkpoint.stop_token_ids})
    ids: dict[str, Any] = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends}
    if not (folder / GENERATION_CONFIG_NAME).exists():
        _write_json(
            folder / GENERATION_CONFIG_NAME, {key: value for key, value in ids.items() if value not in (-1, [])}
        )
    if isinstance(tokenizer, GgufTokenizer):
        _write_gguf_tokenizer(tokenizer, folder)
        return "tokenizer.json"
    shutil.copyfile(found, folder / name)
    if _has_llama3_names(tokenizer):
        (folder / TEMPLATE_NAME).write_text(LLAMA3_TEMPLATE, encoding="utf-8")
    return name


def _copy(source: Path, patterns: Sequence[str], folder: Path) -> None:
    """Copy the files of a folder whose paths match a pattern."""
    for path in sorted(path for pattern in patterns for path in source.glob(pattern) if path.is_file()):
        place = folder / path.relative_to(source)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, place)


def _has_llama3_names(tokenizer: BaseTokenizer) -> bool:
    return "<|start_header_id|>" in tokenizer.special_tokens


def _write_gguf_tokenizer(tokenizer: GgufTokenizer, folder: Path) -> None:
    """The pipeline as tokenizer.json, its named tokens and its chat templates."""
    pipeline = Pipeline.from_str(tokenizer.model.to_str())
    for first in tokenizer.encode("", bos=True, eos=False):  # the token with which a text begins, if there is one
        name = pipeline.id_to_token(first)
        pipeline.post_processor = TemplateProcessing(single=[name, "$A"], special_tokens=[(name, first)])
    (folder / "tokenizer.json").write_text(pipeline.to_str(), encoding="utf-8")
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", settings | dict(tokenizer.named_tokens))
    for name, template in tokenizer.chat_templates.items():
        path = folder / TEMPLATE_NAME if name == DEFAULT_TEMPLATE else folder / MORE_TEMPLATES / f"{name}.jinja"
        if TEMPLATE_WORD.fullmatch(name):  # no path to another folder
            path.parent.mkdir(exist_ok=True)
            path.write_text(template, encoding="utf-8")


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
