"""Clients of others against the server in a process: litellm, lm-eval, guidellm and curl. Nothing is downloaded.

make test-clients       # with these clients in an environment of their own
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.command_line import ROOT
from tests.support.server_process import serving
from tests.support.timeouts import HANG_SECONDS

pytestmark = pytest.mark.filterwarnings("ignore")  # of these clients
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
KEY = "secret"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
STORY = "Once upon a time"
SCORED, GENERATED = ["fastllama_facts", "fastllama_stories"], ["fastllama_answers", "fastllama_texts"]


@contextlib.contextmanager
def served(*words: str) -> Iterator[str]:
    """A server in a process, with a key: its address."""
    with serving(*words, FASTLLAMA_API_KEY=KEY, **OFFLINE) as (server, process):
        yield server["url"]
        process.terminate()
        assert process.wait(HANG_SECONDS) == 0


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served("--max_seq_len", "1024") as found:
        yield found


def curl(url: str, body: dict[str, Any], *more: str) -> str:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    headers = ["-H", "Content-Type: application/json", "-H", f"Authorization: Bearer {KEY}"]
    command = ["curl", "--silent", "--show-error", "--no-buffer", *more, url, *headers, "-d", json.dumps(body)]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=HANG_SECONDS).stdout


def test_curl(url: str) -> None:
    chat = json.loads(curl(f"{url}/v1/chat/completions", {"messages": QUESTION, "temperature": 0}))
    assert "Paris" in chat["choices"][0]["message"]["content"]
    events = curl(f"{url}/v1/completions", {"prompt": STORY, "stream": True}).strip().split("\n\n")
    assert events[-1] == "data: [DONE]" and all(event.startswith("data: {") for event in events[:-1])
    for option in ("--http1.0", "--compressed"):
        assert json.loads(curl(f"{url}/v1/completions", {"prompt": STORY}, option))["choices"]
    refused = json.loads(curl(f"{url}/v1/completions", {"prompt": STORY, "n": 0}))
    assert refused["error"]["param"] == "n"


def test_litellm(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    litellm = pytest.importorskip("litellm", reason="litellm is not installed: make test-clients")
    asked: dict[str, Any] = {"api_base": f"{url}/v1", "api_key": KEY, "temperature": 0, "num_retries": 0}
    for provider in ("openai", "hosted_vllm"):
        model = f"{provider}/builtin"
        whole = litellm.completion(model=model, messages=QUESTION, **asked)
        text = whole.choices[0].message.content
        assert "Paris" in text and whole.usage.completion_tokens > 0
        options = {"stream": True, "stream_options": {"include_usage": True}}
        chunks = list(litellm.completion(model=model, messages=QUESTION, **asked, **options))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    completed = litellm.text_completion(model="text-completion-openai/builtin", prompt=STORY, max_tokens=8, **asked)
    assert completed.choices[0].text
    with pytest.raises(litellm.AuthenticationError):
        litellm.completion(model="openai/builtin", messages=QUESTION, **asked | {"api_key": "wrong"})
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(model="openai/builtin", messages=QUESTION, **asked, max_tokens=-1)


def test_guidellm(url: str, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("guidellm")
    if not program.exists():
        pytest.skip("guidellm is not installed: make test-clients")
    texts, report = tmp_path / "texts.txt", tmp_path / "report.json"
    texts.write_text("Once upon a time\nThe dog went to\nLily has a ball\nWhat is the capital of France?\n" * 3)
    for api in ("/v1/chat/completions", "/v1/completions"):
        options = {
            "--backend": f"kind=openai_http,target={url},api_key={KEY},request_format={api}",
            "--profile": "kind=concurrent,streams=4",
            "--constraint": "kind=max_requests,count=12",
            "--data": f"kind=text_file,path={texts}",
            "--output": f"kind=json,path={report}",
        }
        command = [str(program), "run", "--disable-console", *(word for pair in options.items() for word in pair)]
        subprocess.run(command, check=True, env={**os.environ, **OFFLINE}, cwd=tmp_path, timeout=HANG_SECONDS)
        (benchmark,) = json.loads(report.read_text())["benchmarks"]
        assert not benchmark["requests"]["errored"] and len(benchmark["requests"]["successful"]) == 12
        assert all(one["output_tokens"] > 0 for one in benchmark["requests"]["successful"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer lm-eval reads, too."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: make test-clients")
    from tests.support.checkpoints import random_weights, tiny_params, write_huggingface
    from tests.support.pipelines import byte_level, write_pipeline

    made = tmp_path_factory.mktemp("checkpoint")
    tokenizer = byte_level()
    params = tiny_params(vocab_size=tokenizer.get_vocab_size())
    write_huggingface(made, params, random_weights(params), eos_token_id=tokenizer.token_to_id("</s>"))
    template = (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    write_pipeline(tokenizer, made, eos_token="</s>", tokenizer_class="PreTrainedTokenizerFast", chat_template=template)
    return made


def evaluate(model: str, arguments: str, tasks: list[str], **more: Any) -> dict[str, Any]:
    import lm_eval
    from lm_eval.tasks import TaskManager

    import fastllama.lm_eval_model  # noqa: F401 (registers "fastllama")

    found: dict[str, Any] = lm_eval.simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=tasks,
        task_manager=TaskManager(include_path=str(ROOT / "tests" / "data" / "lm_eval"), include_defaults=False),
        limit=4,
        bootstrap_iters=0,
        log_samples=True,
        **more,
    )
    return found


def test_lm_eval(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """local-completions gives what our model of the harness gives in its own process. Chats are answered, too."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    tasks = SCORED + GENERATED
    ours = evaluate("fastllama", f"pretrained={folder},dtype=float32,max_length=512,device=cpu", tasks, batch_size=4)
    with served("--ckpt_dir", str(folder), "--max_seq_len", "1024", "--served_model_name", "tiny") as url:
        # Its windows have two tokens less than max_length.
        common = f"model=tiny,tokenizer={folder},max_length=514,num_concurrent=1,max_retries=1"
        theirs = evaluate("local-completions", f"{common},base_url={url}/v1/completions", tasks)
        chat = f"{common},base_url={url}/v1/chat/completions"
        chats = evaluate("local-chat-completions", chat, GENERATED, apply_chat_template=True)
    for task in tasks:
        for name, value in ours["results"][task].items():
            found = theirs["results"][task][name]
            assert found == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), (task, name)
    assert all(chats["samples"][task] for task in GENERATED)
