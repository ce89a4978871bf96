"""The published problem sets: whose files, which columns, how many problems, what answers.

Row counts and columns as the publishers' dataset cards state them; docs/data.md says how to get
the files.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from occ_jax.data import answers


class Layout(NamedTuple):
    """The columns of a file; "a.b" is field b of column a."""

    prompt: str  # a problem's text, or a conversation: a list of {role, content}
    answer: str
    id: str = ""  # empty, or absent from a file: rows are numbered
    context: str = ""  # text before the problem, where a row has one
    publisher: str = ""  # whose files look like this


class PublishedSet(NamedTuple):
    """What the files of a set hold."""

    num_problems: tuple[int, ...]  # distinct ones, of each published version
    read_answer: Callable[[Any], str]
    layouts: tuple[Layout, ...]
    distinct: bool = False  # publishers repeat problems: keep the first of equal prompts


PUBLISHED: dict[str, PublishedSet] = {
    # 1,791,700 rows are 100 copies of 17,917, which hold 17,398 prompts.
    "dapo_math_17k": PublishedSet(
        (17_398,),
        answers.integer,
        (
            Layout(
                "prompt",
                "reward_model.ground_truth",
                "extra_info.index",
                publisher="BytedTsinghua-SIA/DAPO-Math-17k",
            ),
        ),
        distinct=True,
    ),
    "aime24": PublishedSet(
        (30,),
        answers.aime,
        (
            Layout("problem", "answer", "id", publisher="HuggingFaceH4/aime_2024"),
            Layout("Problem", "Answer", "ID", publisher="Maxwell-Jia/AIME_2024"),
            # Each problem 32 times.
            Layout(
                "prompt",
                "reward_model.ground_truth",
                "extra_info.index",
                publisher="BytedTsinghua-SIA/AIME-2024",
            ),
        ),
        distinct=True,
    ),
    "aime25": PublishedSet(
        (30,),
        answers.aime,
        (
            Layout("problem", "answer", "id", publisher="math-ai/aime25 and yentinglin/aime_2025"),
            Layout("question", "answer", publisher="opencompass/AIME2025"),
        ),
    ),
    "amc23": PublishedSet(
        (40,),
        answers.number,
        (Layout("question", "answer", "id", publisher="math-ai/amc23"),),
    ),
    "math500": PublishedSet(
        (500,),
        answers.latex,
        (Layout("problem", "answer", "unique_id", publisher="HuggingFaceH4/MATH-500"),),
    ),
    "minerva": PublishedSet(
        (272,),
        answers.latex,
        (Layout("question", "answer", publisher="math-ai/minervamath"),),
    ),
    "olympiadbench": PublishedSet(
        (674, 675),
        answers.latex,
        (
            Layout(
                "question",
                "final_answer",
                "id",
                "context",
                publisher="Hothan/OlympiadBench and math-ai/olympiadbench",
            ),
        ),
    ),
    "gsm8k_train": PublishedSet(
        (7_473,), answers.gsm8k, (Layout("question", "answer", publisher="openai/gsm8k"),)
    ),
    "gsm8k_test": PublishedSet(
        (1_319,), answers.gsm8k, (Layout("question", "answer", publisher="openai/gsm8k"),)
    ),
}
