"""The tokenizer every tiny checkpoint carries: byte-level BPE of 60 tokens, with a chat template.

Owns: tokenizer.json, tokenizer_config.json, generation_config.json and, where the family ships it
apart, chat_template.jinja.
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.parity.families import END_OF_TEXT, IM_END, IM_START

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Bytes outside this alphabet have no token: 256 byte tokens would make every logits fixture large.
_ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789+=>,.?:- \n"
_CORPUS = ["user\nwhat is the sum 12+34=?\nassistant\nthe sum of the two is 46.\n"] * 4


def make_tokenizer() -> Tokenizer:
    """Trains the tokenizer; digits are single tokens, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    visible = _ALPHABET.replace(" ", "Ġ").replace("\n", "Ċ")
    trainer = trainers.BpeTrainer(
        vocab_size=END_OF_TEXT, initial_alphabet=list(visible), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert tokenizer.token_to_id("<|endoftext|>") == END_OF_TEXT
    assert tokenizer.token_to_id("<|im_start|>") == IM_START
    assert tokenizer.token_to_id("<|im_end|>") == IM_END
    return tokenizer


def write_tokenizer(directory: Path, eos_token_ids: list[int], template_apart: bool) -> None:
    """Writes the tokenizer's files and generation_config.json.

    Args:
        directory: the checkpoint's.
        eos_token_ids: what ends a generation, in generation_config.json.
        template_apart: the chat template as chat_template.jinja (GLM-4.5, Qwen3.5) instead of a
            key of tokenizer_config.json.
    """
    make_tokenizer().save(str(directory / "tokenizer.json"))
    settings: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": 131072,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    if template_apart:
        (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    else:
        settings["chat_template"] = CHAT_TEMPLATE
    _write_json(directory / "tokenizer_config.json", settings)
    _write_json(
        directory / "generation_config.json",
        {"do_sample": True, "eos_token_id": eos_token_ids, "pad_token_id": END_OF_TEXT},
    )


def _write_json(path: Path, contents: dict[str, object]) -> None:
    path.write_text(json.dumps(contents, indent=2) + "\n")
