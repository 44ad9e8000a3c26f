"""The command line: what goes to stdout, what to stderr, and which exit code."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

import fastllama
from fastllama import Llama
from fastllama.cli import chat as chat_command
from fastllama.cli import main, program
from fastllama.cli.inspect import size_text
from tests.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer

ROOT = Path(fastllama.__file__).parent.parent
GREEDY = ("--temperature", "0", "--max_gen_len", "6", "--max_seq_len", "64", "--device", "cpu")
READ_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Meta checkpoint with its tokenizer in the same folder."""
    folder = tmp_path_factory.mktemp("checkpoint")
    params = tiny_params()
    write_meta(folder, params, random_weights(params, seed=7))
    write_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="module")
def llm(checkpoint: str) -> Llama:
    return Llama.build(checkpoint, checkpoint, 64, 4, device="cpu")


def run(*words: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, list(words), input=stdin)


def run_process(*words: str, stdin: str = "", **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fastllama", *words]
    return subprocess.run(
        command, input=stdin, text=True, capture_output=True, cwd=ROOT, timeout=READ_TIMEOUT_S, check=False, **options
    )


def expect_error(result: Result, *parts: str) -> None:
    """One line on stderr that holds `parts`, nothing on stdout, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("no --ckpt_dir")]
    assert len(lines) == 1 and lines[0].startswith("fastllama: error: "), result.stderr
    for part in parts:
        assert part in lines[0]


# The program


@pytest.mark.parametrize("command", ["complete", "chat", "inspect", "bench"])
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"fastllama {command}" in result.stdout and "Example" in result.stdout and "--json" in result.stdout


def test_help_and_version_import_no_torch() -> None:
    code = (
        "import sys\nfrom fastllama.cli import main\n"
        "for words in (['--help'], ['complete', '--help'], ['bench', '--help'], ['--version']):\n"
        "    try:\n        main(words)\n    except SystemExit as end:\n        assert end.code == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"fastllama {fastllama.__version__}" in done.stdout


def test_usage_errors_are_one_line() -> None:
    expect_error(run("frobnicate"), "No such command 'frobnicate'")
    expect_error(run("complete", "--no_such_option"), "--no_such_option")
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--temperature", "-1"), "--temperature"),
        (("--temperature", "nan"), "--temperature"),
        (("--temperature", "warm"), "--temperature"),
        (("--top_p", "inf"), "--top_p"),
        (("--top-p", "-0.5"), "--top_p"),
        (("--max_gen_len", "-1"), "--max_gen_len"),
        (("--max_seq_len", "0"), "--max_seq_len"),
        (("--max_seq_len", "131073"), "--max_seq_len"),
        (("--max_batch_size", "0"), "--max_batch_size"),
        (("--seed", "-1"), "--seed"),
        (("--dtype", "int8"), "--dtype"),
        (("--backend", "metal"), "--backend"),
    ],
)
def test_values_out_of_range_are_rejected_by_name(words: tuple[str, ...], name: str) -> None:
    expect_error(run("complete", "x", *words), name)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two\nlines"),
        AssertionError("two\nlines"),
        FileNotFoundError(2, "two\nlines", "f"),
        MemoryError("two\nlines"),
        torch.OutOfMemoryError("two\nlines"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: two\nlines"),
    ],
)
def test_expected_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Llama, "build", fail)
    expect_error(run("complete", "x", "--json"), "two")


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Llama, "build", fail)
    expect_error(run("complete", "x", "--ckpt_dir", "x"), "MemoryError")


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(Llama, "build", fail)
    result = run("complete", "x", "--ckpt_dir", "x")
    assert isinstance(result.exception, KeyError)


def test_interrupt_ends_in_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Llama, "build", interrupt)
    assert run("complete", "x", "--ckpt_dir", "x").exit_code == program.EXIT_INTERRUPTED


def test_main_returns_to_a_caller_that_asks_for_it(checkpoint: str) -> None:
    with pytest.raises(click.UsageError):
        main(["complete", "--nope"], standalone_mode=False)


# complete


def test_complete_prints_what_text_completion_says(checkpoint: str, llm: Llama) -> None:
    expected = llm.text_completion(["hello world"], temperature=0, max_gen_len=6)[0]["generation"]
    result = run("complete", "hello world", "--ckpt_dir", checkpoint, *GREEDY)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == expected + "\n"
    assert result.stderr.splitlines()[-1].startswith("6 tokens in ") and "tokens/s" in result.stderr


def test_complete_takes_hyphens_and_original_places(tmp_path: Path, checkpoint: str) -> None:
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
    assert found["completions"] == [
        {
            "prompt": "hello",
            "text": llm.tokenizer.decode(tokens[0]),
            "tokens": 6,
            "finish_reason": "length",
            "token_ids": tokens[0],
            "logprobs": scores[0] if scores else None,
        }
    ]


def test_complete_without_logprobs_has_none(checkpoint: str) -> None:
    found = json.loads(run("complete", "a", "b", "--ckpt_dir", checkpoint, *GREEDY, "--json").stdout)
    assert [sorted(row) for row in found["completions"]] == [["finish_reason", "prompt", "text", "tokens"]] * 2
    expect_error(run("complete", "a", "--logprobs"), "--logprobs needs --json")


def test_complete_echo_repeats_the_prompt_and_counts_only_what_came(checkpoint: str) -> None:
    plain = json.loads(run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY, "--json").stdout)
    echoed = json.loads(run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY, "--json", "--echo").stdout)
    assert echoed["completions"][0]["text"] == "hello" + plain["completions"][0]["text"]
    assert echoed["tokens"] == plain["tokens"] == 6


def test_complete_seed_decides_the_draws(checkpoint: str) -> None:
    words = ("complete", "a", "--ckpt_dir", checkpoint, "--max_gen_len", "12", "--max_seq_len", "64")
    first, again, other = (run(*words, "--seed", seed).stdout for seed in ("3", "3", "4"))
    assert first == again != other


def test_complete_streams_pieces_as_they_come(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[str] = []
    monkeypatch.setattr("fastllama.cli.complete.click.echo", lambda text="", **options: pieces.append(text))
    assert run("complete", "hello", "--ckpt_dir", checkpoint, *GREEDY).exit_code == 0
    assert len(pieces) >= 6


def test_complete_uses_the_model_in_the_package_and_says_so(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.builtin.builtin_checkpoint", lambda: (checkpoint, checkpoint))
    spoken = run("complete", "hello", *GREEDY)
    assert spoken.exit_code == 0 and spoken.stderr.splitlines()[0].startswith("no --ckpt_dir: using the small model")
    assert spoken.stderr.splitlines()[-1].endswith("tokens/s")
    assert run("complete", "hello", *GREEDY, "--json").stderr == ""
    expect_error(run("complete", "hello", "--tokenizer_path", "x"), "--tokenizer_path needs --ckpt_dir")


def test_complete_errors_name_what_is_wrong(tmp_path: Path, checkpoint: str) -> None:
    expect_error(run("complete", "x", "--ckpt_dir", str(tmp_path / "nowhere")), "nowhere", "does not exist")
    expect_error(run("complete", "x", "--ckpt_dir", str(tmp_path)), "no checkpoint in")
    expect_error(run("complete", "x", "--ckpt_dir", checkpoint, "--tokenizer_path", "nowhere"), "nowhere")
    expect_error(run("complete", "x", "--ckpt_dir", checkpoint, "--device", "gpu"), "device")
    expect_error(run("complete", "x" * 500, "--ckpt_dir", checkpoint, *GREEDY), "max_seq_len of 64")
    expect_error(run("complete", "x", "--ckpt_dir", checkpoint, *GREEDY, "--backend", "fused"), "fused")


# chat


CHAT = ("--temperature", "0", "--max_gen_len", "8", "--max_seq_len", "128", "--device", "cpu")


def test_chat_answers_each_line_of_a_pipe_on_one_line(checkpoint: str) -> None:
    llm = Llama.build(checkpoint, checkpoint, 512, 1, device="cpu")
    dialog: list[Any] = [{"role": "system", "content": "be good"}]
    expected = []
    for line in ("hello", "and then?"):
        dialog.append({"role": "user", "content": line})
        answer = llm.chat_completion([dialog], temperature=0, max_gen_len=8)[0]["generation"]
        dialog.append(answer)
        expected.append(" ".join(answer["content"].split("\n")))
    words = ("chat", "--system", "be good", "--ckpt_dir", checkpoint, *CHAT, "--max_seq_len", "512")
    result = run(*words, stdin="hello\n\n  \nand then?\n")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == expected


def test_chat_json_is_one_object_a_reply(checkpoint: str) -> None:
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, "--json", stdin="hello\n" + "x" * 400 + "\nagain")
    first, second, third = (json.loads(line) for line in result.stdout.splitlines())
    assert first["role"] == third["role"] == "assistant" and first["tokens"] == 8
    assert first["finish_reason"] == "length" and isinstance(first["content"], str)
    assert "raise --max_seq_len" in second["error"]
    assert result.exit_code == 0


def test_chat_obeys_slash_commands(checkpoint: str) -> None:
    told = ["hello", "/reset", "hello", "/nonsense now", "/help", "/exit", "never asked"]
    words = ("chat", "--ckpt_dir", checkpoint, *CHAT, "--max_seq_len", "512")
    remembered = run(*words, stdin="hello\nhello\n").stdout.splitlines()
    assert len(set(remembered)) == 2
    result = run(*words, stdin="\n".join(told))
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [remembered[0]] * 2
    assert "unknown command /nonsense" in result.stderr
    assert all(name in result.stderr for name in ("/reset", "/exit", "/help"))


def test_chat_goes_on_after_a_message_that_is_too_long(checkpoint: str) -> None:
    fresh = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="hello\n")
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="x" * 400 + "\nhello\n")
    assert result.exit_code == 0
    assert "context" in result.stderr and "raise --max_seq_len" in result.stderr
    assert result.stdout == fresh.stdout


def test_chat_forgets_the_oldest_turns_and_says_so(checkpoint: str) -> None:
    result = run("chat", "--ckpt_dir", checkpoint, *CHAT, stdin="hello hello\n" * 5)
    assert result.exit_code == 0 and len(result.stdout.splitlines()) == 5
    assert "the oldest 2 messages were forgotten" in result.stderr


@pytest.mark.parametrize("leave", [EOFError, KeyboardInterrupt])
def test_chat_at_the_prompt_leaves_at_ctrl_d_and_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, leave: type[BaseException]
) -> None:
    answers: Iterator[str] = iter(["hello", "again"])

    def type_in(prompt: str) -> str:
        assert prompt == "you> "
        for line in answers:
            return line
        raise leave

    monkeypatch.setattr("builtins.input", type_in)
    assert list(chat_command._lines(interactive=True)) == ["hello", "again"]


# inspect


def test_inspect_json_describes_a_meta_checkpoint(checkpoint: str, llm: Llama) -> None:
    result = run(
        "inspect", checkpoint, "--max_batch_size", "3", "--max_seq_len", "100", "--dtype", "bfloat16", "--json"
    )
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    weights = llm.model.state_dict()
    assert found["format"] == "meta" and found["stored_dtype"] == "float32"
    assert found["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert found["architecture"]["n_kv_heads"] == 2 and found["architecture"]["hidden_dim"] > 0
    memory = found["memory"]
    assert (memory["dtype"], memory["max_batch_size"], memory["max_seq_len"]) == ("bfloat16", 3, 100)
    assert memory["cache"] == 2 * 2 * 3 * 2 * 100 * 8 * 2  # k and v, layers, rows, kv heads, positions, width, bytes
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["workspace"]
    assert [file["name"] for file in found["files"]] == ["consolidated.00.pth"]
    assert found["tokenizer"]["n_words"] == 576 and found["tokenizer"]["fits_checkpoint"]
    assert found["tokenizer"]["stop_tokens"] == sorted(llm.tokenizer.stop_tokens)


def test_inspect_reads_headers_only(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.checkpoint.base.read_share", lambda *args: pytest.fail("a weight was read"))
    shown = run("inspect", "--ckpt_dir", checkpoint)
    assert shown.exit_code == 0, shown.stderr
    for part in ("architecture", "parameters", "consolidated.00.pth", "memory for 1 rows", "workspace", "stop tokens"):
        assert part in shown.stdout


def test_inspect_reads_hugging_face_folders_without_a_tokenizer(tmp_path: Path) -> None:
    params = tiny_params()
    write_huggingface(tmp_path, params, random_weights(params, seed=1))
    found = json.loads(run("inspect", str(tmp_path), "--json").stdout)
    assert found["format"] == "huggingface" and found["tokenizer"] is None
    assert "tokenizer: none in the folder" in run("inspect", str(tmp_path)).stdout
    expect_error(run("inspect", str(tmp_path), "--tokenizer_path", "nowhere"), "nowhere")


def test_inspect_shows_how_rope_is_scaled_where_it_is(tmp_path: Path, checkpoint: str) -> None:
    params = tiny_params(use_scaled_rope=True)
    write_meta(tmp_path, params, random_weights(params, seed=1))
    scaled = json.loads(run("inspect", str(tmp_path), "--json").stdout)["architecture"]
    plain = json.loads(run("inspect", checkpoint, "--json").stdout)["architecture"]
    assert scaled["rope_scaling_factor"] == 8.0 and scaled["rope_original_max_seq_len"] == 8192
    assert not plain["use_scaled_rope"] and "rope_scaling_factor" not in plain


def test_inspect_says_when_the_tokenizer_is_another_models(tmp_path: Path, checkpoint: str) -> None:
    other = write_tokenizer(tmp_path, n_ranks=300)
    assert "NOT the checkpoint's vocabulary" in run("inspect", checkpoint, "--tokenizer_path", str(other)).stdout


def test_inspect_errors(tmp_path: Path, checkpoint: str) -> None:
    expect_error(run("inspect", str(tmp_path / "nowhere")), "does not exist")
    expect_error(run("inspect", checkpoint, "--ckpt_dir", checkpoint), "the same")
    (tmp_path / "consolidated.00.pth").write_bytes(b"not a checkpoint")
    (tmp_path / "params.json").write_text("{}")
    expect_error(run("inspect", str(tmp_path)), str(tmp_path))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**52, "4096.0 TiB")]
)
def test_size_text_picks_a_unit(count: int, text: str) -> None:
    assert size_text(count) == text


# bench


@pytest.fixture
def small_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.benchmarks.measure.CPU_BUFFER_BYTES", 2**16)
    monkeypatch.setattr("fastllama.benchmarks.measure.CPU_MATMUL_SIZE", 16)
    monkeypatch.setattr("fastllama.benchmarks.measure.ReadProbe.sample.__defaults__", (0.0,))


BENCH = ("--batch", "1,2", "--context", "4", "--steps", "3", "--rounds", "1", "--device", "cpu", "--peers", "none")


def test_bench_prints_a_table_and_keeps_stdout_for_it(checkpoint: str, small_probe: None) -> None:
    result = run("bench", "--suite", "decode", "--ckpt_dir", checkpoint, *BENCH)
    assert result.exit_code == 0, result.stderr
    assert "tokens/s" in result.stdout and "comparing" not in result.stdout and "comparing" in result.stderr


def test_bench_json_is_the_result_files_object(tmp_path: Path, checkpoint: str, small_probe: None) -> None:
    path = tmp_path / "result.json"
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH, "--json", "--output", str(path))
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    assert json.loads(result.stdout) == json.loads(path.read_text())
    assert [record["batch"] for record in json.loads(result.stdout)["records"]] == [1, 2]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--suite", "decode,prefil"), ("--suite", "'prefil' is not one of decode")),
        (("--model", "gpt"), ("--model",)),
        (("--batch", "1,x"), ("--batch",)),
        (("--batch", "0"), ("--batch",)),
        (("--context", "1,-2"), ("--context",)),
        (("--steps", "1"), ("--steps",)),
        (("--peers", "vllm"), ("--peers", "reference")),
        (("--model", "builtin", "--ckpt_dir", "x"), ("exclude each other",)),
        (("--tokenizer_path", "x"), ("needs --ckpt_dir",)),
        (("--model", "random-176m", "--device", "cuda:99"), ("cuda:99",)),
        (("--model", "random-176m", "--device", "tpu"), ("tpu",)),
        (("--ckpt_dir", "nowhere"), ("nowhere",)),
    ],
)
def test_bench_rejects_by_name(words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    expect_error(run("bench", *words), *parts)


def test_bench_interrupted_prints_what_there_is(
    checkpoint: str, small_probe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastllama.benchmarks.decode.run_case", interrupt)
    result = run("bench", "--ckpt_dir", checkpoint, *BENCH, "--json")
    assert result.exit_code == program.EXIT_INTERRUPTED
    assert json.loads(result.stdout)["interrupted"] is True


# Processes and terminals


def test_process_errors_without_a_traceback() -> None:
    done = run_process("complete", "x", "--ckpt_dir", "nowhere")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fastllama: error: ") and done.stderr.count("\n") == 1


def test_process_is_quiet_when_its_reader_leaves(checkpoint: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "fastllama", "complete", "hello", "--ckpt_dir", checkpoint, *GREEDY]
    with open(writer, "wb") as closed:
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, cwd=ROOT, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


class Terminal:
    """A chat on a terminal of its own."""

    def __init__(self, *words: str) -> None:
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "fastllama", "chat", *words])

    def read_until(self, text: str) -> str:
        found = ""
        deadline = time.monotonic() + READ_TIMEOUT_S
        while text not in found:
            ready, _, _ = select.select([self.handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                pytest.fail(f"no {text!r} in {found!r}")
            found += os.read(self.handle, 4096).decode(errors="replace")
        return found

    def write(self, text: str) -> None:
        os.write(self.handle, text.encode())

    def exit_code(self) -> int:
        try:
            while os.read(self.handle, 4096):
                continue
        except OSError:  # Linux reports the end of a terminal as an error
            pass
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.handle)


@pytest.fixture
def terminal(checkpoint: str) -> Iterator[Terminal]:
    chat = Terminal("--ckpt_dir", checkpoint, *CHAT)
    yield chat
    chat.close()


def test_chat_on_a_terminal_prompts_and_leaves_at_its_end(terminal: Terminal) -> None:
    terminal.read_until("you> ")
    terminal.write("hello\n")
    terminal.read_until("you> ")
    terminal.write("/nonsense\n")
    assert "unknown command" in terminal.read_until("you> ")
    terminal.write("\x04")
    assert terminal.exit_code() == 0
