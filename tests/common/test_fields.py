"""Fields read from source agree with the classes."""

import importlib
from dataclasses import fields, is_dataclass

import pytest

from vargpt_rl.cli.images import CHAT, DRAW, EVAL, GENERATE
from vargpt_rl.cli.runs import RUN
from vargpt_rl.cli.tools import CLUSTER, DATA, LAUNCH, MODEL, SERVE
from vargpt_rl.common.fields import class_fields, class_path, dotted_fields, first_sentence
from vargpt_rl.common.settings import dotted

PROGRAMS = [RUN, DRAW, GENERATE, CHAT, EVAL, *DATA, SERVE, *MODEL, LAUNCH, *CLUSTER]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.name)
def test_source_has_the_fields_of_the_class(program):
    for path in program.settings:
        place = class_path(path)
        kind = getattr(importlib.import_module(place.module), place.name)
        assert is_dataclass(kind)
        found = class_fields(place)
        assert set(found) == {field.name for field in fields(kind) if field.init}


@pytest.mark.parametrize("program", [*PROGRAMS], ids=lambda program: program.name)
def test_programs_have_a_main(program):
    assert callable(importlib.import_module(program.module).main)


def test_dotted_keys_are_those_of_a_run():
    from configs.schema import LoopConfig

    found = {key for key, field in dotted_fields(class_path(RUN.settings[0])) if field.group is None}
    assert found == set(dotted(LoopConfig))


def test_defaults_are_as_typed():
    fields_of_a_run = class_fields(class_path("configs.schema:LoopConfig"))
    assert fields_of_a_run["seed"].default == "0" and fields_of_a_run["name"].default == "null"
    assert fields_of_a_run["resolutions"].default == "[128,256]" and fields_of_a_run["at"].default == "{}"
    assert class_fields(class_path("vargpt_rl.generate:GenerateConfig"))["out"].default is None


def test_first_sentence_ends_at_a_full_stop_or_paragraph():
    assert first_sentence("One\nline. Another.\n\nMore.") == "One line."
    assert first_sentence("dpo.beta of eq. 2\n\nMore.") == "dpo.beta of eq."
