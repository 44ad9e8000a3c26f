"""What lm-evaluation-harness asks, in the engine's terms: without lm_eval."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastllama import Llama, builtin_checkpoint
from fastllama.chat_format import NoFormat, TemplateFormat
from fastllama.chat_template import ChatTemplate
from fastllama.evaluation import answer_text, encode, render_chat, sampling_params, stated_context
from fastllama.tokenizer_huggingface import HuggingFaceTokenizer
from tests.support.pipelines import PIPELINES, write_pipeline

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(params=sorted(PIPELINES))
def tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer(write_pipeline(PIPELINES[request.param](), tmp_path, eos_token="</s>"))


@pytest.mark.parametrize("text", ["Once upon a time", "<s>She had 12 apples", "a<|im_end|>\nb", "", " the  dog"])
def test_prompts_are_encoded_as_by_transformers(tokenizer: HuggingFaceTokenizer, tmp_path: Path, text: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert encode(tokenizer, text, begins=True) == theirs.encode(text)
    assert encode(tokenizer, text, begins=False) == theirs.encode(text, add_special_tokens=False)


def test_a_text_that_spells_its_begin_gets_no_other(tokenizer: HuggingFaceTokenizer) -> None:
    plain = encode(tokenizer, "the dog", add_bos=False)
    assert encode(tokenizer, "<s>the dog", first="<s>").count(tokenizer.bos_id) == 1
    assert encode(tokenizer, "the dog", add_bos=True) == [tokenizer.bos_id, *plain]
    assert tokenizer.bos_id not in plain


def test_settings_of_a_task_become_sampling_params() -> None:
    params, stops = sampling_params({"until": ["\n", "Question:"], "max_gen_toks": 24, "do_sample": False}, "</s>")
    assert (params.max_gen_len, params.temperature, params.stop) == (24, 0.0, ("\n", "Question:", "</s>"))
    assert stops == ["\n", "Question:", "</s>"]
    params, _ = sampling_params({"until": "\n", "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 3}, "")
    assert (params.max_gen_len, params.temperature, params.top_p, params.stop) == (3, 0.7, 0.9, ("\n",))
    params, stops = sampling_params({"do_sample": True, "top_k": 5, "num_beams": 1}, "", 99)
    assert (params.max_gen_len, params.temperature, params.top_p, params.top_k, stops) == (99, 1.0, 1.0, 5, [])
    params, _ = sampling_params({"do_sample": False, "temperature": 0.7, "top_p": 0.5}, "")
    assert params.is_greedy


def test_settings_that_would_change_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="num_beams=4, which this model does not know: expected until, do_sample"):
        sampling_params({"num_beams": 4}, "")


def test_an_answer_has_no_special_tokens_and_no_thoughts(tokenizer: HuggingFaceTokenizer) -> None:
    end = tokenizer.special_tokens["<|im_end|>"]
    tokens = [*encode(tokenizer, "the dog", begins=False), end, *encode(tokenizer, ".", begins=False)]
    assert answer_text(tokenizer, tokens, tokenizer.decode(tokens), [], None).replace(" ", "") == "thedog."
    assert answer_text(tokenizer, [], "a</think>\n b. c", ["."], "</think>") == "b"
    assert answer_text(tokenizer, [], "a b", [], "</think>") == "a b"


@pytest.mark.parametrize("trims", [False, True])
@pytest.mark.parametrize("content", ["The answer is", "The answer is ", "a <|im_end|>"])
@pytest.mark.parametrize("adds_prompt", [True, False])
def test_conversations_are_rendered_as_by_transformers(
    tokenizer: HuggingFaceTokenizer, tmp_path: Path, trims: bool, content: str, adds_prompt: bool
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    source = TEMPLATE.replace("message.content", "message.content | trim") if trims else TEMPLATE
    template = ChatTemplate(source, special_tokens=tokenizer.named_tokens, special_names=tokenizer.special_tokens)
    messages: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path, chat_template=source)
    expected = theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=adds_prompt, continue_final_message=not adds_prompt
    )
    assert render_chat(TemplateFormat(tokenizer, template, {}), messages, adds_prompt=adds_prompt) == expected
    assert messages[-1]["content"] == content


def test_llama3s_format_is_rendered() -> None:
    builtin = Llama.build(*builtin_checkpoint(), max_seq_len=64, max_batch_size=1, device="cpu")
    messages: list[Any] = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So: "}]
    text = render_chat(builtin.formatter, messages[:1], adds_prompt=True)
    assert encode(builtin.tokenizer, text, first="<|begin_of_text|>") == builtin.formatter.encode_dialog_prompt(
        messages[:1]
    )
    assert render_chat(builtin.formatter, messages, adds_prompt=False) == text + "So:"


def test_a_model_without_a_format_has_no_conversations() -> None:
    with pytest.raises(ValueError, match="no chat template here"):
        render_chat(NoFormat("no chat template here"), [{"role": "user", "content": "Hi"}], adds_prompt=True)


def test_the_stated_context_is_at_most_what_a_build_takes(tmp_path: Path) -> None:
    assert stated_context(str(tmp_path)) == 8192
    for stated, expected in ((2048, 2048), (131072, 8192), (None, 8192)):
        (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": stated}))
        assert stated_context(str(tmp_path)) == expected
