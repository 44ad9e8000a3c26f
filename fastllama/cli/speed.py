"""The line on stderr that ends what was generated."""

import click


def print_speed(n_tokens: int, seconds: float) -> None:
    """Say how many tokens came, in what time."""
    click.echo(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s", err=True)
