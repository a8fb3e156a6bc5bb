import pytest

from rewards.remote import TOKEN
from tests.helpers.reward_server import serving


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("served"), 'options={"factor": 2}') as (address, _):
        yield address


@pytest.fixture
def token(monkeypatch):
    monkeypatch.setenv(TOKEN, "secret")
