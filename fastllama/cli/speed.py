"""The line about speed on stderr after generated text."""

from fastllama.cli.standard_streams import write_stderr


def print_speed(n_tokens: int, seconds: float) -> None:
    """Write the number of tokens, the seconds and the tokens per second to stderr."""
    write_stderr(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s")
