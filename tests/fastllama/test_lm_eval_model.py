"""The model of lm-evaluation-harness gives what the harness's own `hf` gives for the same checkpoint, on local tasks.

make test-lm-eval       # with lm-eval in a folder of its own
"""

import logging
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[hf]', or make test-lm-eval")
pytest.importorskip("accelerate", reason="lm-eval's model `hf` needs accelerate, which is not installed")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fastllama.engine.scoring import document_windows
from fastllama.lm_eval_model import FastLlama
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface
from tests.support.pipelines import PIPELINES, write_pipeline

ROOT = Path(__file__).resolve().parents[2]
SCORED = ["fastllama_facts", "fastllama_letters", "fastllama_stories"]
GENERATED = ["fastllama_answers", "fastllama_texts"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of the harness and what it imports. Ours is under test elsewhere.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tasks name their files from the project's root. Nothing is downloaded, or kept in the user's caches."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module", params=["normalized", "byte-level", "unigram"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer begins texts, or does not."""
    made = tmp_path_factory.mktemp("checkpoint")
    tokenizer = PIPELINES[request.param]()
    params = tiny_params(vocab_size=tokenizer.get_vocab_size())
    write_huggingface(made, params, random_weights(params), eos_token_id=tokenizer.token_to_id("</s>"))
    names = {"eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    write_pipeline(tokenizer, made, **names)
    return made


def evaluate(model: str, folder: Path, tasks: list[str], **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args=f"pretrained={folder},dtype=float32,max_length=256",
        tasks=tasks,
        task_manager=TaskManager(include_path=str(ROOT / "tests" / "data" / "lm_eval"), include_defaults=False),
        limit=4,
        batch_size=4,
        device="cpu",
        bootstrap_iters=0,
        log_samples=True,
        **more,
    )
    return found


def responses(found: dict[str, Any], task: str) -> list[Any]:
    return [sample["resps"] for sample in found["samples"][task]]


@pytest.mark.parametrize("chat", [False, True], ids=["text", "chat"])
def test_results_are_those_of_hf(folder: Path, chat: bool) -> None:
    tasks = [task for task in SCORED + GENERATED if not chat or task != "fastllama_stories"]
    ours, theirs = (evaluate(model, folder, tasks, apply_chat_template=chat) for model in ("fastllama", "hf"))
    for task in tasks:
        for one, other in zip(_flat(responses(ours, task)), _flat(responses(theirs, task)), strict=True):
            assert _agree(one, other), (one, other)
        for name, value in theirs["results"][task].items():
            assert _agree(ours["results"][task][name], value), name
        arguments = [[sample["arguments"] for sample in found["samples"][task]] for found in (ours, theirs)]
        assert arguments[0] == arguments[1]  # prompts, chat templates included
    assert ours["config"]["model_dtype"] == "torch.float32"


def _agree(one: Any, other: Any) -> bool:
    return bool(one == other) if isinstance(other, str | bool) else one == pytest.approx(other, rel=1e-5, abs=1e-3)


def _flat(value: Any) -> list[Any]:
    return [one for part in value for one in _flat(part)] if isinstance(value, list | tuple) else [value]


def instances(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=one, idx=index) for index, one in enumerate(arguments)]


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return FastLlama(str(folder), max_length=128, batch_size=2, device="cpu")


def test_pairs_of_any_kind_are_scored_as_by_hf(folder: Path, model: FastLlama) -> None:
    pairs = [("", "the dog"), ("the", " quick"), ("the  ", "fox"), ("<s>Once", " upon"), ("a\n", "a"), ("x" * 300, "y")]
    pairs = [pair for pair in pairs if not pair[0] or model._encode_pair(*pair)[1]]  # `hf` takes no empty answers
    # Its cache of logits takes a wrong place where answers of two lengths end at the same token (lm-eval 0.4.13).
    options = {"dtype": "float32", "max_length": 128, "device": "cpu", "logits_cache": False}
    theirs = get_model("hf")(pretrained=str(folder), **options)
    expected = theirs.loglikelihood(instances("loglikelihood", *pairs))
    for one, other in zip(model.loglikelihood(instances("loglikelihood", *pairs)), expected, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-3) and one[1] == other[1]
    for document in ("", "the quick brown fox " * 40):
        found = model.loglikelihood_rolling(instances("loglikelihood_rolling", (document,)))
        theirs_found = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", (document,)))
        assert found == pytest.approx(theirs_found, rel=1e-5)


@pytest.mark.parametrize("n_tokens", [0, 1, 6, 7, 8, 20, 21])
def test_windows_are_those_of_the_harness(n_tokens: int) -> None:
    tokens = list(range(1, n_tokens + 1))
    theirs = map(make_disjoint_window, get_rolling_token_windows(tokens, 0, 7, 1))
    assert list(document_windows([0, *tokens], 7)) == list(theirs)


def test_what_does_not_fit_is_cut_at_the_left(model: FastLlama, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model.generate_until(instances("generate_until", ("x" * 200, {"max_gen_toks": 8}), ("x", {"max_gen_toks": 8})))
    assert "1 prompts exceed max_length=128" in caplog.text and "where 120 fit" in caplog.text
    with pytest.raises(ValueError, match="max_gen_toks=128 tokens leaves no room.*or lower max_gen_toks"):
        model.generate_until(instances("generate_until", ("x", {"max_gen_toks": 128})))


def test_sampled_answers_differ_and_settings_are_checked(model: FastLlama) -> None:
    drawn = [("the", {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12})] * 4
    assert len(set(model.generate_until(instances("generate_until", *drawn)))) > 1
    with pytest.raises(ValueError, match="generation_kwargs has num_beams=2"):
        model.generate_until(instances("generate_until", ("the", {"num_beams": 2})))


def test_arguments_are_checked(folder: Path) -> None:
    with pytest.raises(ValueError, match="max_seq_len is called max_length here"):
        FastLlama(str(folder), max_seq_len=128)
    with pytest.raises(ValueError, match="model_args has parallelize, which is not known: expected pretrained"):
        FastLlama(str(folder), parallelize=True)


def test_a_llama_can_be_given(model: FastLlama) -> None:
    with pytest.raises(ValueError, match="at most the Llama's max_seq_len, 128, got 256"):
        FastLlama(model.llm, max_length=256)
    given = FastLlama(model.llm, max_length=64, prefix_token_id=3)
    assert (given.max_length, given.batch_size, given.prefix_token_id) == (64, 2, 3)


def test_the_built_in_model_is_the_default() -> None:
    model = get_model("fastllama").create_from_arg_string("max_length=64", {"batch_size": "auto", "device": "cpu"})
    assert model.batch_size == 32
    text = model.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    assert model.chat_template(True) == "llama3"
    assert model.generate_until(instances("generate_until", (text, {"until": ["."], "max_gen_toks": 16}))) == [
        "The capital of France is Paris"
    ]
