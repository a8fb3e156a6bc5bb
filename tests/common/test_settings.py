"""Checks shared by the settings of all commands."""

from types import SimpleNamespace

import pytest

from vargpt_rl.common.settings import require


def test_fields_below_their_minimum_are_named():
    settings = SimpleNamespace(workers=0, block=1, limit=None)
    require(settings, workers=0, block=1, limit=1)
    with pytest.raises(ValueError, match=r"^data\.workers=0: expected 1 or more$"):
        require(settings, "data.", block=1, workers=1)
