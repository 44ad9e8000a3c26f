"""What speculation did: how many guesses were checked and were right, and how many tokens a step made."""

from dataclasses import dataclass, fields


@dataclass
class SpeculationStats:
    """Sums over the steps of all rows. A step counts once for each row that it gave tokens."""

    steps: int = 0  # with and without guesses
    tokens: int = 0  # that they made
    checked: int = 0  # guesses that were there to be checked, also beyond the row's last position
    accepted: int = 0  # guesses that were right
    seconds: float = 0.0  # of the steps
    guess_seconds: float = 0.0  # of them for guessing

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a row's step made on average; 1 without speculation."""
        return self.tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> float:
        """The share of the checked guesses that were right."""
        return self.accepted / self.checked if self.checked else 0.0

    @property
    def guessing(self) -> float:
        """The share of the steps' time that went into guessing."""
        return self.guess_seconds / self.seconds if self.seconds else 0.0

    def __sub__(self, earlier: "SpeculationStats") -> "SpeculationStats":
        """What was done since an earlier state of the same sums."""
        return SpeculationStats(*(getattr(self, one.name) - getattr(earlier, one.name) for one in fields(self)))

    def __str__(self) -> str:
        guesses = f"{self.accepted:,} of {self.checked:,} guesses right" if self.checked else "no guesses checked"
        return f"{self.tokens_per_step:.2f} tokens a step, {guesses}, {self.guessing:.1%} of the time guessing"

    def to_json(self) -> dict[str, float]:
        """All numbers, for machines."""
        sums = {one.name: getattr(self, one.name) for one in fields(self)}
        shares = {name: getattr(self, name) for name in ("tokens_per_step", "acceptance", "guessing")}
        return {**sums, **shares}
