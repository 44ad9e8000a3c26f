"""The chat templates and special tokens in a folder's files."""

from pathlib import Path

import pytest

from fastllama.chat_template_files import find_chat_template, read_special_tokens


def test_templates_of_a_folder(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) == {} and read_special_tokens(tmp_path) == {}
    config = tmp_path / "tokenizer_config.json"
    config.write_text('{"model_max_length": 8}')
    assert find_chat_template(tmp_path) == {}
    config.write_text('{"chat_template": "a"}')
    assert find_chat_template(tmp_path) == {"default": "a"}
    config.write_text('{"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]}')
    assert find_chat_template(tmp_path) == {"default": "a", "rag": "b"}
    (tmp_path / "chat_template.jinja").write_text("é\n")
    assert find_chat_template(tmp_path) == {"default": "é\n"}
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("c")
    assert find_chat_template(tmp_path) == {"default": "é\n", "tool_use": "c"}


def test_special_tokens_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<old>", "unk_token": {"content": "<u>"}}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"add_bos_token": true, "bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": null}'
    )
    assert read_special_tokens(tmp_path) == {"bos_token": "<s>", "unk_token": "<u>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", b"{", "is not valid JSON"),
        ("tokenizer_config.json", b"[]", "expected a JSON object"),
        ("tokenizer_config.json", b'{"chat_template": 1}', "field 'chat_template': expected a text or a list"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', "field 'chat_template': expected a text"),
        ("tokenizer_config.json", b'{"bos_token": 1}', "field 'bos_token': expected the text of a token"),
        ("special_tokens_map.json", b'{"eos_token": {"id": 1}}', "field 'eos_token': expected the text of a token"),
        ("chat_template.jinja", b"\xff", "expected a template in UTF-8"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        find_chat_template(tmp_path)
        read_special_tokens(tmp_path)
