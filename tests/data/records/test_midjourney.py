import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vargpt_rl.data.records.midjourney import LONGEST_PROMPT, permutations, split_commands


@pytest.mark.parametrize(
    ("prompt", "text", "commands"),
    [
        ("a red fox", "a red fox", {}),
        ("a red fox --ar 16:9 --v 5", "a red fox", {"ar": "16:9", "v": "5"}),
        ("a fox --aspect 2:3 --version 5.2 --s 750 --c 20", "a fox",
         {"ar": "2:3", "v": "5.2", "stylize": "750", "chaos": "20"}),
        ("a fox --q .5 --tile --niji 5", "a fox", {"quality": ".5", "tile": "", "niji": "5"}),
        ("a fox --niji --style raw", "a fox", {"niji": "", "style": "raw"}),
        ("a fox --no red, blue fur --ar 1:1", "a fox", {"no": "red, blue fur", "ar": "1:1"}),
        ("a fox \u2014ar 3:2 \u2013v 4", "a fox", {"ar": "3:2", "v": "4"}),
        ("a fox --AR 3:2, --V 4, in snow", "a fox in snow", {"ar": "3:2", "v": "4"}),
        ("a fox --s beautiful", "a fox beautiful", {"stylize": ""}),
        ("a fox --ar", "a fox", {"ar": ""}),
        ("a fox --v 4 --v 5", "a fox", {"v": "5"}),
        ("a fox --made-up 5 -v 4", "a fox --made-up 5 -v 4", {}),
        ("hot dog::2 food::-1 --seed 42", "hot dog", {"seed": "42", "no": "food"}),
        ("hot:: dog::.5 --no mud --v 5", "hot dog", {"no": "mud", "v": "5"}),
        ("a fox::2 --no mud sky::-.5", "a fox", {"no": "mud sky::-.5"}),
        ("a fox::--ar 3:2", "a fox", {"ar": "3:2"}),
        ("a fox --p", "a fox", {"p": ""}),
        ("a fox --p abc123 m72", "a fox", {"p": "abc123 m72"}),
        ("a fox --p in snow", "a fox in snow", {"p": ""}),
        ("a fox --profile abc123 --v 7", "a fox", {"p": "abc123", "v": "7"}),
        ("a fox --oref https://a/b.png --ow 100", "a fox", {"oref": "https://a/b.png", "ow": "100"}),
        ("a fox --sref https://a/b.png https://c/d.png::2 77 --sv 4", "a fox",
         {"sref": "https://a/b.png https://c/d.png::2 77", "sv": "4"}),
        ("a fox --sref random --draft", "a fox", {"sref": "random", "draft": ""}),
        ("a fox --sref --v 6.1", "a fox", {"sref": "", "v": "6.1"}),
        ("a fox --exp 10 --raw --motion low --bs 1 --stealth --public --loop", "a fox",
         {"exp": "10", "raw": "", "motion": "low", "bs": "1", "stealth": "", "public": "", "loop": ""}),
        ("a fox --v niji", "a fox", {"v": "niji"}),
        ("a fox --v 6. --s 50.", "a fox", {"v": "6", "stylize": "50"}),
        ("a fox --hd --sd --relax", "a fox", {"hd": "", "sd": "", "relax": ""}),
        ("a fox --sref 12::2 34::1 --sw 80", "a fox", {"sref": "12::2 34::1", "sw": "80"}),
        ("a fox --loop --end https://a/b.png", "a fox", {"loop": "", "end": "https://a/b.png"}),
        ("\u72d0 --ar 16:9\n--v 7", "\u72d0", {"ar": "16:9", "v": "7"}),
        ("https://cdn.discordapp.com/x.png <https://s.mj.run/AbCd> a fox --iw 2", "a fox",
         {"image": "https://cdn.discordapp.com/x.png https://s.mj.run/AbCd", "iw": "2"}),
        ("/imagine prompt: a fox --v 5", "a fox", {"v": "5"}),
        ("/IMAGINE a fox", "a fox", {}),
        ("**a fox --v 5** - <@123456789> (fast)", "a fox", {"v": "5"}),
        ("**a fox** - Upscaled (2x) by <@1> (relaxed)", "a fox", {}),
        ("**a fox**", "a fox", {}),
        ("**a** fox", "**a** fox", {}),
        ("  a \n fox\t--tile ", "a fox", {"tile": ""}),
        ("--ar 1:1", "", {"ar": "1:1"}),
        ("", "", {}),
    ],
)  # fmt: skip
def test_known_prompts(prompt, text, commands):
    assert split_commands(prompt) == (text, commands)


V7 = [
    "--v 7", "--v7", "--v=7", "--V 7.", "--version 7,", "\u2014v 7", "\u2013\u2013v 7", "\u2014-v 7", "\u2212\u2212v 7",
    "\u2011\u2011v 7", "\uff0d\uff0dv 7", "--v\u00a07", "--v\u30007", "\u200b--v 7", "\ufeff--v 7",
    "--v: 7", "--v 7)", "---v 7",
]  # fmt: skip


@pytest.mark.parametrize("written", V7)
@pytest.mark.parametrize("before", ["a fox ", "a fox,", "a fox\n"])
def test_a_command_is_found_however_it_is_typed(before, written):
    assert split_commands(before + written) == (before.strip(), {"v": "7"})


@pytest.mark.parametrize("ratio", ["16:9", "16/9", "16x9", "16\uff1a9", "1.91:1"])
@pytest.mark.parametrize("name", ["--ar ", "--aspect ", "--ar=", "--ar"])
@pytest.mark.parametrize("then", ["", ", --v 6", "--v 6"])
def test_ratios_are_found_however_they_are_typed(name, ratio, then):
    text, commands = split_commands(f"a fox {name}{ratio}{then}")
    assert (text, commands["ar"]) == ("a fox", ratio) and commands.get("v", "6") == "6"


@pytest.mark.parametrize(
    "text",
    ["he ran\u2014stop there", "yes--no way", "a well--known fox", "1914\u201318 and on", "a \u2014 b", "a --- b",
     "-v 4", "rock\u2014video art", "a sign that says www.a.com/b", "imagine a prompt", "{fox}", "fast\u2014fast"],
)  # fmt: skip
def test_dashes_between_words_are_no_commands(text):
    assert split_commands(text) == (text, {})


@pytest.mark.parametrize(
    ("value", "command"),
    [("gqxbwev", "p"), ("gqxbwev m7293847", "p"), ("abcdefg::2 hijklmn", "profile"), ("abc12", "personalize"),
     ("random random", "sref"), ("123 random", "sref"), ("p12 77", "sref"), ("https://a/b.png random::2 5", "sref"),
     ("loop", "end"), ("1,000", "s"), ("20%", "chaos"), ("+5", "exp"), ("7", "niji"), ("6", "sv"), ("400", "ow")],
)  # fmt: skip
def test_values_of_today_are_no_text(value, command):
    text, commands = split_commands(f"a fox --{command} {value} --raw --draft --hd --upanime")
    assert text == "a fox" and value in commands.values() and len(commands) == 5


ADDRESSES = ["https://a/b.png", "HTTPS://A/B.PNG", "Http://a/b", "ftp://a/b",
             "s.mj.run/AbC", "cdn.discordapp.com/attachments/1/x.png", "media.discordapp.net/x",
             "cdn.midjourney.com/x.png"]  # fmt: skip


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("around", ["{}", "<{}>", "({})", '"{}"', "[{}]", "{},", "<{}>,"])
def test_addresses_are_no_text(address, around):
    written = around.format(address)
    assert split_commands(f"{written} a fox --cref {written} --v 7") == (
        "a fox", {"image": address, "cref": address, "v": "7"}
    )  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    ["/imagine prompt:{}", "/imagine prompt {}", "/imagine prompt : {}", "/Imagine\u00a0Prompt: {}", "/imagine {}",
     "/imagine prompt\uff1a{}", "`/imagine prompt: {}`", "```\n/imagine prompt: {}\n```", "imagine prompt: {}",
     "/imagine prompt: /imagine prompt: {}", "**/imagine prompt: {}**", "**{}** - Variations by **Bob**",
     "**{}** \u2013 <@1> (fast)", "**{}** - Image #2 <@1>", "**{}** - by **Bob** (fast)"],
)  # fmt: skip
def test_what_surrounds_a_prompt_is_removed(asked):
    assert split_commands(asked.format("a fox --v 7")) == ("a fox", {"v": "7"})


@pytest.mark.parametrize(
    "piece",
    ["http://a ", "**", "--no ", "::", "a::--", "--no x ", "--sref 1 ", " ", "/imagine ", "1", "a::-1", ": ", "--ar",
     "`", "{", "** - ", "\u2014ar", "<", "--p abcdefg "],
)  # fmt: skip
def test_hostile_prompts_take_no_time(piece):
    began = time.monotonic()
    for prompt in (piece * (LONGEST_PROMPT // len(piece)), "**a**" + piece * (30_000 // len(piece)) + "x"):
        split_commands(prompt)
        with contextlib.suppress(ValueError):
            permutations(prompt)
    assert time.monotonic() - began < 5
    with pytest.raises(ValueError, match="prompt of more than 32768 characters"):
        split_commands(piece * LONGEST_PROMPT + "a")


words = st.lists(
    st.text(alphabet="abcxyz,.:'1", min_size=1, max_size=6).filter(lambda word: "::" not in word), max_size=6
)
number = st.one_of(st.integers(0, 1000), st.floats(0.1, 9.9).map(lambda value: round(value, 1))).map(str)
ratio = st.tuples(st.integers(1, 99), st.integers(1, 99)).map(lambda sides: "{}:{}".format(*sides))
valued = st.fixed_dictionaries(
    {}, optional={"ar": ratio} | dict.fromkeys(("v", "stylize", "chaos", "quality", "seed", "stop", "iw"), number)
)
flags = st.fixed_dictionaries({}, optional=dict.fromkeys(("tile", "hd", "fast", "video"), st.just("")))


@given(words, valued, flags, words, st.randoms(use_true_random=False))
def test_what_is_put_together_is_taken_apart(said, with_value, without, unwanted, random):
    commands = with_value | without
    order = random.sample(sorted(commands), len(commands))
    written = [f"--{name} {commands[name]}".strip() for name in order]
    if unwanted:
        commands["no"] = " ".join(unwanted)
        written.append(f"--no {commands['no']}")
    assert split_commands(" ".join([*said, *written])) == (" ".join(said), commands)


@given(st.text(alphabet="ab -\u2014nosvar:19,\n", max_size=60))
def test_the_text_is_words_of_the_prompt_without_any_command(prompt):
    text, commands = split_commands(prompt)
    assert split_commands(text) == (text, {})
    left = iter(prompt)
    assert all(letter in left for letter in text if letter != " ")  # in the order of the prompt
    assert all(word.rstrip(",") in prompt for value in commands.values() for word in value.split())
    assert commands or "::" in prompt or text == " ".join(prompt.split())


def test_permutations_are_the_prompts_that_they_stand_for():
    assert permutations("a fox") == ["a fox"]
    assert permutations("a {red, blue} fox --ar {3:2, 1:1}") == [
        "a red fox --ar 3:2", "a red fox --ar 1:1", "a blue fox --ar 3:2", "a blue fox --ar 1:1"
    ]  # fmt: skip
    assert permutations("a {red {big, small}, blue} fox") == ["a red big fox", "a blue fox", "a red small fox"]
    assert permutations(r"a {pale\, cold, red} fox, {x\, y}") == ["a pale, cold fox, {x, y}", "a red fox, {x, y}"]
    assert permutations("a {fox} in {} {") == ["a {fox} in {} {"]
    with pytest.raises(ValueError, match="prompt of more than 40 permutations"):
        permutations("{a, b}" * 1000)
    with pytest.raises(ValueError, match="prompt of more than 40 permutations"):
        permutations("{" + "," * 30_000 + "}")
    with pytest.raises(ValueError, match="prompt of more than 32768 characters"):
        permutations("a" * 40_000)
