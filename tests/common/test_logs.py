"""The log of a run."""

import logging

from vargpt_rl.common.logs import RECORD, RUN_LOG, end_log, keep_log


def test_a_run_log_has_messages_and_what_the_terminal_shows_otherwise(tmp_path, capsys):
    handler = keep_log(tmp_path)
    logging.getLogger("vargpt_rl.driver").warning("one")
    logging.getLogger("actors").warning("two")
    RECORD.info("three")
    end_log(handler)
    RECORD.info("four")
    lines = (tmp_path / RUN_LOG).read_text().splitlines()
    assert [line.split()[-1] for line in lines] == ["one", "two", "three"]
    assert "three" not in capsys.readouterr().err


def test_a_second_start_adds_to_the_log(tmp_path):
    for word in ("one", "two"):
        handler = keep_log(tmp_path)
        RECORD.info(word)
        end_log(handler)
    assert len((tmp_path / RUN_LOG).read_text().splitlines()) == 2
