"""Files of checkpoints that tests read, change and compare.

Those of `tests/golden` are whole; tokenizer files can be made from nothing: byte-level BPE, ChatML,
two ends.
"""

import json
import shutil
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

GOLDEN = Path(__file__).parent / "golden"
CORPUS = [
    "Solve the problem step by step. Close with a line that holds nothing but Answer: and the sum.",
    "What is 12 + 30? Let x = 12, then x + 30 = 42. Answer: 42",
    r"Simplify \frac{1}{2} + \sqrt{4}. It is 5/2, so \boxed{5/2}.",
]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ('user', 'assistant') %}
        {{- raise_exception('no turn of role ' + message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def write_tokenizer(directory: Path, *, template: str | None = CHATML) -> Path:
    """Writes tokenizer.json and its companions; 300 tokens, of which ids 0 to 2 are special."""
    directory.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    write_json(directory / "tokenizer_config.json", config)
    write_json(directory / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0})
    return directory


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def change_json(path: Path, **changes: object) -> None:
    """Sets keys of a JSON object; None takes one away."""
    found = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {name: value for name, value in found.items() if value is not None})


def copied(tmp_path: Path, case: str) -> Path:
    """A golden checkpoint to be changed."""
    return Path(shutil.copytree(GOLDEN / case, tmp_path / "source"))


def files(directory: Path) -> dict[str, bytes]:
    """The content of every file by its name."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}
