"""Writes the fixtures with which the default suite checks parity without torch.

    .venv-parity/bin/python -m tests.parity.make_golden

`tests/golden/` holds, for one or two cases a family, the checkpoint directory and beside it an .npz
of what transformers computes from it:

    tokens [B, T], lengths [B]   right-padded input, the padding random tokens
    logits [B, T, V], hidden [B, T, D] after the final norm, pre_norm [B, T, D] before it
    mtp_logits_1 [B, T-1, V], mtp_logits_2 [B, T-2, V]   the second recursed, or of module 2
    mtp_logits_{1,2}_post_norm   MiMo's other reading of the trunk's hidden state
    completions [B, N]   greedy, from the first lengths[b] tokens of each row

with zeros at and beyond a row's length, and chat.json: a conversation as transformers' chat
template renders and encodes it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import transformers

from tests.parity.checkpoints import write_checkpoint
from tests.parity.families import CASES, Case
from tests.parity.reference import greedy, load, run

GOLDEN = Path(__file__).parents[1] / "golden"
GOLDEN_CASES = (
    "qwen2_tied",
    "qwen3_tied",
    "mimo",
    "glm_air",
    "glm",
    "deepseek",
    "deepseek_fp8_small_blocks",
    "qwen3_next",
    "qwen3_5",
    "qwen3_5_moe",
)
MESSAGES = [
    {"role": "user", "content": "what is 12+34?"},
    {"role": "assistant", "content": "12+34=46."},
    {"role": "user", "content": "and 46+7?"},
]
_SMALLEST_GAP = 1e-3
"""Between the best two logits of a greedy step, far above the rounding of float32."""


def example_batch(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [3, 10] and lengths [3] for a case's parity."""
    rng = np.random.default_rng([7, seed])
    return rng.integers(0, 60, (3, 10), dtype=np.int32), np.array([10, 7, 4], np.int32)


def expected(directory: Path, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a golden .npz, computed by transformers from a checkpoint directory."""
    reference = load(directory)
    tokens, lengths = example_batch(seed)
    outputs = run(reference, tokens, lengths)
    completions, gap = greedy(reference, tokens, lengths, steps=6)
    assert gap > _SMALLEST_GAP, f"{directory.name}: near-tie of {gap}, change its seed"
    arrays = {
        "tokens": tokens,
        "lengths": lengths,
        "logits": outputs.logits,
        "hidden": outputs.hidden,
        "pre_norm": outputs.pre_norm,
        "completions": completions.astype(np.int32),
    }
    arrays |= {f"mtp_logits_{k + 1}": array for k, array in enumerate(outputs.mtp_logits)}
    if reference.config["model_type"] == "mimo":
        other = run(reference, tokens, lengths, trunk_hidden="post_norm").mtp_logits
        arrays |= {f"mtp_logits_{k + 1}_post_norm": array for k, array in enumerate(other)}
    return arrays


def chat(directory: Path) -> dict[str, object]:
    """The conversation `MESSAGES` through a checkpoint's tokenizer and template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    return {"messages": MESSAGES, "text": text, "ids": tokenizer(text)["input_ids"]}


def golden_cases() -> list[Case]:
    """The cases with fixtures."""
    return [case for case in CASES if case.name in GOLDEN_CASES]


def main() -> None:
    """Writes everything anew."""
    shutil.rmtree(GOLDEN, ignore_errors=True)
    for case in golden_cases():
        write_checkpoint(case, GOLDEN / case.name)
        arrays = expected(GOLDEN / case.name, case.seed)
        np.savez_compressed(GOLDEN / f"{case.name}.npz", **arrays)
    conversation = json.dumps(chat(GOLDEN / GOLDEN_CASES[0]), indent=2)
    (GOLDEN / "chat.json").write_text(conversation + "\n")


if __name__ == "__main__":
    main()
