from learners.methods import ONLINE
from vargpt_rl.evaluate.wording import MOMENTS


def test_every_online_method_has_its_title_and_its_place():
    online = {f"after_{name}": method.title for name, method in ONLINE.items()}
    assert list(MOMENTS.items())[-len(online) :] == list(online.items())
