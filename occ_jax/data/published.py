"""The published problem sets: publishers, columns of their files, problem counts, kinds of answers.

Counts and columns are those of the publishers' dataset cards; docs/data.md tells how to get the
files. Leaves reading and checking them to `occ_jax.data.prepare`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from occ_jax.data import answers


class FileColumns(NamedTuple):
    """Names of a file's columns; "a.b" is field b of column a."""

    prompt: str  # a problem's text, or a conversation: a list of {role, content}
    answer: str
    id: str = ""  # if empty, or missing in a file, rows are numbered
    context: str = ""  # optional text before the problem
    publisher: str = ""  # the publisher of files with these columns; empty for a user's own


class ProblemSet(NamedTuple):
    """Contents of the files of a set, published or a user's own."""

    num_problems: tuple[int, ...]  # allowed counts of distinct problems; any count if empty
    read_answer: Callable[[Any], str]
    columns: tuple[FileColumns, ...]  # of each publisher
    distinct: bool = False  # keep only the first row of each prompt, as publishers repeat rows


_VERL = FileColumns("prompt", "reward_model.ground_truth", "extra_info.index")
_GSM8K = FileColumns("question", "answer", publisher="openai/gsm8k")

PUBLISHED: dict[str, ProblemSet] = {
    # 1,791,700 rows are 100 copies of 17,917, which hold 17,398 prompts.
    "dapo_math_17k": ProblemSet(
        (17_398,),
        answers.integer,
        (_VERL._replace(publisher="BytedTsinghua-SIA/DAPO-Math-17k"),),
        distinct=True,
    ),
    "aime24": ProblemSet(
        (30,),
        answers.aime,
        (
            FileColumns("problem", "answer", "id", publisher="HuggingFaceH4/aime_2024"),
            FileColumns("Problem", "Answer", "ID", publisher="Maxwell-Jia/AIME_2024"),
            # This file repeats each problem 32 times.
            _VERL._replace(publisher="BytedTsinghua-SIA/AIME-2024"),
        ),
        distinct=True,
    ),
    "aime25": ProblemSet(
        (30,),
        answers.aime,
        (
            FileColumns(
                "problem", "answer", "id", publisher="math-ai/aime25 and yentinglin/aime_2025"
            ),
            FileColumns("question", "answer", publisher="opencompass/AIME2025"),
        ),
    ),
    "amc23": ProblemSet(
        (40,), answers.number, (FileColumns("question", "answer", "id", publisher="math-ai/amc23"),)
    ),
    "math500": ProblemSet(
        (500,),
        answers.latex,
        (FileColumns("problem", "answer", "unique_id", publisher="HuggingFaceH4/MATH-500"),),
    ),
    "minerva": ProblemSet(
        (272,), answers.latex, (FileColumns("question", "answer", publisher="math-ai/minervamath"),)
    ),
    "olympiadbench": ProblemSet(
        (674, 675),
        answers.latex,
        (
            FileColumns(
                "question",
                "final_answer",
                "id",
                "context",
                publisher="Hothan/OlympiadBench and math-ai/olympiadbench",
            ),
        ),
    ),
    "gsm8k_train": ProblemSet((7_473,), answers.gsm8k, (_GSM8K,)),
    "gsm8k_test": ProblemSet((1_319,), answers.gsm8k, (_GSM8K,)),
}
