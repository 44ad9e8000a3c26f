"""Answer dialogs, with the same calls, defaults and flags as the script of this name in Meta's llama3.

    python examples/example_chat_completion.py
    python examples/example_chat_completion.py --ckpt_dir Meta-Llama-3-8B-Instruct \
        --tokenizer_path Meta-Llama-3-8B-Instruct/tokenizer.model
    torchrun --nproc_per_node 1 examples/example_chat_completion.py
"""

import argparse

from fastllama import Dialog, Llama, builtin_checkpoint

DIALOGS: list[Dialog] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "user", "content": "What is the capital of Italy?"},
        {"role": "assistant", "content": "The capital of Italy is Rome."},
        {"role": "user", "content": "And of Spain?"},
    ],
    [
        {"role": "system", "content": "Always answer with a haiku."},
        {"role": "user", "content": "What is the sea like?"},
    ],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "Who are you?"},
    ],
]


def main(
    ckpt_dir: str,
    tokenizer_path: str,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_batch_size: int = 4,
    max_gen_len: int | None = None,
) -> None:
    """Build a generator and print each dialog with its answer. max_gen_len None means up to the context's end."""
    generator = Llama.build(
        ckpt_dir=ckpt_dir,
        tokenizer_path=tokenizer_path,
        max_seq_len=max_seq_len,
        max_batch_size=max_batch_size,
    )
    results = generator.chat_completion(
        DIALOGS,
        max_gen_len=max_gen_len,
        temperature=temperature,
        top_p=top_p,
    )
    for dialog, result in zip(DIALOGS, results, strict=True):
        for message in dialog:
            print(f"{message['role'].capitalize()}: {message['content']}\n")
        answer = result["generation"]
        print(f"> {answer['role'].capitalize()}: {answer['content']}")
        print("\n==================================\n")


if __name__ == "__main__":
    builtin_ckpt_dir, builtin_tokenizer_path = builtin_checkpoint()
    parser = argparse.ArgumentParser(
        description="Answer a few dialogs.",
        epilog="Example: python examples/example_chat_completion.py --temperature 0",
    )
    parser.add_argument("--ckpt_dir", default=builtin_ckpt_dir, help="default: the model in the package")
    parser.add_argument("--tokenizer_path", default=builtin_tokenizer_path)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--max_batch_size", type=int, default=4)
    parser.add_argument("--max_gen_len", type=int, default=None)
    main(**vars(parser.parse_args()))
