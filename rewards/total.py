"""The value that a weighted sum of rewards gives an image."""


class Total(float):
    """A weighted sum of rewards; ``terms`` holds the scored ones by name."""

    terms: dict[str, float]

    def __new__(cls, value: float, terms: dict[str, float]):
        self = super().__new__(cls, value)
        self.terms = terms
        return self

    def __getnewargs__(self) -> tuple[float, dict[str, float]]:  # type: ignore[override]  # __new__ takes two here
        return float(self), self.terms
