"""Checkpoints' tokenizers and chat templates, from their files alone, against hand-made ones."""

import datetime
import json

import pytest
import tokenizers
from hypothesis import given, strategies as st

from occ_jax.config import ModelConfig
from occ_jax.data.chat import Message
from occ_jax.data.tokenizer import (
    DIGITS,
    decode_completion,
    encode_chat,
    load_tokenizer,
    model_tokenizer,
    until_end,
)
from occ_jax.errors import UserError
from tests.checkpoint_files import GOLDEN, change_json, write_json, write_tokenizer

USER = Message("user", " What is 12 + 30? ")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("checkpoint")))


def with_template(directory, template):
    return load_tokenizer(write_tokenizer(directory, template=template))


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_text_survives_the_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


def test_special_tokens_are_read_where_spelled_and_never_added(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [2]
    assert not set(tokenizer.encode("Answer: 42")) & {0, 1, 2}
    assert tokenizer.decode([0, *tokenizer.encode("42"), 2]) == "<|endoftext|>42<|im_end|>"


def test_ids_without_a_token_show_as_replacement_characters(tokenizer):
    four, beyond = tokenizer.encode("4"), tokenizer.vocab_size
    assert tokenizer.decode([beyond, *four, beyond + 7, beyond, *four]) == "\ufffd4\ufffd\ufffd4"
    assert tokenizer.decode([]) == ""


def test_any_listed_end_ends_a_completion(tokenizer):
    assert tokenizer.eos_ids == (2, 0)
    assert tokenizer.pad_id == 0
    four = tokenizer.encode("4")
    for end in tokenizer.eos_ids:
        assert until_end(tokenizer, [*four, end, *four]) == (four, True)
        assert decode_completion(tokenizer, [*four, end, *four]) == "4"
    assert until_end(tokenizer, [*four, 1]) == ([*four, 1], False)


@pytest.mark.parametrize(
    ("tokenizer_config", "generation_config", "config", "expected"),
    [
        ({}, {"eos_token_id": 0}, {"eos_token_id": 1}, (2, 0)),
        ({}, {"eos_token_id": None}, {"eos_token_id": [1, 2]}, (2, 1)),
        ({"eos_token": None}, {"eos_token_id": [0, 2]}, {}, (0, 2)),
        ({"eos_token": {"content": "<|im_start|>", "special": True}}, {}, {}, (1, 2, 0)),
    ],
)
def test_ends_come_from_the_checkpoints_files(
    tmp_path, tokenizer_config, generation_config, config, expected
):
    write_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", **tokenizer_config)
    change_json(tmp_path / "generation_config.json", **generation_config)
    write_json(tmp_path / "config.json", config)
    assert load_tokenizer(tmp_path).eos_ids == expected


def test_special_tokens_may_stand_in_a_file_of_their_own(tmp_path):
    write_tokenizer(tmp_path, template="{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}")
    change_json(tmp_path / "tokenizer_config.json", eos_token=None)
    write_json(
        tmp_path / "special_tokens_map.json",
        {"eos_token": "<|endoftext|>", "bos_token": {"content": "<|im_start|>"}},
    )
    found = load_tokenizer(tmp_path)
    assert found.eos_ids == (0, 2)
    assert found.render_chat([Message("user", "hi")]) == "<|im_start|>hi<|endoftext|>"


def test_tokens_that_only_the_configuration_lists_are_added(tmp_path):
    write_tokenizer(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    listed = {str(size): {"content": "<think>", "special": False}, "1": {"content": "<|im_start|>"}}
    other = write_tokenizer(tmp_path / "other")
    change_json(other / "tokenizer_config.json", added_tokens_decoder=listed)
    found = load_tokenizer(other)
    assert found.encode("<think>") == [size]
    assert found.vocab_size == size + 1


def test_a_checkpoints_truncation_and_padding_are_switched_off(tmp_path):
    write_tokenizer(tmp_path)
    path = str(tmp_path / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(path)
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(path)
    text = "What is 12 + 30?"
    assert load_tokenizer(tmp_path).decode(load_tokenizer(tmp_path).encode(text)) == text


# Chat templates.


def test_a_conversation_by_hand(tokenizer):
    turn = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n"
    assert tokenizer.render_chat([USER]) == turn + "<|im_start|>assistant\n"
    assert tokenizer.render_chat([USER], add_generation_prompt=False) == turn
    system = Message("system", "Be brief.")
    assert tokenizer.render_chat([system, USER]).startswith(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    )
    ids = encode_chat(tokenizer, [USER])
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == turn + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    "checkpoint",
    sorted(path.parent for path in GOLDEN.glob("*/tokenizer.json")),
    ids=lambda path: path.name,
)
def test_a_conversation_as_transformers_renders_it(checkpoint):
    golden = json.loads((GOLDEN / "chat.json").read_text())
    messages = [Message(**message) for message in golden["messages"]]
    found = load_tokenizer(checkpoint)
    assert found.render_chat(messages) == golden["text"]
    assert encode_chat(found, messages) == golden["ids"]
    assert found.decode(golden["ids"]) == golden["text"]


def test_variables_reach_the_template(tokenizer):
    text = tokenizer.decode(encode_chat(tokenizer, [USER], enable_thinking=False))
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_the_template_file_goes_before_the_configuration(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages | length }} turns")
    assert load_tokenizer(tmp_path).render_chat([USER]) == "1 turns"


def test_of_several_templates_the_default_is_taken(tmp_path):
    named = [
        {"name": "tool_use", "template": "tools"},
        {"name": "default", "template": "plain"},
    ]
    assert with_template(tmp_path, named).render_chat([USER]) == "plain"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        # Blocks leave neither their line end nor their indentation behind.
        ("{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}", "x\n"),
        # JSON for models, not for web pages.
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 2,\n "b": 1\n}'),
        ("{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}", "1"),
        ("{% generation %}said{% endgeneration %}.", "said."),
        ("{{ tools is none }} {{ documents is none }}", "True True"),
        ("{{ messages[0].role }} {{ messages[0]['role'] }}", "user user"),
    ],
)
def test_templates_find_what_they_are_written_for(tmp_path, template, expected):
    assert with_template(tmp_path, template).render_chat([USER]) == expected


def test_templates_know_the_day(tmp_path):
    days = {datetime.date.today().isoformat()}
    said = with_template(tmp_path, "{{ strftime_now('%Y-%m-%d') }}").render_chat([USER])
    assert said in days | {datetime.date.today().isoformat()}  # midnight may pass in between


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ raise_exception('not today') }}",
        "{{ messages[0].content + 1 }}",
    ],
)
def test_a_template_that_fails_gets_one_line(tmp_path, template):
    found = with_template(tmp_path, template)
    with pytest.raises(UserError, match="refuses a conversation of roles user") as caught:
        found.render_chat([USER])
    assert "\n" not in str(caught.value)


def test_a_template_says_what_it_refuses(tokenizer):
    with pytest.raises(UserError, match="refuses a conversation of roles tool: no turn of role"):
        tokenizer.render_chat([Message("tool", "42")])


def test_a_template_is_missed_only_where_one_is_needed(tmp_path):
    found = with_template(tmp_path, None)
    assert found.decode(found.encode("12")) == "12"
    with pytest.raises(UserError, match=r"holds no chat template .* set dataset.chat to False"):
        encode_chat(found, [USER])
    with pytest.raises(UserError, match="digit tasks' alphabet has no chat template"):
        encode_chat(DIGITS, [USER])


# Mistakes.


def damaged(name, text):
    return lambda directory: (directory / name).write_text(text)


def changed(name, **changes):
    return lambda directory: change_json(directory / name, **changes)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda directory: (directory / "tokenizer.json").unlink(), "holds no tokenizer.json"),
        (damaged("tokenizer.json", '{"version": "1.0", "mod'), "tokenizer.json is damaged"),
        (damaged("tokenizer.json", "{}"), "tokenizer.json is damaged"),
        (damaged("tokenizer_config.json", "{"), "tokenizer_config.json is damaged"),
        (damaged("generation_config.json", "[1]"), "it holds a list, not an object"),
        (
            changed("tokenizer_config.json", eos_token="<end>"),
            "tokenizer.json has no token '<end>'",
        ),
        (
            changed("tokenizer_config.json", added_tokens_decoder={"9": {"content": "<|im_end|>"}}),
            "gives '<|im_end|>' the id 9, tokenizer.json 2",
        ),
        (changed("tokenizer_config.json", chat_template="{% if %}"), "is no valid program: line 1"),
        (damaged("chat_template.jinja", "a\n{% endfor %}"), "is no valid program: line 2"),
    ],
)
def test_damaged_files_get_one_line_that_names_them(tmp_path, break_it, said):
    write_tokenizer(tmp_path)
    break_it(tmp_path)
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert said in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_without_an_end_is_refused(tmp_path):
    write_tokenizer(tmp_path)
    change_json(tmp_path / "tokenizer_config.json", eos_token=None)
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(UserError, match="names an end-of-sequence token"):
        load_tokenizer(tmp_path)


def test_the_models_checkpoint_decides(tmp_path):
    assert model_tokenizer(ModelConfig()) is DIGITS
    write_tokenizer(tmp_path)
    found = model_tokenizer(ModelConfig(checkpoint=str(tmp_path)))
    assert found.render_chat([USER]) == load_tokenizer(tmp_path).render_chat([USER])
