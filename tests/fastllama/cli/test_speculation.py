"""`--speculate`, `--draft` and `--n_guesses`: the same output, with what speculation did beside it."""

import json
from pathlib import Path

import pytest

from fastllama.cli.options import MAX_GUESSES, SPECULATE_CHOICES
from fastllama.kernels import guesses
from fastllama.validate import speculation
from tests.support.command_line import GREEDY, expect_error, run

PROMPT = "one two one two one"


def test_the_options_are_those_of_build() -> None:
    assert MAX_GUESSES == guesses.MAX_GUESSES
    for kind in SPECULATE_CHOICES:
        assert speculation(kind, MAX_GUESSES, kind == "draft") == (kind, MAX_GUESSES)


@pytest.mark.parametrize("options", [["--speculate", "lookup"], ["--draft"], ["--draft", "--n_guesses", "3"]])
def test_complete_prints_the_same_and_what_speculation_did(checkpoint: str, options: list[str]) -> None:
    options = [part for one in options for part in ([one, checkpoint] if one == "--draft" else [one])]
    plain = run("complete", PROMPT, "--ckpt_dir", checkpoint, *GREEDY)
    result = run("complete", PROMPT, "--ckpt_dir", checkpoint, *GREEDY, *options)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == plain.stdout
    line = result.stderr.splitlines()[-1]
    assert "tokens a step" in line and "of the time guessing" in line and "tokens a step" not in plain.stderr
    if "--n_guesses" in options:
        assert "guesses right" in line
    found = json.loads(run("complete", PROMPT, "--ckpt_dir", checkpoint, *GREEDY, *options, "--json").stdout)
    counts = found["speculation"]
    assert counts["tokens"] == counts["steps"] + counts["accepted"] and counts["tokens_per_step"] >= 1
    assert 0 <= counts["guessing"] < 1 and counts["seconds"] > 0


def test_chat_tells_what_speculation_did_for_each_reply(checkpoint: str) -> None:
    replies = run(
        "chat", "--ckpt_dir", checkpoint, *GREEDY, "--speculate", "lookup", "--json", stdin="hello\nhello hello\n"
    )
    assert replies.exit_code == 0, replies.stderr
    for line in replies.stdout.splitlines():
        reply = json.loads(line)
        assert reply["speculation"]["tokens"] >= reply["tokens"]


def test_batch_gives_the_same_answers(checkpoint: str, tmp_path: Path) -> None:
    lines = [
        {"custom_id": str(n), "method": "POST", "url": "/v1/completions", "body": {"prompt": PROMPT, "max_tokens": 9}}
        for n in range(5)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    texts = []
    for name, options in {"plain": [], "lookup": ["--speculate", "lookup"], "draft": ["--draft", checkpoint]}.items():
        out = tmp_path / f"{name}.jsonl"
        files = str(tmp_path / "in.jsonl"), str(out)
        result = run("batch", *files, "--ckpt_dir", checkpoint, "--max_seq_len", "64", "--json", *options)
        assert result.exit_code == 0, result.stderr
        assert ("speculation" in json.loads(result.stdout)) == bool(options)
        texts.append([json.loads(line)["response"]["body"]["choices"] for line in out.read_text().splitlines()])
    assert texts[0] == texts[1] == texts[2]


def test_wrong_options_are_refused(checkpoint: str) -> None:
    command = ("complete", PROMPT, "--ckpt_dir", checkpoint)
    expect_error(run(*command, "--speculate", "draft"), "needs a draft model")
    expect_error(run(*command, "--n_guesses", "16"), "neither auto nor a number from 1 to 15")
    expect_error(run(*command, "--n_guesses", "3"), 'needs speculate="lookup"')
    expect_error(run(*command, "--draft", "nowhere"), "the draft model nowhere: ")
