"""The built-in model's corpus, tokenizer trainer and files, checked without training."""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch

from fastllama import builtin_checkpoint
from fastllama.builtin import corpus
from fastllama.builtin.bpe import count_words, encoding, learn_ranks, read_ranks, write_ranks
from fastllama.builtin.conversations import Turn, dialog
from fastllama.builtin.facts import Fact, all_facts, draw_fact, facts_by_relation
from fastllama.builtin.stories import story, story_parts
from fastllama.builtin.train import DEFAULT_STEPS, PEAK_LEARNING_RATE, TOKENS_PER_STEP, batches, learning_rate
from fastllama.builtin.training_model import TrainableLlama, ffn_width, meta_state_dict
from fastllama.tokenizer import Tokenizer
from tests.support.oracle import meta_transformer

MEGABYTE = 1_000_000
MAX_CHECKPOINT_BYTES = 6 * MEGABYTE
MIN_CHARS_PER_TOKEN = 2.5
# Ordinary English that is not in the corpus.
HELD_OUT = (
    "Thousands of demonstrators marched through the centre of the capital on Sunday to protest against rising rents, "
    "which have doubled in less than a decade. Police put the crowd at around eight thousand; organisers claimed it "
    "was twice as large. The Atlantic puffin is a species of seabird in the auk family. It nests in clifftop colonies, "
    "digging a burrow in which a single white egg is laid. Hi Tom, thanks for getting back to me so quickly. "
    "Unfortunately the invoice you sent last week doesn't match our purchase order. Could you check this and send a "
    "corrected version before the end of the month?"
)


def first_documents(seed: int, count: int) -> list[list[corpus.Span]]:
    return list(itertools.islice(corpus.documents(seed), count))


def fact(relation: str, start: str) -> Fact:
    return next(f for f in facts_by_relation()[relation][1] if start in f.questions[0])


def test_documents_repeat_for_a_seed() -> None:
    assert first_documents(3, 200) == first_documents(3, 200)
    assert first_documents(3, 20) != first_documents(4, 20)


def test_documents_end_with_a_stop_token() -> None:
    for document in first_documents(5, 500):
        assert document[0].text == corpus.BEGIN_OF_TEXT
        assert document[-1].text in (corpus.END_OF_TEXT, corpus.END_OF_TURN)
        assert document[-1].weight == 1.0
        assert not any("{" in span.text or "}" in span.text for span in document if isinstance(span.text, str))


def test_special_tokens_have_the_tokenizers_ids() -> None:
    tokenizer = Tokenizer(builtin_checkpoint()[1])
    ranks = tokenizer.n_words - 256
    assert tokenizer.special_tokens["<|begin_of_text|>"] == ranks + corpus.BEGIN_OF_TEXT
    assert tokenizer.special_tokens["<|end_of_text|>"] == ranks + corpus.END_OF_TEXT
    assert tokenizer.special_tokens["<|start_header_id|>"] == ranks + corpus.START_HEADER
    assert tokenizer.special_tokens["<|end_header_id|>"] == ranks + corpus.END_HEADER
    assert tokenizer.special_tokens["<|eot_id|>"] == ranks + corpus.END_OF_TURN


def test_story_has_a_plausible_length_and_is_filled() -> None:
    rng = random.Random(1)
    for _ in range(300):
        text = story(rng)
        assert 60 <= len(text.split()) <= 190
        assert "{" not in text
        assert " a a " not in text
        assert text[0].isupper()


def test_story_keeps_its_hero() -> None:
    rng = random.Random(2)
    for animal in ("owl", "dog", "elephant"):
        text = story(rng, animal, "Pip")
        assert text.count("Pip") >= 3
        assert animal in text


def test_story_uses_every_plot() -> None:
    rng = random.Random(3)
    first_steps = {name: [line.split("{")[0] for line in steps[0][1]] for name, steps in story_parts().plots.items()}
    told = [story(rng) for _ in range(400)]
    for name, starts in first_steps.items():
        assert any(start and start in text for text in told for start in starts), name


def test_dialog_alternates_and_ends_with_an_answer() -> None:
    rng = random.Random(4)
    for _ in range(500):
        turns = dialog(rng)
        roles = [turn.role for turn in turns]
        talk = roles[1:] if roles[0] == "system" else roles
        assert talk == ["user", "assistant"] * (len(talk) // 2)
        assert 2 <= len(talk) <= 8
        assert turns[-1].learned
        assert all(turn.content and turn.content == turn.content.strip() for turn in turns)


def test_dialog_document_is_the_chat_format() -> None:
    spans = corpus.dialog_document([Turn("user", "Hello"), Turn("assistant", "Hi!"), Turn("user", "Bye")])
    assert [span.text for span in spans[:6]] == [corpus.BEGIN_OF_TEXT, 6, "user", 7, "\n\n", "Hello"]
    assert [span.weight for span in spans if span.text == "Hi!"] == [1.0]
    assert all(span.weight < 0.5 for span in spans if span.text in ("Hello", "user", "\n\n"))


def test_facts_answer_their_questions() -> None:
    rng = random.Random(5)
    assert len(all_facts()) > 1000
    for known in all_facts():
        assert known.key in known.answers[0] or known.key[0].upper() + known.key[1:] in known.answers[0]
        assert "{" not in known.ask(rng) + known.answer(rng)


@pytest.mark.parametrize(
    ("relation", "start", "answer"),
    [
        ("capital", "of France?", "The capital of France is Paris."),
        ("sum", " 3 + 4?", "3 plus 4 is 7."),
        ("difference", " 9 - 4?", "9 minus 4 is 5."),
        ("successor", "after 41?", "42 comes after 41."),
        ("young", "baby owl", "A baby owl is called an owlet."),
        ("kind", "What is an oak", "an oak is a tree."),
    ],
)
def test_answers_of_chosen_facts(relation: str, start: str, answer: str) -> None:
    assert fact(relation, start).answers[0] == answer


def test_fact_without_a_cell_is_left_out() -> None:
    assert not any("Luxembourg" in f.questions[0] for f in facts_by_relation()["language"][1])
    assert any("Luxembourg" in f.questions[0] for f in facts_by_relation()["capital"][1])


def test_draw_fact_stays_in_its_relation() -> None:
    rng = random.Random(6)
    assert {draw_fact(rng, "plural").relation for _ in range(50)} == {"plural"}


def test_sums_and_differences_are_right() -> None:
    for relation in ("sum", "difference"):
        for known in facts_by_relation()[relation][1]:
            left, sign, right = known.questions[0].removeprefix("What is ").removesuffix("?").split()
            result = int(left) + int(right) if sign == "+" else int(left) - int(right)
            assert known.key == f"is {result}."
            assert 0 <= result <= 20


def test_ranks_are_bytes_then_merges_in_order() -> None:
    ranks = learn_ranks({"aaaa": 5, "ab": 4, " ab": 3}, 259)
    assert [ranks[bytes([value])] for value in range(256)] == list(range(256))
    # The pair "a"+"a" occurs 15 times, then "ab" 7 times, then "aa"+"aa" 5 times.
    assert [ranks[b"aa"], ranks[b"ab"], ranks[b"aaaa"]] == [256, 257, 258]


def test_ranks_encode_as_they_were_learned() -> None:
    text = "the cat and the hat and the bat sat on the mat 123 times, didn't they?"
    ranks = learn_ranks(count_words([text]), 280)
    encoder = encoding(ranks)
    for sample in (text, "the café is 漢字 🙂\n\n ", ""):
        assert encoder.decode(encoder.encode_ordinary(sample)) == sample
    assert ranks[b" the"] in encoder.encode_ordinary("see the cat")


def test_ranks_need_enough_text() -> None:
    with pytest.raises(ValueError, match="expected text for 400 ranks, got text for only 258"):
        learn_ranks({"abc": 1}, 400)


def test_ranks_file_reads_back(tmp_path: Path) -> None:
    ranks = learn_ranks({"hello": 3, "help": 2}, 260)
    write_ranks(ranks, tmp_path / "tokenizer.model")
    assert read_ranks(tmp_path / "tokenizer.model") == ranks


def test_encode_numbers_special_tokens_after_the_ranks() -> None:
    encoder = encoding(learn_ranks({"ab": 1}, 257))
    tokens, weights = corpus.encode([corpus.Span(corpus.END_OF_TURN, 0.5), corpus.Span("abb")], encoder)
    assert tokens == [257 + 9, 256, ord("b")]
    assert weights == [0.5, 1.0, 1.0]


def test_checkpoint_is_small_and_complete() -> None:
    folder, tokenizer_path = map(Path, builtin_checkpoint())
    assert tokenizer_path.parent == folder
    assert {path.name for path in folder.iterdir()} == {"consolidated.00.pth", "params.json", "tokenizer.model"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < MAX_CHECKPOINT_BYTES
    params = json.loads((folder / "params.json").read_text())
    sizes = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of"}
    assert set(params) == sizes | {"ffn_dim_multiplier", "norm_eps", "rope_theta"}
    assert params["vocab_size"] == Tokenizer(tokenizer_path).n_words
    weights = torch.load(folder / "consolidated.00.pth", weights_only=True)
    expected = meta_state_dict(TrainableLlama(params, 1))
    assert {name: tensor.shape for name, tensor in weights.items()} == {n: t.shape for n, t in expected.items()}
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_tokenizer_encodes_ordinary_english_compactly() -> None:
    tokenizer = Tokenizer(builtin_checkpoint()[1])
    assert len(HELD_OUT) / len(tokenizer.encode(HELD_OUT, bos=False, eos=False)) > MIN_CHARS_PER_TOKEN


def test_ffn_width_follows_metas_rule() -> None:
    assert ffn_width({"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024}) == 14336
    assert ffn_width({"dim": 192, "ffn_dim_multiplier": None, "multiple_of": 32}) == 512


def test_trainable_model_matches_metas_transformer() -> None:
    params = {
        "dim": 48,
        "n_layers": 2,
        "n_heads": 6,
        "n_kv_heads": 2,
        "vocab_size": 40,
        "multiple_of": 16,
        "ffn_dim_multiplier": 0.9,
        "norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
    torch.manual_seed(1)
    model = TrainableLlama(params, 16)
    for weight in model.parameters():
        # Larger than at initialisation, so that attention and norms matter; bfloat16 values, as they are saved.
        weight.data = (weight.data + torch.randn_like(weight) / 4).bfloat16().float()
    weights = {name: tensor.float() for name, tensor in meta_state_dict(model).items()}
    tokens = torch.randint(0, 40, (2, 16))
    expected = meta_transformer(params, weights, max_seq_len=16, max_batch_size=2).forward(tokens, 0)
    torch.testing.assert_close(model(tokens).detach(), expected, rtol=1e-4, atol=1e-4)


def test_batches_hold_one_document_per_row() -> None:
    encoder = encoding(learn_ranks({" the": 1}, 258))
    begin = encoder.n_vocab + corpus.BEGIN_OF_TEXT
    stops = torch.tensor([encoder.n_vocab + corpus.END_OF_TEXT, encoder.n_vocab + corpus.END_OF_TURN])
    for inputs, targets, weights in itertools.islice(batches(7, encoder), 10):
        assert inputs.shape == targets.shape == weights.shape
        assert inputs.numel() <= TOKENS_PER_STEP
        assert (inputs[:, 0] == begin).all() and not (inputs[:, 1:] == begin).any()
        torch.testing.assert_close(inputs[:, 1:], targets[:, :-1])
        # Padding carries no weight, and short documents learn to stop.
        assert (weights[targets == 0] == 0).all()
        assert inputs.shape[1] > 500 or torch.isin(targets, stops).any(dim=1).all()


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [learning_rate(step, DEFAULT_STEPS) for step in range(DEFAULT_STEPS)]
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(rates) == pytest.approx(PEAK_LEARNING_RATE)
    assert rates[-1] < PEAK_LEARNING_RATE / 20
