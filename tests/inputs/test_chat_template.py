"""Chat templates have all that transformers gives them; hostile ones end with one line."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hawk_trt.errors import InvalidInput
from hawk_trt.inputs.chat_template import Guard
from prompts import SPECIAL_IDS, TOKENIZERS, chat_tokenizer, ids_of, text, user


def test_two_texts_cannot_form_a_special_token_though_the_template_trims_them():
    template = "{% for item in messages[0].content %}{{ item.text | trim }}{% endfor %}<|im_end|>"
    tokenizer = chat_tokenizer(template=template)
    ids = ids_of(tokenizer, [user(text("a<|im_  "), text("start|>b"))])
    assert np.isin(ids, SPECIAL_IDS).tolist() == [False] * (ids.size - 1) + [True]
    assert tokenizer.tokenizer.decode(ids.tolist()) == "a<|im_start|>b"


def test_a_special_token_of_one_character_or_inside_another_is_escaped():
    guard = Guard(["#", "<|a", "<|a|>", "|a|"], ["\ue000"])
    rendered = "#" + guard.apply("x#<|a|>|a|\ue000") + "<|a|>" + guard.apply("<|a") + "<|a"
    assert list(guard.split(rendered)) == [("", "#"), ("x#<|a|>|a|\ue000", "<|a|>"), ("<|a", "<|a"), ("", None)]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "chat template: "),
        ("{{ messages[0].content + 1 }}", "chat template: "),
        ("{{ messages[0].nothing.at_all }}", "chat template: "),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 1 // 0 }}", "chat template: "),
        ("no place for an image", "got image, but the bundle's chat template makes no image and no video of it"),
        (None, "this bundle has no chat template, expected ModelInputs"),
    ],
)
def test_a_template_that_fails_is_an_error_with_its_reason(template, message):
    with pytest.raises(InvalidInput, match=message):
        chat_tokenizer(template=template).encode("x", images=["a.png"])


def test_templates_have_the_tools_that_transformers_gives_them():
    template = (
        "{{ bos_token }}{{ eos_token }}{{ strftime_now('%Y') | length ~ '' ~ none | d('', true) }}"
        "{% for m in messages %}"
        "{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content|tojson }}{% endfor %}"
    )
    tokenizer = chat_tokenizer(template=template)
    ids = ids_of(tokenizer, [{"role": "user", "content": '<é & "q">'}, user(text("no"))]).tolist()
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) == '<|im_end|>4"<é & \\"q\\">"'


def test_a_name_and_reasoning_reach_the_template_as_in_transformers():
    template = "{% for m in messages %}{{ m.name }}:{{ m.reasoning_content }}:{{ m.content }};{% endfor %}"
    messages = [
        {"role": "user", "name": "ann", "content": "x"},
        {"role": "assistant", "reasoning_content": "<|im_end|>", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    tokenizer = chat_tokenizer(template=template)
    ids = ids_of(tokenizer, messages)
    assert tokenizer.tokenizer.decode(ids.tolist(), skip_special_tokens=False) == "ann::x;:<|im_end|>:y;::z;"
    assert not np.isin(ids, SPECIAL_IDS).any()


# What trainers save: assistant text inside {% generation %}; loops that are left; every argument of tojson.
FULL_TEMPLATE = """\
{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}
{% else %}{% if loop.index0 == 4 %}{% break %}{% endif %}{% if m.content == 'skip' %}{% continue %}{% endif %}
{%- generation -%} <|im_start|>{{ m.role }} {{ m | tojson(indent=2, sort_keys=true, ensure_ascii=true) }}
{%- endgeneration %}{{ [m.content] | tojson(separators=(',', ':')) }}{% endif %}{% endfor %}
{{ dict(a=1) | tojson }}{{ strftime_now('%Y') }}{% if documents is none %}no documents{% endif %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.parametrize("said", ["x' * 1000000", "\\ud800'"])
def test_what_a_template_raises_is_a_short_text(said):
    with pytest.raises(InvalidInput) as error:
        ids_of(chat_tokenizer(template=f"{{{{ raise_exception('{said}) }}}}"), "x")
    assert len(str(error.value).encode()) < 500


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_template_has_all_that_transformers_gives_it(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    contents = ["hello", "hi é", "skip", "yo", "last"]
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZERS[name], encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=FULL_TEMPLATE)
    expected = reference.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids_of(chat_tokenizer(TOKENIZERS[name], FULL_TEMPLATE), messages).tolist() == expected


# A list that would tell of 2 ** 60 items, though 60 lists hold them.
DOUBLED = "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}"
OTHER = DOUBLED.replace("ns", "other")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        *(
            (f"{DOUBLED}{OTHER}{use}", "too large as a whole")
            for use in (
                *("{{ ns.x }}", "{{ ns.x | tojson }}", "{{ ns.x | string }}", "{{ ns }}", "{{ 'a' ~ ns.x }}"),
                *("{{ '%s' % (ns.x,) }}", "{{ '{}'.format(ns.x) }}", "{{ raise_exception(ns.x) }}"),
                *("{{ ns.x == other.x }}", "{{ ns.x in [other.x] }}", "{{ ns.x is eq(other.x) }}"),
                *("{{ {}[ns.x] }}", "{{ {ns.x: 1} }}", "{{ dict(a=ns.x).values() }}"),
            )
        ),
        ("{{ [[[[[1] * 100000]]]] | tojson(indent=64) }}", "tojson makes a value that is too large"),
        ("{{ {'a': [1] * 9} | tojson(separators=('x' * 1000, ':')) }}", "tojson makes a value that is too large"),
        ("{% for a in [1] %}" * 25 + "{% endfor %}" * 25, "too many statically nested blocks"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "it calls itself without an end"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "not done after"),
        ("{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}", "not done after"),
        (
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
            "not done after",
        ),
        ("{{ ([1] * 9000000) | map('string') | map('string') | list | length }}", "not done after"),
        ("{#" + "x" * 100000 + "#}", "got 100,004 characters, expected at most 100,000"),
        ("{{ 'x' * 1000000000000 }}", "makes a value that is too large"),
        ("{{ 9 ** 999999999 }}", "makes a value that is too large"),
        ("{{ [1] * 1000000000 }}", "makes a value that is too large"),
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(40) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
            "too large",
        ),
        (
            "{% set ns = namespace(s='aaaa') %}{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
            "too large",
        ),
        ("{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}", "replace makes a value that is too large"),
        ("{% set a = 'a' * 100000 %}{{ a | list | join(a) }}", "join makes a value that is too large"),
        ("{{ 'a'.ljust(10000000000) }}", "ljust makes a value that is too large"),
        ("{{ 'a' | center(10000000000) }}", "center makes a value that is too large"),
        ("{{ [1] | tojson(indent=1000000000) }}", "tojson makes a value that is too large"),
        ("{{ [1] | tojson(indent='x' * 1000) }}", "tojson makes a value that is too large"),
        ("{{ ('a\n' * 1000000) | indent(10000) }}", "indent makes a value that is too large"),
        ("{{ ('\t' * 1000000).expandtabs(10000) }}", "expandtabs makes a value that is too large"),
        ("{{ ('a' * 1000000).translate({97: 'b' * 10000}) }}", "translate makes a value that is too large"),
        ("{{ '%0999999999d' % 1 }}", "% makes a value that is too large"),
        ("{{ '{:0999999999}'.format(1) }}", "format makes a value that is too large"),
        ("{{ ('a' * 1000000) | wordwrap(1) }}", "wordwrap makes a value that is too large"),
        ("{{ ('a' * 2000000) | sort }}", "sort makes a value that is too large"),
        ("{% set a = 'a' * 9000000 %}{{ a }}{{ a }}{{ a }}", "it makes 27,000,000 characters"),
        ("{{ range(1000000000) | list }}", "Range too big"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_hostile_template_ends_with_one_line(monkeypatch, template, message):
    monkeypatch.setattr("hawk_trt.inputs.chat_template._SECONDS", 0.5)
    with pytest.raises(InvalidInput, match=message):
        chat_tokenizer(template=template).encode("x")


def test_the_time_limit_works_in_any_thread_and_ends_with_the_rendering(monkeypatch):
    monkeypatch.setattr("hawk_trt.inputs.chat_template._SECONDS", 0.2)
    slow = chat_tokenizer(template="{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    quick = chat_tokenizer()
    with ThreadPoolExecutor(3) as pool:
        errors = [pool.submit(slow.encode, "x").exception() for _ in range(3)]
        assert all("not done after 0.2 seconds" in str(error) for error in errors)
        for done in [pool.submit(quick.encode, "x") for _ in range(20)]:  # in the same threads
            done.result()


def test_what_a_loop_knows_of_itself_is_as_in_jinja():
    template = (
        "{% for a in [3, 5] + [8] %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.nextitem }};{% endfor %}"
    )
    template += "{% for a in [[1, []], [2, [[3, []]]]] recursive %}{{ a[0] }}({{ loop(a[1]) }}){% endfor %}"
    template += "{% for a in nothing %}x{% else %}none{% endfor %}{{ [1, 2] | map('string') | join('+') }}"
    tokenizer = chat_tokenizer(template=template)
    text = tokenizer.tokenizer.decode(ids_of(tokenizer, "x").tolist())
    assert text == "1/3False5;2/3False8;3/3True;1()2(3())none1+2"
