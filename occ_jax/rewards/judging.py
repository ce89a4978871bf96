"""From sampled tokens to scores: the verifier of each source, and the text that it judges.

Leaves the rules to the verifiers and running them to `occ_jax.rewards.pool`.
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
_DEFAULTS = {
    **dict.fromkeys(("reverse_digits", "sort_digits", "addition"), "exact_match"),
    "chained_sum": "last_step",
    "dapo_math_17k": "math_dapo_strict",
    **dict.fromkeys(("aime24", "aime25", "amc23", "gsm8k_train", "gsm8k_test"), "math_verify"),
    **dict.fromkeys(("math500", "minerva", "olympiadbench"), "math_verify"),
}


def verifier_of(config: Config, source: str) -> str:
    """The verifier that judges a task's or prepared set's completions.

    The default of DAPO's training set is `math_dapo_strict`, the safe choice: the published rule,
    `math_dapo`, pays for some lines with several answers. A recipe that reproduces published
    figures names `math_dapo` in `reward.per_source`.

    Raises:
        UserError: the set is the user's own and the config names no verifier for it.
    """
    named = dict(config.reward.per_source).get(source, config.reward.verifier)
    if named is None and source not in _DEFAULTS:
        raise UserError(
            f"no verifier judges {source}; set reward.verifier, or name it in reward.per_source"
        )
    return _DEFAULTS[source] if named is None else named


def evaluation_sources(config: Config) -> list[str]:
    """The sets, or the digit task, that a config evaluates on."""
    return list(config.dataset.evaluation) if config.dataset.name else [config.task.name]


def open_pool(config: Config) -> VerifierPool:
    """Starts a pool with the verifiers of all sources that a config trains and evaluates on.

    Raises:
        UserError: a set has no verifier, a user's function cannot be imported, or
            `reward.per_source` names a source that the config does not use.
    """
    sources = [config.dataset.name or config.task.name, *evaluation_sources(config)]
    for source, _ in config.reward.per_source:
        if source not in sources:
            raise UserError(
                f"reward.per_source names {source!r}, which this config neither trains nor "
                f"evaluates on; this config has {', '.join(dict.fromkeys(sources))}"
            )
    return VerifierPool([verifier_of(config, source) for source in sources], config.reward)


def judge_completions(
    pool: VerifierPool,
    config: Config,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    completions: Int[np.ndarray, "P G R"],
) -> tuple[Float[np.ndarray, "P G"], Judged]:
    """Scores G completions of each of P problems.

    The verifier reads the text before the end-of-sequence token with special tokens spelled out, so
    padding that a policy sampled inside a completion is not ignored. A completion without an
    end-of-sequence token was cut by the length limit. Unless `reward.truncated` is judged, it is
    wrong and no verifier reads it.

    Returns:
        Scores, 1 for a right completion and 0 for a wrong one; and the verdicts on all P·G, prompt
        by prompt.
    """
    count = completions.shape[0] * completions.shape[1]
    items: list[Item] = []
    judged_rows: list[int] = []
    for row, ids in enumerate(completions.reshape(count, -1).tolist()):
        example = examples[row // completions.shape[1]]
        judged_ids, ended = until_end(tokenizer, ids)
        if ended or config.reward.truncated == "judged":
            verifier = verifier_of(config, example.source)
            judged_rows.append(row)
            text = tokenizer.decode(judged_ids)
            items.append(Item(verifier, text, example.answer, _problem_record(example)))
    verdicts = pool.judge(items)
    judged = verdicts._replace(
        scores=np.zeros(count, np.float32), given=[None] * count, failures=[""] * count
    )
    for index, row in enumerate(judged_rows):
        judged.scores[row] = verdicts.scores[index]
        judged.given[row], judged.failures[row] = verdicts.given[index], verdicts.failures[index]
    return judged.scores.reshape(completions.shape[:2]), judged


def _problem_record(example: Example) -> dict[str, Any]:
    """The argument `record` of a user's function."""
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = [message._asdict() for message in prompt]
    return {"id": example.id, "source": example.source, "prompt": prompt}
