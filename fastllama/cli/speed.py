"""The line on stderr that ends what was generated."""

from fastllama.cli.standard_streams import note


def print_speed(n_tokens: int, seconds: float) -> None:
    """Say how many tokens came, in what time."""
    note(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s")
