"""`fastllama complete`: output, streaming, JSON, and errors."""

import json
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fastllama import Increment, Llama
from fastllama.stream import NotFiniteError
from tests.support.command_line import GREEDY, expect_error, run
from tests.support.comparisons import assert_same_logprobs


def test_complete_prints_what_text_completion_returns(checkpoint: str, llm: Llama) -> None:
    expected = llm.text_completion(["hello world"], temperature=0, max_gen_len=6)[0]["generation"]
    result = run("complete", "hello world", "--ckpt_dir", checkpoint, *GREEDY)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert result.stderr.splitlines()[-1].startswith("6 tokens in ") and "tokens/s" in result.stderr


def test_complete_takes_hyphens_and_the_folder_original(tmp_path: Path, checkpoint: str) -> None:
    os.symlink(checkpoint, tmp_path / "original")
    words = [word.replace("_", "-") if word.startswith("--") else word for word in GREEDY]
    result = run("complete", "hello world", "--ckpt-dir", str(tmp_path), *words)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == run("complete", "hello world", "--ckpt_dir", checkpoint, *GREEDY).stdout


def test_complete_prints_several_prompts_under_headers(checkpoint: str, llm: Llama) -> None:
    prompts = ["one", "two two", "three"]
    alone = [llm.text_completion([prompt], temperature=0, max_gen_len=6)[0]["generation"] for prompt in prompts]
    expected = "".join(f"== {n}: {p}\n{text}\n\n" for n, (p, text) in enumerate(zip(prompts, alone, strict=True), 1))
    for batch in ([], ["--max_batch_size", "2"]):
        result = run("complete", *prompts, "--ckpt_dir", checkpoint, *GREEDY, *batch)
        assert result.stdout == expected
        assert "18 tokens in" in result.stderr


def test_complete_reads_a_prompt_from_a_pipe(checkpoint: str) -> None:
    piped = run("complete", "--ckpt_dir", checkpoint, *GREEDY, stdin="hello\nworld\n")
    assert piped.stdout == run("complete", "hello\nworld", "--ckpt_dir", checkpoint, *GREEDY).stdout
    expect_error(run("complete", "--ckpt_dir", checkpoint, stdin=""), "no PROMPT")


def test_complete_json_is_one_object(checkpoint: str, llm: Llama) -> None:
    tokens, scores = llm.generate([llm.tokenizer.encode("hello", bos=True, eos=False)], 6, 0, logprobs=True)
    result = run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY, "--json", "--logprobs")
    assert result.exit_code == 0 and result.stderr == ""
    found = json.loads(result.stdout)
    assert found["tokens"] == 6 and found["tokens_per_second"] > 0
    assert_same_logprobs([row.pop("logprobs") for row in found["completions"]], scores)
    assert found["completions"] == [
        {
            "prompt": "hello",
            "text": llm.tokenizer.decode(tokens[0]),
            "tokens": 6,
            "finish_reason": "length",
            "token_ids": tokens[0],
        }
    ]


def test_complete_without_logprobs_has_none(checkpoint: str) -> None:
    found = json.loads(run("complete", "a", "b", "--ckpt_dir", checkpoint, *GREEDY, "--json").stdout)
    assert [sorted(row) for row in found["completions"]] == [["finish_reason", "prompt", "text", "tokens"]] * 2
    expect_error(run("complete", "a", "--logprobs"), "--logprobs needs --json")


def test_complete_echo_repeats_the_prompt_and_counts_only_generated_tokens(checkpoint: str) -> None:
    plain = json.loads(run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY, "--json").stdout)
    echoed = json.loads(run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY, "--json", "--echo").stdout)
    assert echoed["completions"][0]["text"] == "hello" + plain["completions"][0]["text"]
    assert echoed["tokens"] == plain["tokens"] == 6


def test_complete_seed_determines_the_tokens(checkpoint: str) -> None:
    words = ("complete", "a", "--ckpt_dir", checkpoint, "--max_gen_len", "12", "--max_seq_len", "64")
    first, again, other = (run(*words, "--seed", seed).stdout for seed in ("3", "3", "4"))
    assert first == again != other


def test_complete_streams_pieces_as_they_come(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("fastllama.cli.complete.click.echo", lambda text="", **options: pieces.append(text))
    assert run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY).exit_code == 0
    assert len(pieces) >= 6


def test_complete_uses_the_builtin_model_with_a_notice(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.builtin.builtin_checkpoint", lambda: (checkpoint, checkpoint))
    plain = run("complete", "hello", *GREEDY)
    assert plain.exit_code == 0 and plain.stderr.splitlines()[0].startswith("no --ckpt_dir: using the small model")
    assert plain.stderr.splitlines()[-1].endswith("tokens/s")
    assert run("complete", "hello", *GREEDY, "--json").stderr == ""
    expect_error(run("complete", "hello", "--tokenizer_path", "x"), "--tokenizer_path needs --ckpt_dir")


class Failing:
    """A Llama whose stream raises an error after `increments` increments."""

    def __init__(self, llm: Llama, error: BaseException, increments: int) -> None:
        self.llm, self.error, self.left = llm, error, increments

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def stream(self, *arguments: Any) -> Generator[Increment]:
        for increment in self.llm.stream(*arguments):
            if not self.left:
                raise self.error
            self.left -= 1
            yield increment


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (NotFiniteError("the logits\nare not finite"), "the logits are not finite", 2),
        (MemoryError(), "MemoryError", 2),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_keeps_the_finished_completions(
    checkpoint: str, llm: Llama, monkeypatch: pytest.MonkeyPatch, error: BaseException, message: str, code: int
) -> None:
    """Three prompts, one at a time; the error comes when the second starts."""
    monkeypatch.setattr(llm.tokenizer, "stop_tokens", set())
    one = llm.text_completion(["a"], 0, max_gen_len=6)[0]["generation"]
    for as_json in ((), ("--json",)):
        monkeypatch.setattr(Llama, "build", lambda *args, **options: Failing(llm, error, 6))
        result = run("complete", "a", "b", "c", "--ckpt_dir", checkpoint, *GREEDY, "--max_batch_size", "1", *as_json)
        assert result.exit_code == code
        assert result.stderr.strip() == ("" if code == 130 else f"fastllama: error: {message}")
        if as_json:
            found = json.loads(result.stdout)
            assert [row["text"] for row in found["completions"]] == [one]
            assert (found["error"], found["tokens"]) == (message, 6)
        else:
            assert result.stdout == f"== 1: a\n{one}\n\n"


def test_completions_are_printed_in_order_and_after_an_error_with_gaps(
    checkpoint: str, llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stream(*arguments: Any) -> Generator[Increment]:
        for row, reason in ((2, "stop"), (0, None), (0, "stop"), (3, None)):
            yield Increment(row, [1], f"[{row}]", None, cast(Any, reason))
        raise ValueError("no more")

    monkeypatch.setattr(llm, "stream", stream)
    monkeypatch.setattr(Llama, "build", lambda *args, **options: llm)
    result = run("complete", *"abcd", "--ckpt_dir", checkpoint, *GREEDY)
    assert result.stdout == "== 1: a\n[0][0]\n\n== 3: c\n[2]\n\n"
    assert result.stderr == "fastllama: error: no more\n"
    live = run("complete", "a", "--ckpt_dir", checkpoint, *GREEDY)
    assert live.exit_code == 1  # the row does not exist: a bug, whose traceback is shown


def test_complete_checks_all_prompts_before_the_first_runs(
    checkpoint: str, llm: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    long, length = "y" * 500, len(llm.tokenizer.encode("y" * 500, bos=True, eos=False))
    monkeypatch.setattr(llm, "stream", None)  # nothing runs
    monkeypatch.setattr(Llama, "build", lambda *args, **options: llm)
    has = f"has {length} tokens, more than the max_seq_len of 64: shorten it, or raise --max_seq_len"
    quoted = f"'{'y' * 40}'..."
    for batch in ((), ("--max_batch_size", "1")):
        result = run("complete", "a", long, "b", "--ckpt_dir", checkpoint, *GREEDY, *batch)
        expect_error(result, f"error: prompt 2 of 3, {quoted}, {has}")
    expect_error(
        run("complete", long, "--ckpt_dir", checkpoint, *GREEDY, "--json"), f"error: the prompt {quoted}, {has}"
    )


def test_complete_errors_name_what_is_wrong(tmp_path: Path, checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expect_error(run("complete", "x", "--ckpt_dir", str(tmp_path / "nowhere")), "nowhere", "does not exist")
    expect_error(run("complete", "x", "--ckpt_dir", str(tmp_path)), "no checkpoint in")
    expect_error(run("complete", "x", "--ckpt_dir", checkpoint, "--tokenizer_path", "nowhere"), "nowhere")
    expect_error(run("complete", "x", "--ckpt_dir", checkpoint, "--device", "gpu"), "device")
    expect_error(run("complete", "x" * 500, "--ckpt_dir", checkpoint, *GREEDY), "max_seq_len of 64")
    monkeypatch.setattr("fastllama.kernels.launch.interpreter.interpreting", lambda: False)
    fused = run("complete", "x", "--ckpt_dir", checkpoint, *GREEDY, "--device", "cpu", "--backend", "fused")
    expect_error(fused, "its kernels need a GPU", "TRITON_INTERPRET=1", 'backend="reference" does')


def test_threads_apply_only_while_the_command_runs(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    stream = Llama.stream

    def watched(self: Llama, *arguments: Any, **keywords: Any) -> Any:
        seen.append(torch.get_num_threads())
        return stream(self, *arguments, **keywords)

    monkeypatch.setattr(Llama, "stream", watched)
    before = torch.get_num_threads()
    expected = run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY).stdout
    assert run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY, "--threads", "3").stdout == expected
    assert run("chat", "--ckpt_dir", checkpoint, *GREEDY, "--threads", "2", stdin="hello\n").exit_code == 0
    assert seen == [before, 3, 2] and torch.get_num_threads() == before


@pytest.mark.parametrize("command", ["complete", "chat", "bench"])
def test_invalid_threads_are_errors(command: str) -> None:
    expect_error(run(command, "--threads", "0"), "'--threads': 0 is not in the range x>=1")
    expect_error(run(command, "--threads", "many"), "'--threads': 'many' is not a valid integer range")
