"""Complete many texts on several machines or GPUs, with Ray Data: pip install "fastllama[ray]".

    python examples/ray_data.py
    python examples/ray_data.py --ckpt_dir Meta-Llama-3-8B --num_gpus 1 --concurrency 8     # on a cluster with 8 GPUs

Ray Data reads the prompts in blocks and hands each block to an actor that is free. An actor is a process with one
Llama, built once; its engine answers a block's prompts in rows that are refilled as they end. So a block should have
many more prompts than the engine has rows. The first command prints, on a laptop:

    In a small house lived a fox named Pip.
    Once upon a time, there was a very small fox.
    One day, the fox named Pip woke up very early.
"""

import argparse
from typing import Any

import ray

from fastllama import Llama, SamplingParams, builtin_checkpoint

BEGINNINGS = ("In a small house lived a", "Once upon a time, there was a very small", "One day, the")
ANIMALS = ("fox", "bear", "rabbit", "owl", "mouse", "cat")


class Completer:
    """An actor of Ray Data: builds a Llama, and completes the texts of one block after another."""

    def __init__(self, ckpt_dir: str, tokenizer_path: str | None, max_gen_len: int) -> None:
        self.llm = Llama.build(ckpt_dir, tokenizer_path, max_seq_len=512, max_batch_size=16)
        # Greedy: a text's completion does not depend on the block it is in.
        self.params = SamplingParams(temperature=0, max_gen_len=max_gen_len, stop=["."])

    def __call__(self, block: dict[str, Any]) -> dict[str, Any]:
        """A block of columns -> the same with a column more."""
        results = self.llm.generate_many(block["prompt"].tolist(), self.params)
        return {**block, "completion": [result.answer.text for result in results]}


def main(
    ckpt_dir: str, tokenizer_path: str | None, max_gen_len: int, concurrency: int, num_gpus: float, block_size: int
) -> None:
    """Complete every prompt and print the first few."""
    prompts = [f"{beginning} {animal}" for beginning in BEGINNINGS for animal in ANIMALS]
    # For files: ray.data.read_json("prompts/*.jsonl"), read_parquet(...), and write_json(...) at the end.
    dataset = ray.data.from_items([{"prompt": prompt} for prompt in prompts])
    completed = dataset.map_batches(
        Completer,
        fn_constructor_args=(ckpt_dir, tokenizer_path, max_gen_len),
        batch_size=block_size,
        compute=ray.data.ActorPoolStrategy(size=concurrency),  # min_size, max_size: Ray starts more while there is work
        num_gpus=num_gpus,  # of each actor, which then sees only its own
    )
    for row in sorted(completed.take_all(), key=lambda row: prompts.index(row["prompt"]))[:: len(ANIMALS)]:
        print(f"{row['prompt']}{row['completion']}.")


if __name__ == "__main__":
    builtin_ckpt_dir, builtin_tokenizer_path = builtin_checkpoint()
    parser = argparse.ArgumentParser(description="Complete texts on several machines or GPUs, with Ray Data.")
    parser.add_argument("--ckpt_dir", default=builtin_ckpt_dir, help="default: the model in the package")
    parser.add_argument("--tokenizer_path", default=None, help="default: the checkpoint's own")
    parser.add_argument("--max_gen_len", type=int, default=40)
    parser.add_argument("--concurrency", type=int, default=2, help="actors, each with a model")
    parser.add_argument("--num_gpus", type=float, default=0, help="GPUs of each actor")
    parser.add_argument("--block_size", type=int, default=9, help="prompts that an actor gets at a time")
    main(**vars(parser.parse_args()))
