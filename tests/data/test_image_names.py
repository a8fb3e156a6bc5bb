import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.data.image_names import ImageNames


def names_of(tmp_path, *files: str) -> ImageNames:
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    return ImageNames(tmp_path)


def test_literal_names_win_over_similar_ones(tmp_path):
    names = names_of(tmp_path, "a.png", "A.png", "a.jpg", "sub/a.png", "a.txt")
    assert names.named("a.png") == ["a.png"] and names.named("A.PNG") == ["A.png", "a.png"]
    assert names.named("a.txt") == [] and names.named("../a.png") == []
    assert names.stemmed("a") == ["a.jpg", "a.png", "A.png"] and names.stemmed("sub/A") == ["sub/a.png"]
    assert names.like("a.webp") == ["a.jpg", "a.png", "A.png"] and names.like("") == []


@given(st.text("a\u00e9\u00df\u0130\uac00.-", min_size=1, max_size=8).filter(lambda stem: stem[0] != "."))
def test_every_spelling_of_a_name_finds_its_file(tmp_path_factory, stem):
    folder = tmp_path_factory.mktemp("names")
    file = f"{stem}.png"
    names = names_of(folder, file)
    for form in ("NFC", "NFD"):
        spelt = unicodedata.normalize(form, file)
        assert names.named(spelt) == [file] and names.named(spelt.upper().replace(".PNG", ".png"))[:1] in ([file], [])
        assert names.stemmed(unicodedata.normalize(form, stem)) == [file]


def test_hidden_files_are_no_images(tmp_path):
    assert names_of(tmp_path, ".a.png", "._a.png", "__MACOSX/a.png", "a.png").files == {"a.png"}
