import pytest

from vargpt_rl.common.errors import first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a\nb"), "a"),
        (ValueError("\n  a \n"), "a"),
        (EOFError(), "EOFError"),
        (OSError(" \n"), "OSError"),
    ],
)
def test_first_line_of_an_error_is_never_blank(error, line):
    assert first_line(error) == line
