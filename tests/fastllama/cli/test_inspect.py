"""`fastllama inspect`: JSON, text, plans and errors."""

import json
from pathlib import Path

import pytest

from fastllama import Llama
from fastllama.cli.inspect import GPUS
from fastllama.cli.inspect_plans import size_text
from fastllama.speed_of_light import DATA_SHEETS
from tests.support.checkpoints import random_weights, tiny_params, write_huggingface, write_meta, write_tokenizer
from tests.support.command_line import expect_error, run
from tests.support.quantized_folders import write_int4


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
    positions = 3 * 128 + 64  # of three rows, in pages of 64, and of the page that belongs to no row
    assert memory["cache"] == 2 * 2 * positions * 2 * 8 * 2  # k and v, layers, positions, kv heads, width, bytes
    assert memory["total"] == memory["weights"] + memory["cache"] + memory["workspace"]
    assert [file["name"] for file in found["files"]] == ["consolidated.00.pth"]
    machine = found["this_machine"]
    assert machine["device"] == "cpu" and machine["threads"] >= 1
    assert (machine["backend"] == "native") == (machine["instruction_set"] is not None)
    on_one = json.loads(run("inspect", checkpoint, "--threads", "1", "--json").stdout)
    assert on_one["this_machine"]["threads"] == 1
    assert found["tokenizer"]["n_words"] == 576 and found["tokenizer"]["fits_checkpoint"]
    assert found["tokenizer"]["stop_tokens"] == sorted(llm.tokenizer.stop_tokens)


@pytest.mark.parametrize(
    ("words", "precision", "title"),
    [
        ((), "as stored", "tokens in bfloat16, weights: as stored\n"),
        (("--dtype", "float32"), "as stored", "tokens in float32, weights: as stored\n"),
        (("--quantize", "int8"), "int8", "tokens in bfloat16, weights: int8\n"),
    ],
)
def test_inspect_names_the_precision_of_stored_weights(
    tmp_path: Path, words: tuple[str, ...], precision: str, title: str
) -> None:
    folder = str(write_int4(tmp_path))
    found = json.loads(run("inspect", folder, *words, "--json").stdout)
    assert found["quantized"] == ["int4 in groups of 64"] and found["memory"]["precision"] == precision
    assert [one["precision"] for one in found["precisions"]] == ["as stored", "int8", "int4"]
    shown = run("inspect", folder, *words).stdout
    assert title in shown and "  as stored  " in shown and "  bfloat16  " not in shown


def test_inspect_names_the_dtype_of_dense_weights(checkpoint: str) -> None:
    found = json.loads(run("inspect", checkpoint, "--json").stdout)
    assert found["memory"]["precision"] == found["precisions"][0]["precision"] == "float32"
    shown = run("inspect", checkpoint).stdout
    assert "tokens in float32\n" in shown and "as stored" not in shown


def test_inspect_reads_headers_only(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllama.checkpoint.Checkpoint.tensors", lambda *args: pytest.fail("a weight was read"))
    shown = run("inspect", "--ckpt_dir", checkpoint)
    assert shown.exit_code == 0, shown.stderr
    for part in ("architecture", "parameters", "consolidated.00.pth", "memory for 1 rows", "workspace", "stop tokens"):
        assert part in shown.stdout


def test_inspect_reads_hugging_face_folders_without_a_tokenizer(tmp_path: Path) -> None:
    params = tiny_params()
    write_huggingface(tmp_path, params, random_weights(params, seed=1))
    found = json.loads(run("inspect", str(tmp_path), "--json").stdout)
    assert found["format"] == "huggingface" and found["tokenizer"] is None
    assert "tokenizer: none in the checkpoint" in run("inspect", str(tmp_path)).stdout
    expect_error(run("inspect", str(tmp_path), "--tokenizer_path", "nowhere"), "nowhere")


def test_inspect_shows_rope_scaling_only_where_it_is_used(tmp_path: Path, checkpoint: str) -> None:
    params = tiny_params(use_scaled_rope=True)
    write_meta(tmp_path, params, random_weights(params, seed=1))
    scaled = json.loads(run("inspect", str(tmp_path), "--json").stdout)["architecture"]
    plain = json.loads(run("inspect", checkpoint, "--json").stdout)["architecture"]
    assert scaled["rope_scaling_factor"] == 8.0 and scaled["rope_original_max_seq_len"] == 8192
    assert not plain["use_scaled_rope"] and "rope_scaling_factor" not in plain


def test_inspect_shows_the_fields_of_yarn_that_it_reads(tmp_path: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    write_huggingface(tmp_path, tiny_params(), random_weights(tiny_params()), rope_parameters=rope)
    found = json.loads(run("inspect", str(tmp_path), "--json").stdout)["architecture"]
    assert {name: value for name, value in found.items() if "rope" in name} == {
        "rope_theta": 500000.0,
        "use_scaled_rope": False,
        "rope_type": "yarn",
        "rope_scaling_factor": 4.0,
        "rope_original_max_seq_len": 16,
        "rope_attention_factor": pytest.approx(1.138629),
        "rope_beta_fast": 32.0,
        "rope_beta_slow": 1.0,
        "rope_truncate": True,
    }


def test_inspect_reports_a_tokenizer_of_another_model(tmp_path: Path, checkpoint: str) -> None:
    other = write_tokenizer(tmp_path, n_ranks=300)
    assert "NOT the checkpoint's vocabulary" in run("inspect", checkpoint, "--tokenizer_path", str(other)).stdout


def test_inspect_lists_passed_over_files(tmp_path: Path, checkpoint: str) -> None:
    params = tiny_params()
    write_huggingface(tmp_path, params, random_weights(params, seed=1))
    write_meta(tmp_path / "original", params, random_weights(params, seed=2))
    (tmp_path / "optimizer.pth").write_bytes(b"")
    found = json.loads(run("inspect", str(tmp_path), "--json").stdout)
    assert (found["format"], found["path"]) == ("huggingface", str(tmp_path))
    assert found["passed_over"] == [
        {"path": "optimizer.pth", "why": "a training run's state"},
        {"path": "original", "why": "the folder's own weights go first"},
    ]
    shown = run("inspect", str(tmp_path)).stdout
    assert "passed over\n  optimizer.pth  a training run's state\n  original       the folder's own weights go" in shown
    assert "passed over" not in run("inspect", checkpoint).stdout
    assert json.loads(run("inspect", checkpoint, "--json").stdout)["passed_over"] == []


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


def test_inspect_plans_for_several_processes(checkpoint: str) -> None:
    found = json.loads(run("inspect", checkpoint, "--nproc", "1,2,4,3", "--gpu", "H200", "--json").stdout)
    one, two, four, three = found["processes"]
    assert found["gpu"] == "H200" and tuple(DATA_SHEETS) == GPUS
    assert one["bytes_each"] == found["memory"]["total"] and one["share_of_exchanging"] == 0
    assert four["bytes_each"] < two["bytes_each"] < one["bytes_each"]
    # In a model this small, the exchange takes nearly all of the time.
    assert 0.9 < two["share_of_exchanging"] < 1 and two["most_tokens_per_second"] < one["most_tokens_per_second"]
    assert three.keys() == {"n", "obstacles"} and "n_heads=8 does not divide by 3" in three["obstacles"]
    shown = run("inspect", checkpoint, "--nproc", "2,3").stdout
    assert "on several H100" in shown and "not possible: n_heads=8" in shown
    expect_error(run("inspect", checkpoint, "--gpu", "abacus"), "abacus")


def test_inspect_plans_speculation(checkpoint: str) -> None:
    words = ("inspect", checkpoint, "--nproc", "1,2,3", "--gpu", "H200")
    one, two, three = json.loads(run(*words, "--json").stdout)["processes"]
    found = one["speculation"]
    assert found.keys() == {"guesses", "checking_cost", "acceptance", "speed_up"} and found["guesses"] == 4
    n_launches = 5 * 2 + 4  # of two layers, and nearly all of the time: a step that checks has two more, lookup one
    assert found["checking_cost"] == pytest.approx((n_launches + 2) / n_launches, rel=0.01)
    for acceptance, speed_up in zip(found["acceptance"], found["speed_up"], strict=True):
        tokens = sum(acceptance**i for i in range(5))
        assert speed_up == pytest.approx(tokens * n_launches / (n_launches + 3), rel=0.01)
    assert 1 < two["speculation"]["checking_cost"] < found["checking_cost"] and "speculation" not in three
    shown = run(*words).stdout
    title = "on several H200, 4 guesses by lookup: cost of a step, speed-up if 30%, 50%, 70%, 90% are right\n"
    _, _, section = shown.partition(title)
    assert section.startswith(f"  1  {found['checking_cost']:10.3f}  {found['speed_up'][0]:5.2f}")


def test_inspect_plans_fewer_guesses_for_more_rows(checkpoint: str) -> None:
    """The tokens of all rows are 16 at most, where a step checks guesses."""
    for n_rows, n_guesses in ((3, 4), (5, 2), (8, 1)):
        words = ("inspect", checkpoint, "--nproc", "1", "--max_batch_size", str(n_rows))
        (plan,) = json.loads(run(*words, "--json").stdout)["processes"]
        assert plan["speculation"]["guesses"] == n_guesses
        assert f"{n_guesses} guesses by lookup" in run(*words).stdout
    words = ("inspect", checkpoint, "--nproc", "1", "--max_batch_size", "9")
    assert json.loads(run(*words, "--json").stdout)["processes"][0]["speculation"] is None
    assert "guesses" not in run(*words).stdout


def test_inspect_plans_for_a_cache_that_rows_share(checkpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("inspect", checkpoint, "--max_batch_size", "8", "--max_seq_len", "1024", "--nproc", "1,2,3")
    whole = json.loads(run(*words, "--json").stdout)
    shared = json.loads(run(*words, "--cache_tokens", "1000", "--json").stdout)
    assert whole["memory"]["cache_tokens"] is None and shared["memory"]["cache_tokens"] == 1000
    per_page = 2 * 2 * 64 * 2 * 8 * 4  # k and v, layers, positions, kv heads, width, bytes
    assert whole["memory"]["cache"] == (8 * 16 + 1) * per_page  # with the page that belongs to no row
    assert shared["memory"]["cache"] == (16 + 1) * per_page
    assert shared["processes"][0]["bytes_each"] == shared["memory"]["total"] < whole["memory"]["total"]
    # A GPU holds all positions of all rows, and this machine what is free.
    assert [one.get("cache_tokens") for one in whole["processes"]] == [8192, 8192, None]
    free = shared["memory"]["total"]
    monkeypatch.setattr("fastllama.memory_plan.free_memory", lambda device: free)
    machine = json.loads(run(*words, "--json").stdout)["this_machine"]
    assert (machine["free_memory"], machine["cache_tokens"]) == (free, 1024)
    shown = run(*words, "--cache_tokens", "1000").stdout
    assert "memory for 8 rows of 1024 tokens, 1000 together, in float32" in shown
    assert "cache tokens     1,024 fit" in shown and "         8,192\n" in shown
    expect_error(run("inspect", checkpoint, "--cache_tokens", "0"), "--cache_tokens")
