"""Any tokenizer.json: ids and texts against the package tokenizers, streamed text against text decoded at once."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, processors
from tokenizers import Tokenizer as Pipeline

from fastllama import Llama
from fastllama.tokenizer import Tokenizer
from fastllama.tokenizer_base import BaseTokenizer, TextStream
from fastllama.tokenizer_huggingface import HuggingFaceTokenizer
from fastllama.tokenizer_open import open_tokenizer
from fastllama.tokenizer_search import find_tokenizer_file
from fastllama.tokenizer_sentencepiece import SentencePieceTokenizer
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface
from tests.support.pipelines import CORPUS, PIPELINES, write_pipeline, write_sentencepiece
from tests.support.tokenizer_files import small_file, small_json, write_json

__all__ = ["small_file", "small_json"]  # fixtures

TEXTS = [*CORPUS, "", " ", "a", "  two", "naïve\u0301 ﬁ", "x<think>y", "\x00\x7f", "🚀" * 5, "ends with space "]
KINDS = [*PIPELINES, "sentencepiece"]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BaseTokenizer]:
    """One of each kind."""
    made: dict[str, BaseTokenizer] = {}
    for name, pipeline in PIPELINES.items():
        made[name] = open_tokenizer(write_pipeline(pipeline(), tmp_path_factory.mktemp(name)))
    made["sentencepiece"] = open_tokenizer(write_sentencepiece(tmp_path_factory.mktemp("sentencepiece")))
    return made


@pytest.fixture(params=PIPELINES)
def pair(request: pytest.FixtureRequest, tokenizers: dict[str, BaseTokenizer]) -> tuple[HuggingFaceTokenizer, Pipeline]:
    """Our tokenizer, and the library's that parses special tokens."""
    ours = tokenizers[request.param]
    assert isinstance(ours, HuggingFaceTokenizer)
    return ours, Pipeline.from_str(ours.model.to_str())


@pytest.mark.parametrize("text", TEXTS, ids=repr)
def test_texts_encode_and_decode_as_in_the_library(pair: tuple[HuggingFaceTokenizer, Pipeline], text: str) -> None:
    ours, library = pair
    ids = library.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=False, eos=False) == ids
    assert ours.decode(ids) == library.decode(ids, skip_special_tokens=False)


def test_special_tokens_encode_as_in_the_library(pair: tuple[HuggingFaceTokenizer, Pipeline]) -> None:
    ours, library = pair
    for text in ("<|im_start|>user\nHi there<|im_end|>\n", "a<s>b</s> c", "<s>", "x <|im_end|>"):
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, bos=False, eos=False, allowed_special="all") == expected


def test_special_names_are_text_unless_allowed(pair: tuple[HuggingFaceTokenizer, Pipeline]) -> None:
    ours, _ = pair
    ids = ours.encode("say <|im_end|> now", bos=False, eos=False)
    assert ours.special_tokens["<|im_end|>"] not in ids
    with pytest.raises(ValueError, match="disallowed_special forbids"):
        ours.encode("say <|im_end|> now", bos=False, eos=False, disallowed_special="all")


def test_texts_begin_as_the_file_says(pair: tuple[HuggingFaceTokenizer, Pipeline]) -> None:
    ours, library = pair
    assert ours.encode("a", bos=True, eos=False) == library.encode("a", add_special_tokens=True).ids
    assert ours.encode("a", bos=False, eos=True)[-1] == ours.eos_id == library.token_to_id("</s>")
    assert (ours.bos_id, ours.pad_id, ours.stop_tokens) == (library.token_to_id("<s>"), -1, {ours.eos_id})


def test_only_the_post_processor_decides_how_texts_begin(tmp_path: Path) -> None:
    """As in transformers 5, add_bos_token has no effect beside a tokenizer.json."""
    for kind, begins in (("byte-level", False), ("metaspace", True)):
        ours = HuggingFaceTokenizer(write_pipeline(PIPELINES[kind](), tmp_path, add_bos_token=not begins))
        assert (ours.bos_id in ours.encode("a", bos=True, eos=False)) is begins
    appends = PIPELINES["byte-level"]()
    end = ("</s>", appends.token_to_id("</s>"))
    appends.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    ours = HuggingFaceTokenizer(write_pipeline(appends, tmp_path, bos_token=None))
    assert (ours.bos_id, ours.encode("a", bos=True, eos=False)) == (-1, appends.encode("a").ids[:-1])


def test_a_folders_tokenizer_json_goes_before_its_sentencepiece_model(tmp_path: Path) -> None:
    model = write_sentencepiece(tmp_path)
    assert isinstance(open_tokenizer(tmp_path), SentencePieceTokenizer)
    beside = write_pipeline(PIPELINES["metaspace"](), tmp_path)
    assert find_tokenizer_file(tmp_path) == beside
    assert isinstance(open_tokenizer(tmp_path), HuggingFaceTokenizer)
    assert isinstance(open_tokenizer(model), SentencePieceTokenizer)


def test_named_tokens_are_special_and_found_in_either_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_pipeline(PIPELINES["byte-level"](), tmp_path, bos_token=None, eos_token="<think>", pad_token="<no>")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    ours = open_tokenizer(path)
    assert (ours.bos_id, ours.eos_id) == (ours.special_tokens["<s>"], ours.special_tokens["<think>"])
    assert ours.eos_id not in ours.encode("a <think> b", bos=False, eos=False)
    assert (ours.pad_id, "no token is pad_token='<no>'" in caplog.text) == (-1, True)
    listed = {"9999": {"content": "<|absent|>", "special": True}}
    with pytest.raises(ValueError, match=r"has the token '<\|absent\|>', id 9999, which is not in it"):
        HuggingFaceTokenizer(write_pipeline(PIPELINES["byte-level"](), tmp_path, added_tokens_decoder=listed))


@pytest.mark.parametrize("options", [{"lstrip": True}, {"rstrip": True}, {}], ids=str)
def test_special_tokens_take_in_white_space_as_in_the_library(options: dict[str, bool], tmp_path: Path) -> None:
    pipeline = PIPELINES["byte-level"]()
    pipeline.add_special_tokens([AddedToken("<|end|>", special=True, **options)])
    ours = open_tokenizer(write_pipeline(pipeline, tmp_path))
    text = "a \n<|end|>\n b"
    expected = pipeline.encode(text, add_special_tokens=False).ids
    assert ours.encode(text, bos=False, eos=False, allowed_special="all") == expected


@pytest.mark.parametrize("kind", PIPELINES)
def test_no_text_becomes_a_special_token(kind: str, tmp_path: Path) -> None:
    """Several names, one after a harmless one; names that only a normalizer makes; very many."""
    pipeline = PIPELINES[kind]()
    pipeline.add_special_tokens(["<|new|>"])
    if kind in ("unigram", "normalized"):
        pipeline.normalizer = normalizers.NFKC()
    ours = open_tokenizer(write_pipeline(pipeline, tmp_path))
    special = set(ours.special_tokens.values()) - {ours.special_tokens.get("<unk>")}
    for text in ("<|new|> </s> x", "x \uff1c/s\uff1e y", "</s>" * 2000, "<|im_start|></s><s>"):
        assert special.isdisjoint(ours.encode(text, bos=False, eos=False))


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_streamed_text_equals_the_text_decoded_at_once(
    kind: str, tokenizers: dict[str, BaseTokenizer], data: st.DataObject
) -> None:
    tokenizer = tokenizers[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.n_words - 1), max_size=20))
    stream = TextStream(tokenizer)
    pieces = [stream.push([token]) for token in ids] + [stream.finish()]
    assert "".join(pieces) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_text_is_streamed_whole(kind: str, tokenizers: dict[str, BaseTokenizer], text: str) -> None:
    """Also characters that are several byte tokens."""
    tokenizer = tokenizers[kind]
    ids = tokenizer.encode(text, bos=False, eos=False)
    stream = TextStream(tokenizer)
    assert "".join([*(stream.push([token]) for token in ids), stream.finish()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
def test_lone_surrogates_and_other_objects(kind: str, tokenizers: dict[str, BaseTokenizer]) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.encode("\ud83d\ude80", bos=False, eos=False) == tokenizer.encode("🚀", bos=False, eos=False)
    assert tokenizer.encode("\ud83d", bos=False, eos=False) == tokenizer.encode("\ufffd", bos=False, eos=False)
    with pytest.raises(AssertionError, match="one str"):
        tokenizer.encode(["a"], bos=False, eos=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="outside the vocabulary"):
        tokenizer.decode([tokenizer.n_words])


def test_ids_without_a_token_decode_to_nothing(tmp_path: Path) -> None:
    tokenizer = open_tokenizer(write_pipeline(PIPELINES["byte-level"](), tmp_path))
    tokenizer.n_rows = tokenizer.n_words + 3
    ids = tokenizer.encode("Once", bos=False, eos=False)
    assert tokenizer.decode([tokenizer.n_words, *ids, tokenizer.n_words + 2]) == "Once"
    with pytest.raises(ValueError, match=f"0 to {tokenizer.n_words + 2}"):
        tokenizer.decode([tokenizer.n_words + 3])


def test_sentencepiece_encodes_as_the_library(tokenizers: dict[str, BaseTokenizer]) -> None:
    ours = tokenizers["sentencepiece"]
    assert isinstance(ours, SentencePieceTokenizer)
    for text in TEXTS:
        ids = ours.encode(text, bos=True, eos=True)
        assert ids == [ours.bos_id, *ours.model.encode(text), ours.eos_id]
        assert ours.decode(ids) == ours.model.decode(ids)


def test_a_folder_with_both_files_uses_the_json(tmp_path: Path) -> None:
    write_sentencepiece(tmp_path)
    write_pipeline(PIPELINES["metaspace"](), tmp_path)
    assert isinstance(open_tokenizer(tmp_path), HuggingFaceTokenizer)
    assert isinstance(open_tokenizer(tmp_path / "tokenizer.model"), SentencePieceTokenizer)


def test_llama3s_files_stay_on_tiktoken(small_file: Path, small_json: str, tmp_path: Path) -> None:
    """An extended vocabulary is not Llama 3's."""
    assert isinstance(open_tokenizer(small_file), Tokenizer)
    assert isinstance(open_tokenizer(write_json(tmp_path / "tokenizer.json", small_json)), Tokenizer)
    extended = Pipeline.from_str(small_json)
    extended.add_special_tokens([f"<|more_{number}|>" for number in range(9)])
    ours = open_tokenizer(write_json(tmp_path / "tokenizer.json", extended.to_str()))
    assert isinstance(ours, HuggingFaceTokenizer) and ours.n_words == Tokenizer(small_file).n_words + 9


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "JSON object"),
        ("{", "not valid JSON"),
        ('{"model": {"type": "BPE", "vocab": {}}}', "package tokenizers reads"),
        ('{"a": 1, "a": 2}', "remove the one that is not meant"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        HuggingFaceTokenizer(path)


def test_a_tokenizer_without_a_decoder_is_refused(tmp_path: Path) -> None:
    path = write_pipeline(PIPELINES["byte-level"](), tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"decoder": None}))
    with pytest.raises(ValueError, match="its decoder is null, which is not supported"):
        HuggingFaceTokenizer(path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_any_tokenizer_completes_texts(kind: str, tmp_path: Path) -> None:
    if kind == "sentencepiece":
        write_sentencepiece(tmp_path)
    else:
        write_pipeline(PIPELINES[kind](), tmp_path)
    params = tiny_params(n_layers=1, vocab_size=-(-open_tokenizer(tmp_path).n_words // 64) * 64)
    write_huggingface(tmp_path, params, random_weights(params))
    llm = Llama.build(str(tmp_path), str(tmp_path), 64, 2, device="cpu", dtype="float32")
    prompts = ["Once upon", "天地 🚀"]
    answers = llm.text_completion(prompts, max_gen_len=20, temperature=1.0, top_p=1.0, seed=3)
    streamed = ["", ""]
    ids = [llm.tokenizer.encode(prompt, bos=True, eos=False) for prompt in prompts]
    for increment in llm.stream(ids, 20, temperature=1.0, top_p=1.0, seed=3):
        streamed[increment.row] += increment.text
    assert streamed == [answer["generation"] for answer in answers]
    with pytest.raises(ValueError, match="has no chat template"):
        llm.chat_completion([[{"role": "user", "content": "Hi"}]])


def test_the_pipelines_are_the_same_each_time() -> None:
    """Their ids choose the rows of random weights: a model that a test reads has to be the same in every run."""
    for kind, make in PIPELINES.items():
        assert make().to_str() == make().to_str(), kind
