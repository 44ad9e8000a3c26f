"""`fastllama batch` in one process: answers, errors of lines and of the command, the summary."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from fastllama import Llama
from tests.support.batches import BATCH, Record, all_choices, chat, choices, completion, read_records, write_batch
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_tokenizer
from tests.support.command_line import expect_error, run

SUMMARY = ["requests", "errors", "answered_before", "prompt_tokens", "cached_tokens", "tokens"]
SUMMARY += ["seconds", "tokens_per_second"]
PARIS = "The capital of France is Paris."


def answer(tmp_path: Path, lines: list[Record | str], *words: str) -> tuple[dict[str, Any], dict[str, Record]]:
    """Run the command -> the object of --json, and the records by custom_id."""
    out = tmp_path / "out.jsonl"
    result = run("batch", write_batch(tmp_path / "in.jsonl", lines), str(out), *BATCH, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), read_records(out)


def test_both_apis_are_answered_in_openais_shape(tmp_path: Path) -> None:
    lines: list[Record | str] = [
        completion("a", temperature=0, logprobs=1),
        "",
        chat("b", temperature=0, max_tokens=20),
        completion("c", n=3, seed=1, temperature=2),
        completion("ids", [5, 6, 7], echo=True),
    ]
    summary, records = answer(tmp_path, lines)
    assert list(summary) == SUMMARY
    assert (summary["requests"], summary["errors"], summary["answered_before"]) == (4, 0, 0)
    assert summary["tokens_per_second"] == pytest.approx(summary["tokens"] / summary["seconds"])
    for custom_id, number in (("a", 1), ("b", 3), ("c", 4), ("ids", 5)):
        record = records[custom_id]
        assert list(record) == ["id", "custom_id", "response", "error"] and record["error"] is None
        assert record["id"] == f"batch_req_{number}"
        body = record["response"]["body"]
        assert record["response"] == {"status_code": 200, "request_id": body["id"], "body": body}
        assert body["model"] == "m"
    assert len(choices(records["a"])[0]["logprobs"]["tokens"]) == 6
    assert choices(records["b"])[0]["message"]["content"] == PARIS
    assert len({choice["text"] for choice in choices(records["c"])}) == 3
    assert (
        sum(record["response"]["body"]["usage"]["completion_tokens"] for record in records.values())
        == (summary["tokens"])
    )


def test_no_depth_of_a_line_is_the_end(tmp_path: Path) -> None:
    """Not even one that can just be read, and not be repeated in an error."""
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    bodies = ('{"prompt": %s}', '{"prompt": "x", "logit_bias": %s}')
    depths = (150, 250, *range(910, 1000))
    texts = [body % ("[" * depth + "]" * depth) for depth in depths for body in bodies]
    texts.append('{"prompt": "x", "temperature": 1e999}')
    lines = [f'{{"custom_id": "{n}", "url": "/v1/completions", "body": {text}}}\n' for n, text in enumerate(texts)]
    path.write_text("".join(lines))
    result = run("batch", str(path), str(out), *BATCH)
    assert result.exit_code == 0, result.output
    codes = [json.loads(line)["error"]["code"] for line in out.read_text().splitlines()]
    assert len(codes) == len(lines) and codes.count("invalid_json") == len(lines) - len(bodies)
    assert "1e999 is not a finite number" in out.read_text()


def test_a_bad_line_is_an_error_line_and_not_the_end(tmp_path: Path) -> None:
    good = completion("good")
    lines: dict[str, tuple[Record | str, str, str]] = {
        "no json": ("nonsense", "invalid_json", "line 1 is not JSON"),
        "not utf-8": ('{"custom_id": "\udcff"}', "invalid_json", "line 2 is not JSON"),
        "deep": ("[" * 100_000, "invalid_json", "line 3 is not JSON"),
        "a key twice": ('{"custom_id": "x", "custom_id": "y"}', "invalid_json", "appears twice"),
        "a list": ("[]", "invalid_line", "must be an object"),
        "no custom_id": ({**good, "custom_id": None}, "invalid_custom_id", "custom_id must be a text"),
        "a number": ({**good, "custom_id": 7}, "invalid_custom_id", "got 7"),
        "get": ({**good, "custom_id": "get", "method": "GET"}, "invalid_method", "method must be 'POST', got 'GET'"),
        "url": ({**good, "custom_id": "url", "url": "/v1/embeddings"}, "invalid_url", "got '/v1/embeddings'"),
        "field": ({**good, "custom_id": "field", "x": 1}, "invalid_line", "'x' is not a field of a line"),
        "no body": ({"custom_id": "no body", "url": good["url"]}, "invalid_line", "the line has no body"),
        "body": ({**good, "custom_id": "body", "body": []}, "invalid_value", "the body must be an object"),
        "stream": (completion("stream", stream=True), "unsupported_parameter", "stream is not supported in a batch"),
        "tools": (
            chat("tools", tools=[{"type": "mcp"}]),
            "unsupported_parameter",
            "type 'mcp' is not supported",
        ),
        "unknown": (completion("unknown", max_token=1), "unknown_parameter", "did you mean max_tokens?"),
        "long": (completion("long", [5] * 300), "context_length_exceeded", "the prompt has 300 tokens, and 256"),
        "good": (good, "duplicate_custom_id", "an earlier line has the custom_id 'good'"),
    }
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    texts = [line if isinstance(line, str) else json.dumps(line) for line, _, _ in lines.values()]
    path.write_bytes(
        "".join(f"{text}\n" for text in [*texts[:-1], json.dumps(good), texts[-1]]).encode(errors="surrogateescape")
    )
    result = run("batch", str(path), str(out), *BATCH)
    assert result.exit_code == 0, result.output
    records = {record["id"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert len(records) == len(lines) + 1
    assert choices(records[f"batch_req_{len(lines)}"])
    numbers = [*range(1, len(lines)), len(lines) + 1]
    for number, (custom_id, (_, code, message)) in zip(numbers, lines.items(), strict=True):
        record = records[f"batch_req_{number}"]
        assert record["response"] is None and record["error"]["code"] == code, record
        assert message in record["error"]["message"]
        assert record["custom_id"] == (custom_id if number > 7 else None)
    assert f"{len(lines) + 1} requests in" in result.stderr and f", {len(lines)} errors, " in result.stderr
    before = out.read_bytes()
    again = run("batch", str(path), str(out), *BATCH)
    assert out.read_bytes() == before and f"{len(lines) + 1} answered before" in again.stderr


def test_a_chat_without_a_template_is_an_error_line(tmp_path: Path) -> None:
    params = tiny_params()
    write_huggingface(tmp_path / "base", params, random_weights(params, seed=1))
    tokenizer = str(write_tokenizer(tmp_path))
    words = ("--ckpt_dir", str(tmp_path / "base"), "--tokenizer_path", tokenizer)
    lines: list[Record | str] = [chat("chat"), {**completion("text"), "body": {"prompt": "x", "max_tokens": 2}}]
    summary, records = answer(tmp_path, lines, *words)
    assert summary["errors"] == 1 and records["chat"]["error"]["code"] == "invalid_value"
    assert "has no chat template" in records["chat"]["error"]["message"]
    assert records["text"]["response"]["body"]["model"] == "base"  # the folder's name


def test_requests_without_a_seed_draw_by_their_custom_id(tmp_path: Path) -> None:
    lines = [completion(name, temperature=2) for name in "abc"]
    texts: list[dict[str, Any]] = []
    for number, (order, words) in enumerate(((1, ()), (-1, ("--max_batch_size", "1")), (1, ("--seed", "2")))):
        folder = tmp_path / str(number)
        folder.mkdir()
        answer(folder, list(lines[::order]), *words)
        texts.append(all_choices(folder / "out.jsonl"))
    assert texts[0] == texts[1] and all(texts[0][name] != texts[2][name] for name in "abc")
    assert texts[0]["a"] != texts[0]["b"]


def test_a_common_system_prompt_is_computed_once(tmp_path: Path) -> None:
    system = {"role": "system", "content": "You answer questions about the capitals of countries. " * 8}
    lines: list[Record | str] = []
    for number in range(4):
        line = chat(str(number), f"What is number {number}?")
        line["body"]["messages"].insert(0, system)
        lines.append(line)
    summary, records = answer(tmp_path, lines)
    usages = [record["response"]["body"]["usage"] for record in records.values()]
    assert sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages) == summary["cached_tokens"]
    assert summary["cached_tokens"] >= 3 * 64 and summary["prompt_tokens"] > summary["cached_tokens"]


def test_many_rows_share_few_cache_tokens(tmp_path: Path) -> None:
    lines: list[Record | str] = [completion(str(number), max_tokens=30, ignore_eos=True) for number in range(12)]
    answer(tmp_path, [*lines, completion("large", [5] * 100, max_tokens=100)], "--cache_tokens", "128")
    records = read_records(tmp_path / "out.jsonl")
    assert "which has 128" in records.pop("large")["error"]["message"]
    assert all(choices(record)[0]["finish_reason"] == "length" for record in records.values())


def test_the_summary_is_a_line_on_stderr(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", [completion("a")])
    result = run("batch", path, str(tmp_path / "out.jsonl"), *BATCH)
    assert result.stdout == "" and result.stderr.splitlines()[0].startswith("no --ckpt_dir")
    assert result.stderr.splitlines()[-1].startswith("1 request in ") and "6 tokens, " in result.stderr
    empty = run("batch", write_batch(tmp_path / "empty.jsonl", []), str(tmp_path / "none.jsonl"), *BATCH)
    assert empty.exit_code == 0 and "0 requests in" in empty.stderr


def test_a_bar_counts_the_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_batch(tmp_path / "in.jsonl", [completion("a"), "", "nonsense"])
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda self: True)
    result = run("batch", path, str(tmp_path / "out.jsonl"), *BATCH)
    assert "answering: 100%" in result.stderr and "2/2" in result.stderr
    assert "answering" not in run("batch", path, str(tmp_path / "out.jsonl"), *BATCH, "--json").stderr


def test_errors_come_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Llama, "build", lambda *args, **options: pytest.fail("the model was loaded"))
    path, out = write_batch(tmp_path / "in.jsonl", [completion("a")]), str(tmp_path / "out.jsonl")
    expect_error(run("batch", str(tmp_path / "nowhere"), out), "nowhere cannot be read (No such file or directory)")
    expect_error(run("batch", str(tmp_path), out), "cannot be read (Is a directory)")
    expect_error(run("batch", path, str(tmp_path)), "is not a file: answers are appended to a file")
    expect_error(run("batch", path, str(tmp_path / "nowhere" / "out")), "cannot be written (No such file or directory)")
    expect_error(run("batch", path, path), "are the same file")
    assert Path(path).read_text().startswith('{"custom_id": "a"')
    if sys.platform != "win32":
        expect_error(run("batch", path, "/dev/null"), "is not a file")
    for text, message in (
        (json.dumps(completion("a")) + "\n", "line 1 is not an answer of a batch: name another file"),
        ("nonsense\n", "line 1 is not an answer"),
        ("a text without a line end", "is not a file of answers"),
    ):
        Path(out).write_text(text)
        expect_error(run("batch", path, out), message)
        assert Path(out).read_text() == text


def test_one_process_is_no_group_of_several(tmp_path: Path) -> None:
    path = write_batch(tmp_path / "in.jsonl", [completion("a")])
    result = run("batch", path, str(tmp_path / "out"), *BATCH, "--model_parallel_size", "2", "--json")
    expect_error(result, "model_parallel_size asks for 2 processes and 1 were started")
    expect_error(run("batch", "-", str(tmp_path / "out"), "--nproc", "2"), "several processes cannot share stdin")
