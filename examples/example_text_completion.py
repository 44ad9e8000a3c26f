"""Complete texts, with the same calls, defaults and flags as the script of this name in Meta's llama3.

    python examples/example_text_completion.py
    python examples/example_text_completion.py --ckpt_dir Meta-Llama-3-8B \
        --tokenizer_path Meta-Llama-3-8B/tokenizer.model
    torchrun --nproc_per_node 1 examples/example_text_completion.py
"""

import argparse

from fastllama import Llama, builtin_checkpoint

PROMPTS = [
    "Once upon a time, there was a little fox",
    "I believe the meaning of life is",
    "The capital of Italy is",
    "My favourite season is",
]


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 128,
    max_gen_len: int = 64,
    max_batch_size: int = 4,
) -> None:
    """Build a generator and print each prompt with its continuation."""
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    results = generator.text_completion(
        PROMPTS,
        max_gen_len=max_gen_len,
        temperature=temperature,
        top_p=top_p,
    )
    for prompt, result in zip(PROMPTS, results, strict=True):
        print(prompt)
        print(f"> {result['generation']}")
        print("\n==================================\n")


if __name__ == "__main__":
    builtin_ckpt_dir, builtin_tokenizer_path = builtin_checkpoint()
    parser = argparse.ArgumentParser(
        description="Complete a few texts.",
        epilog="Example: python examples/example_text_completion.py --temperature 0",
    )
    parser.add_argument("--ckpt_dir", default=builtin_ckpt_dir, help="default: the model in the package")
    parser.add_argument("--tokenizer_path", default=builtin_tokenizer_path)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--max_seq_len", type=int, default=128)
    parser.add_argument("--max_gen_len", type=int, default=64)
    parser.add_argument("--max_batch_size", type=int, default=4)
    main(**vars(parser.parse_args()))
