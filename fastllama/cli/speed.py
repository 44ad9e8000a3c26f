"""The line about speed on stderr after generated text."""

from typing import TYPE_CHECKING, Any

from fastllama.cli.standard_streams import write_stderr

if TYPE_CHECKING:
    from fastllama.speculation_stats import SpeculationStats


def print_speed(n_tokens: int, seconds: float, speculation: "SpeculationStats | None" = None) -> None:
    """Write the number of tokens, the seconds and the tokens per second to stderr, and what speculation did."""
    more = "" if speculation is None else f"; {speculation}"
    write_stderr(f"{n_tokens} tokens in {seconds:.2f} s, {n_tokens / seconds:.1f} tokens/s{more}")


def with_speculation(report: dict[str, Any], speculation: "SpeculationStats | None") -> dict[str, Any]:
    """The object of --json with what speculation did, if it is on."""
    return report if speculation is None else report | {"speculation": speculation.to_json()}
