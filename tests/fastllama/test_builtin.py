"""The built-in model through the complete runtime: it tells stories, knows its facts, and stops by itself."""

from pathlib import Path

import pytest

from fastllama import Dialog, Llama, builtin_checkpoint

MAX_SEQ_LEN = 512
FACTS = {
    "What is the capital of France?": "Paris",
    "what is the capital of japan": "Tokyo",
    "Can you tell me the capital of Egypt?": "Cairo",
    "What is the opposite of hot?": "cold",
    "How many legs does a spider have?": "eight",
    "What sound does a cow make?": "moo",
    "Who are you?": "model",
}


@pytest.fixture(scope="module")
def llm() -> Llama:
    return Llama.build(*builtin_checkpoint(), max_seq_len=MAX_SEQ_LEN, max_batch_size=8, device="cpu")


def ask(llm: Llama, *questions: str) -> list[str]:
    dialogs: list[Dialog] = [[{"role": "user", "content": question}] for question in questions]
    return [answer["generation"]["content"] for answer in llm.chat_completion(dialogs, temperature=0)]


def test_facts_of_the_training_text_are_answered(llm: Llama) -> None:
    answers = ask(llm, *FACTS)
    wrong = {q: a for (q, word), a in zip(FACTS.items(), answers, strict=True) if word.lower() not in a.lower()}
    assert not wrong


def test_answers_stop_by_themselves(llm: Llama) -> None:
    dialogs: list[Dialog] = [[{"role": "user", "content": question}] for question in FACTS]
    prompts = [llm.formatter.encode_dialog_prompt(dialog) for dialog in dialogs]
    reasons = [i.finish_reason for i in llm.stream(prompts, MAX_SEQ_LEN) if i.finish_reason]
    assert reasons == ["stop"] * len(FACTS)


def test_a_conversation_with_a_system_message_is_continued(llm: Llama) -> None:
    dialog: Dialog = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
        {"role": "user", "content": "What is the capital of Spain?"},
    ]
    (answer,) = llm.chat_completion([dialog], temperature=0)
    assert "Madrid" in answer["generation"]["content"]


def test_stories_have_sentences_and_end(llm: Llama) -> None:
    prompt = llm.tokenizer.encode("Once upon a time", bos=True, eos=False)
    reasons, text = [], ""
    for increment in llm.stream([prompt], MAX_SEQ_LEN, temperature=0):
        text += increment.text
        reasons.append(increment.finish_reason)
    assert reasons[-1] == "stop" and 200 < len(text) < 1500
    words = text.split()
    assert text.count(".") >= 4 and len(set(words)) > len(words) / 3 and words[-1][-1] in '.!?"'


def test_sampling_with_the_default_settings_still_ends(llm: Llama) -> None:
    out = llm.text_completion(["Once upon a time"] * 8, seed=1)
    stories = [row["generation"] for row in out]
    assert len(set(stories)) == 8 and all(100 < len(story) < 2000 for story in stories)


def test_a_dialog_of_900_characters_fits_the_examples_context(llm: Llama) -> None:
    text = (
        "The old lighthouse on the northern coast was built more than a hundred years ago, when ships still "
        "carried coal and timber along the shore. Every evening the keeper climbed the narrow stairs, cleaned the"
        " lamp and wrote down the weather in a heavy book. Visitors who come today can read those notes and see "
        "how often storms kept the fishermen at home. The village below has changed a great deal since then. Most"
        " young people work in the city and return only at the weekend, but the small school is open again, and a"
        " baker has moved into the empty shop next to the harbour. Last summer a group of students painted the "
        "boats and planted apple trees behind the church. If you have time, walk along the cliffs in the morning,"
        " when the light is clear and you can hear the birds before you see them. Please bring good shoes and "
        "something warm to drink, because the wind is stronger than it looks."
    )
    tokens = llm.formatter.encode_dialog_prompt([{"role": "user", "content": text[:900]}])
    assert len(text) >= 850 and len(tokens) < MAX_SEQ_LEN
    assert len(text) / len(llm.tokenizer.encode(text, bos=False, eos=False)) >= 2.5


def test_the_checkpoint_is_small_and_in_metas_layout() -> None:
    folder, tokenizer = map(Path, builtin_checkpoint())
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["consolidated.00.pth", "params.json", "tokenizer.model"] and tokenizer.parent == folder
    assert sum(path.stat().st_size for path in folder.iterdir()) < 6_000_000
