"""A tokenizer like Qwen2.5-VL's and the tiny model's, their templates, and the parts of messages."""

from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from hawk_trt.bundle import SpecialTokens
from hawk_trt.inputs.tokenizer import ChatTokenizer
from hawk_trt.inputs.turns import VisualItem
from hawk_trt.models.family import TokenRun

TINY = Path(__file__).parents[1] / "examples" / "tiny-vlm"
TINY_TEMPLATE = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>"),
)
# The features of Qwen2.5-VL's template: counters in a namespace, numbered pictures on request, a video branch.
VL_TEMPLATE = """\
{% set images = namespace(value=0) %}{% set videos = namespace(value=0) %}
{% for message in messages %}
{% if loop.first and message.role != 'system' %}
{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}
{%- endif %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
    {% for item in message['content'] %}
        {% if item['type'] == 'image' or 'image' in item %}
            {% set images.value = images.value + 1 %}
            {%- if add_vision_id %}Picture {{ images.value }}: {% endif -%}
            <|vision_start|><|image_pad|><|vision_end|>
            {%- elif item['type'] == 'video' or 'video' in item %}
            {% set videos.value = videos.value + 1 %}
            {%- if add_vision_id %}Video {{ videos.value }}: {% endif -%}
            <|vision_start|><|video_pad|><|vision_end|>
            {%- elif 'text' in item %}{{- item.text -}}{% endif %}
    {%- endfor %}
{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def special_tokens(tokenizer_json):
    tokenizer = Tokenizer.from_str(tokenizer_json)
    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>")
    ids = [tokenizer.token_to_id(name) for name in (*names, "<|endoftext|>")]
    return SpecialTokens(*ids, eos=(tokenizer.token_to_id("<|im_end|>"),))


def qwen_like_tokenizer_json():
    """A small tokenizer with all that Qwen2.5's has: NFC, its splitting, byte-level BPE, <tool_call> not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    split = words + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    corpus = ["user\n\nWhat colour is the ring?\n\nassistant system You are a helpful assistant. <|im_start|> <|image"]
    tokenizer.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("</tool_call>", normalized=False)])
    return tokenizer.to_str()


TOKENIZERS = {"tiny": (TINY / "tokenizer.json").read_text(encoding="utf-8"), "qwen-like": qwen_like_tokenizer_json()}


def chat_tokenizer(tokenizer_json=TOKENIZERS["tiny"], template=VL_TEMPLATE, config=None):
    config = {"eos_token": "<|im_end|>"} if config is None else config
    return ChatTokenizer(tokenizer_json, config, template, special_tokens(tokenizer_json))


def ids_of(tokenizer, *prompt, **sources):
    """Of a prompt, with one placeholder for each image and video: int64 [seq_len]."""
    parts = tokenizer.encode(*prompt, **sources)
    kinds = {kind: token for token, kind in tokenizer._placeholders.items()}
    return tokenizer.expand(parts, [[TokenRun(kinds[item.kind])] for item in visual_items(parts)])


def visual_items(parts):
    """The images and videos of an encoded prompt."""
    return [part for part in parts if isinstance(part, VisualItem)]


def user(*parts):
    return {"role": "user", "content": list(parts)}


def text(value):
    return {"type": "text", "text": value}


IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4", "fps": 2}
SHARED = chat_tokenizer()
SPECIAL_IDS = np.array([SHARED.tokenizer.token_to_id(token) for token in SPECIAL])
