"""A byte-level tokenizer with chat tokens and a merge of two line ends, and templates of the two common forms."""

from __future__ import annotations

import json

from hypenet_jax.data.tokenizers import Tokenizer, byte_tokenizer

# "\n\n" is one token, which would reach across the border between a turn's header and what the assistant says.
TWO_LINES, EOS, IM_START, IM_END, THINK, END_THINK = range(256, 262)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's behaviour: reasoning is written after the last question alone, and an empty one where there is none.
REASONING = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {%- set said = m.content.split('</think>')[-1].lstrip('\n') %}
        {%- set thought = '' %}
        {%- if '</think>' in m.content %}
            {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or thought) %}
            {{- '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + said }}
        {%- else %}
            {{- '<|im_start|>assistant\n' + said }}
        {%- endif %}
        {{- '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"""
# No special token ends a turn.
PLAIN = (
    "{% for m in messages %}{{ m.role.upper() + ': ' + (m.content | trim) + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML, eos: str = "<|im_end|>") -> Tokenizer:
    contents = json.loads(byte_tokenizer().json)
    flags = contents["added_tokens"][0]
    words = {"<eos>": EOS, "<|im_start|>": IM_START, "<|im_end|>": IM_END, "<think>": THINK, "</think>": END_THINK}
    contents["added_tokens"] = [
        {**flags, "special": number < THINK, "id": number, "content": word} for word, number in words.items()
    ]
    contents["model"]["vocab"]["ĊĊ"] = TWO_LINES
    contents["model"]["merges"] = [["Ċ", "Ċ"]]
    return Tokenizer(json=json.dumps(contents), eos_id=words[eos], pad_id=words[eos], chat_template=template)
