"""From sampled tokens to scores: which verifier judges what, and on which text.

Leaves the rules to the verifiers and the running of them to the pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from occ_jax.config import Config
from occ_jax.data.examples import Example
from occ_jax.data.tokenizer import Tokenizer, until_end
from occ_jax.errors import UserError
from occ_jax.rewards.pool import Item, Judged, VerifierPool

# The prompts of DAPO's training set request the line that `math_dapo_strict` reads. Evaluation sets
# take `math_verify`, as their answers are LaTeX, or numbers written in several ways.
_USUAL = {
    **dict.fromkeys(("reverse_digits", "sort_digits", "addition"), "exact_match"),
    "chained_sum": "last_step",
    "dapo_math_17k": "math_dapo_strict",
    **dict.fromkeys(
        ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench"), "math_verify"
    ),
    **dict.fromkeys(("gsm8k_train", "gsm8k_test"), "math_verify"),
}


def verifier_of(config: Config, source: str) -> str:
    """The verifier that judges a task's or prepared set's completions.

    The default of DAPO's training set is `math_dapo_strict`, the safe choice: the published rule,
    `math_dapo`, pays for some lines with several answers. A recipe that reproduces published
    figures names `math_dapo` in `reward.per_source`.

    Raises:
        UserError: the set is the user's own and the config names none.
    """
    named = dict(config.reward.per_source).get(source, config.reward.verifier)
    if named is None and source not in _USUAL:
        raise UserError(
            f"no verifier judges {source}; set reward.verifier, or name it in reward.per_source"
        )
    return _USUAL[source] if named is None else named


def open_pool(config: Config) -> VerifierPool:
    """A pool for all that a run of `config` trains and evaluates on.

    Raises:
        UserError: a set has no verifier, a function of the user cannot be imported, or
            `reward.per_source` names a source that is not there.
    """
    dataset = config.dataset
    sources = [dataset.name, *dataset.evaluation] if dataset.name else [config.task.name]
    for source, _ in config.reward.per_source:
        if source not in sources:
            raise UserError(
                f"reward.per_source names {source!r}, of which nothing is trained or evaluated on; "
                f"this config has {', '.join(dict.fromkeys(sources))}"
            )
    return VerifierPool([verifier_of(config, source) for source in sources], config.reward)


def judge_completions(
    pool: VerifierPool,
    config: Config,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    completions: Int[np.ndarray, "P G R"],
) -> tuple[Float[np.ndarray, "P G"], Judged]:
    """Scores completions of a group size G.

    What precedes the end-of-sequence token is judged as text, special tokens spelled out: padding
    that a policy sampled inside a completion is not overlooked. A completion without an end was cut
    by the length limit; unless `reward.truncated` says otherwise it is wrong, whatever it spells.

    Args:
        pool: of `config`.
        config: sections reward, task, dataset.
        tokenizer: of the completions.
        examples: P problems.
        completions: token ids.

    Returns:
        Scores, 1 for a right completion and 0 for a wrong one; and the verdicts on all P·G, prompt
        by prompt.
    """
    count = completions.shape[0] * completions.shape[1]
    items: list[Item] = []
    judged_rows: list[int] = []
    for row, ids in enumerate(completions.reshape(count, -1).tolist()):
        example = examples[row // completions.shape[1]]
        given, ended = until_end(tokenizer, ids)
        if ended or config.reward.truncated == "judged":
            verifier = verifier_of(config, example.source)
            judged_rows.append(row)
            items.append(Item(verifier, tokenizer.decode(given), example.answer, _told(example)))
    found = pool.judge(items)
    unseen = np.zeros(count, np.float32), [None] * count, [""] * count
    judged = Judged(*unseen, seconds=found.seconds, asked=found.asked)
    for place, row in enumerate(judged_rows):
        judged.scores[row] = found.scores[place]
        judged.given[row], judged.failures[row] = found.given[place], found.failures[place]
    return judged.scores.reshape(completions.shape[:2]), judged


def _told(example: Example) -> dict[str, Any]:
    """What a user's function learns about the problem."""
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = [message._asdict() for message in prompt]
    return {"id": example.id, "source": example.source, "prompt": prompt}
