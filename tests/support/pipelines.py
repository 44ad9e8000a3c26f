"""Small tokenizers of the kinds that checkpoints have, trained here, the same in every process.

The trainers of `tokenizers` decide ties by the order of a hash table, which differs from run to run: so the alphabet
of a BPE model with a limit, and all pieces of the Unigram model, are chosen here.
"""

import io
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "Once upon a time there was a little girl. She had 12 red apples, and 345 more!\n",
    "  def answer(x):\n\treturn x + 1  # Straße, naïve café, Ωmega\n",
    "The quick brown fox jumps over the lazy dog; the dog doesn't mind it's 7 o'clock.\n",
    "天地玄黃 宇宙洪荒 日月盈昃 👩‍🚀 🚀🚀\n",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
N_CHARACTERS = 60  # in the alphabet of a BPE model with bytes: not all of the corpus
N_PIECES = 60  # of more than one character, in the Unigram model


def byte_level() -> Tokenizer:
    """GPT-2's pipeline with single digits, without a begin of text (SmolLM)."""
    tokenizer = Tokenizer(models.BPE())
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def normalized() -> Tokenizer:
    """Byte-level, with a normalizer, a split pattern and a post-processor that begins every text."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    byte_steps = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_steps])
    return _begins_texts(tokenizer)


def byte_fallback() -> Tokenizer:
    """Llama 2's pipeline in its older form: every text gets a space, unknown characters become their bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return _begins_texts(_with_bytes(tokenizer))


def metaspace() -> Tokenizer:
    """Llama 2's pipeline in its newer form: only the first text gets a space."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return _begins_texts(_with_bytes(tokenizer))


def unigram() -> Tokenizer:
    """A Unigram model whose words begin with a space."""
    tokenizer = Tokenizer(models.Unigram(_frequent_pieces(), unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<unk>", *SPECIAL])
    return _with_think(tokenizer)


PIPELINES: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": byte_level,
    "normalized": normalized,
    "byte-fallback": byte_fallback,
    "metaspace": metaspace,
    "unigram": unigram,
}


def write_pipeline(tokenizer: Tokenizer, folder: Path, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json in a folder -> the path of the first."""
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    names = {"bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return path


def write_sentencepiece(folder: Path, **options: Any) -> Path:
    """tokenizer.model in a folder, with Llama 2's options."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        character_coverage=0.98,
        minloglevel=2,
        **{"byte_fallback": True, "pad_id": -1, **options},
    )
    path = folder / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def _with_bytes(tokenizer: Tokenizer) -> Tokenizer:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    names = [f"<0x{value:02X}>" for value in range(256)]
    alphabet = _most_common(Counter("".join(CORPUS).replace(" ", "▁")), N_CHARACTERS)
    options: dict[str, Any] = {"initial_alphabet": alphabet, "limit_alphabet": N_CHARACTERS}
    _trained(tokenizer, more=["<unk>", *names], **options)
    document = json.loads(tokenizer.to_str())  # bytes are tokens of the model, not added ones
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] not in names]
    return Tokenizer.from_str(json.dumps(document))


def _begins_texts(tokenizer: Tokenizer) -> Tokenizer:
    begin = ("<s>", tokenizer.token_to_id("<s>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[begin])
    return tokenizer


def _trained(tokenizer: Tokenizer, more: list[str] | None = None, **options: Any) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*(more or []), *SPECIAL], show_progress=False, **options
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return _with_think(tokenizer)


def _with_think(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


def _frequent_pieces() -> list[tuple[str, float]]:
    """Every character and the most frequent pieces of words, with log-probabilities, after the unknown token."""
    counts: Counter[str] = Counter()
    for line in CORPUS:
        for word in ("▁" + line.replace(" ", "▁")).split("▁")[1:]:
            word = "▁" + word
            ends = [(start, end) for start in range(len(word)) for end in range(start + 1, len(word) + 1)]
            counts.update(word[start:end] for start, end in ends)
    characters = sorted(piece for piece in counts if len(piece) == 1)
    longer = _most_common(Counter({piece: n for piece, n in counts.items() if len(piece) > 1}), N_PIECES)
    total = sum(counts.values())
    pieces = [(piece, math.log(counts[piece] * len(piece) / total)) for piece in [*characters, *longer]]
    return [("<unk>", 0.0), *((token, 0.0) for token in SPECIAL), *pieces]


def _most_common(counts: Counter[str], n: int) -> list[str]:
    """As `counts.most_common(n)`, but equal counts come in the order of the texts."""
    return sorted(counts, key=lambda text: (-counts[text], text))[:n]
