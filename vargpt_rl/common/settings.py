"""Checks shared by the settings of all commands."""


def require(settings: object, prefix: str = "", /, **minimum: float) -> None:
    """Raise ValueError, naming the key, unless each named field is None or at least its minimum.

    ``prefix`` is where the settings stand in the configuration: ``require(self, "learner.", keep_last=1)``.
    """
    for key, least in minimum.items():
        value = getattr(settings, key)
        if value is not None and value < least:
            raise ValueError(f"{prefix}{key}={value}: expected {least} or more")
