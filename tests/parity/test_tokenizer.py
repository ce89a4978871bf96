"""The same files read by transformers: ids, texts and conversations must be equal."""

import pytest
import transformers

from occ_jax.data.chat import Message
from occ_jax.data.tokenizer import encode_chat, load_tokenizer
from tests.checkpoint_files import CHATML, change_json, write_tokenizer

# Every construct that templates of released checkpoints use: namespaces, macros, loop variables,
# tests, slices, whitespace control, JSON, errors, loop controls.
ELABORATE = """\
{%- macro show(content) %}
    {%- if content is string %}{{ content }}{% else %}{{ content | tojson }}{% endif %}
{%- endmacro %}
{{- bos_token }}
{%- set ns = namespace(last=-1) %}
{%- for message in messages[::-1] %}
    {%- set index = messages | length - 1 - loop.index0 %}
    {%- if message.role == 'user' and ns.last < 0 %}{%- set ns.last = index %}{%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson(indent=2) }}{% endif %}
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
<|im_start|>system
You are {{ 'helpful' if loop.last else "an \\"expert\\"" }}.{{ eos_token }}
    {% elif message.role is not in ['system', 'user', 'assistant'] %}
        {{ raise_exception("role " ~ message.role) }}
    {% endif %}
{{ '<|im_start|>' ~ message.role }}
{{ show(message.content) | trim }}{% if loop.index0 == ns.last %} [last]{% endif %}{{ eos_token }}
    {%- if message.content.startswith('stop') %}{% break %}{% endif %}
{% endfor %}
{% generation %}{{ {'é': [1, 2]} | tojson }}{% endgeneration %}
{%- if add_generation_prompt %}
<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}
{%- endif %}
"""
CONVERSATIONS = (
    [("user", "What is 12 + 30?")],
    [("system", "Be <brief> & 'exact'."), ("user", "  x\n\ny  ")],
    [("user", "1"), ("assistant", "2 <|im_end|> 3"), ("user", "stop é 中文 🙂"), ("user", "4")],
)
TEXTS = (
    "",
    " leading and trailing ",
    "Answer: \\frac{1}{2}\n\n\tx\u00a0y",
    "<|im_start|>user<|im_end|>",
    "é 中文 🙂 \u0301",
)


@pytest.fixture(params=[CHATML, ELABORATE], ids=["chatml", "elaborate"])
def pair(request, tmp_path):
    write_tokenizer(tmp_path, template=request.param)
    change_json(tmp_path / "tokenizer_config.json", bos_token="<|im_start|>")
    return load_tokenizer(tmp_path), transformers.AutoTokenizer.from_pretrained(tmp_path)


def test_texts_and_ids(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    assert ours.vocab_size == len(theirs)
    assert ours.eos_ids[0] == theirs.eos_token_id
    assert ours.pad_id == theirs.pad_token_id


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("turns", CONVERSATIONS, ids=["one", "system", "many"])
def test_conversations(pair, turns, variables, add_generation_prompt):
    ours, theirs = pair
    messages = [Message(*turn) for turn in turns]
    options = {"add_generation_prompt": add_generation_prompt, **variables}
    plain = [message._asdict() for message in messages]
    expected = theirs.apply_chat_template(plain, tokenize=False, **options)
    assert ours.render_chat(messages, **options) == expected
    encoded = theirs.apply_chat_template(plain, tokenize=True, return_dict=False, **options)
    assert encode_chat(ours, messages, **options) == encoded
