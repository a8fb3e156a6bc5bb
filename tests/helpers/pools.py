"""Stand-ins for the rollout pool, without workers."""

from collections.abc import Callable


class FakePool:
    """Has ``run`` call this object's own method of the same name, once for all items."""

    def run(self, method: Callable, items: list, *args, batch_size: int | None = None) -> list:
        return getattr(self, method.__name__)(items, *args)
