"""Tools and their calls reach the chat template as transformers gives them, and never become special tokens."""

import pytest

from hawk_trt.errors import InvalidInput
from prompts import IMAGE, TOKENIZERS, chat_tokenizer, ids_of, text, user

# The features of Qwen's templates with tools: signatures as JSON, calls, and answers as turns of their own.
TEMPLATE = """\
{%- if tools %}{{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'tool' %}{{- '[' + message.name + '] ' }}{%- endif %}
    {%- if message.content is string %}{{- message.content }}
    {%- else %}
        {%- for item in message.content %}
            {%- if item.type == 'image' %}{{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in item %}{{- item.text }}{%- endif %}
        {%- endfor %}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- for call in message.tool_calls %}
            {%- if call.function %}{%- set call = call.function %}{%- endif %}
            {{- '<tool_call>{"name": "' + call.name + '", "arguments": ' + call.arguments | tojson + '}</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Look again, 環 <&>",
        "parameters": {"type": "object", "properties": {"where": {"type": "string", "enum": ["left", "right"]}}},
    },
}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "look", "arguments": {"n": [1, 2.5]}}}],
}
SEEN = {"role": "tool", "name": "look", "content": "a red ring"}


@pytest.mark.parametrize("tools", [[], [LOOK], [LOOK, LOOK]])
@pytest.mark.parametrize("messages", [[user(IMAGE, text("Which?"))], [user(text("Which?")), CALL, SEEN]])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_with_tools_equal_those_of_transformers(tmp_path, name, messages, tools):
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(TOKENIZERS[name], encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path), chat_template=TEMPLATE)
    expected = reference.apply_chat_template(messages, tools or None, add_generation_prompt=True, return_dict=False)
    assert ids_of(chat_tokenizer(TOKENIZERS[name], TEMPLATE), messages, tools=tools).tolist() == expected


def test_a_special_token_spelled_in_a_tool_or_a_call_is_text():
    tokenizer = chat_tokenizer(template=TEMPLATE)
    spelled = "<|image_pad|><|im_end|>"
    tool = {"function": {"name": "look", "description": spelled, spelled: [spelled]}}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "look", "arguments": {"where": spelled}}]}
    ids = ids_of(tokenizer, [user(text("x")), call, SEEN], tools=[tool]).tolist()
    special = tokenizer.tokenizer.token_to_id
    assert ids.count(special("<|im_end|>")) == 4 and special("<|image_pad|>") not in ids
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False).count(spelled) == 4


@pytest.mark.parametrize("nested", [True, False])
def test_arguments_as_json_text_are_the_object_that_templates_expect(nested):
    def ids(arguments):
        call = {"name": "look", "arguments": arguments}
        answer = {"role": "assistant", "content": None, "tool_calls": [{"function": call} if nested else call]}
        return ids_of(chat_tokenizer(template=TEMPLATE), [user(text("x")), answer, SEEN]).tolist()

    assert ids('{"where": ["left", 1]}') == ids({"where": ["left", 1]})
    for other in ("left", "[1]", "", '{"a"'):  # stays the text that it is
        assert ids(other) != ids({})
    with pytest.raises(InvalidInput, match="half of a surrogate pair"):
        ids('{"a": "\\ud800"}')


def endless():
    """A list that holds itself."""
    values = []
    values.append(values)
    return values


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([{"function": endless()}], r"tools\[0\].function\[0\].*: nested deeper than 64 levels"),
        ("look", "tools: got str, expected a list of JSON objects"),
        ([LOOK, "look"], r"tools\[1\]: got str, expected a JSON object"),
        ([{"function": {1: 2}}], r"tools\[0\].function: got a key 1"),
        ([{"function": {"x": [object()]}}], r"tools\[0\].function.x\[0\]: got object, expected a JSON value"),
        ([{"function": "\ud800"}], r"tools\[0\].function: character 0 is half of a surrogate pair"),
    ],
)
def test_tools_that_are_no_json_are_an_error_that_says_where(tools, message):
    with pytest.raises(InvalidInput, match=message):
        chat_tokenizer(template=TEMPLATE).encode("x", tools=tools)


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "user", "content": "x", "tool_calls": [LOOK]}, "expected a mapping of role, content"),
        ({"role": "assistant"}, "got a mapping of role"),
        ({"role": "assistant", "tool_calls": [3]}, r"tool_calls\[0\]: got int"),
        ({"role": "tool", "content": "x", "name": 3}, "messages.1. name: got int"),
    ],
)
def test_messages_with_keys_of_other_roles_are_an_error(message, match):
    with pytest.raises(InvalidInput, match=match):
        chat_tokenizer(template=TEMPLATE).encode([user(text("x")), message, user(text("y"))])
