"""What each rule accepts and rejects, and that math-verify's results are the library's own."""

import doctest
import re
from pathlib import Path

import pytest
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from occ_jax.config import (
    Config,
    DatasetConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    WarmStartConfig,
    computation,
    from_dict,
    to_dict,
)
from occ_jax.errors import UserError
from occ_jax.rewards import symbolic, verifiers
from occ_jax.rewards.scoring import verifier_of
from occ_jax.rewards.symbolic import math_verify
from occ_jax.rewards.verifiers import exact_match, last_step, math_dapo, shortened


def accepts(verifier, answer, *completions):
    return [verifier(completion, answer).score for completion in completions]


# Exact rules.


def test_exact_match_is_exact():
    assert accepts(exact_match, "34", "34") == [1]
    wrong = ("", "3", "034", " 34", "34\n", "34.0", "\uff13\uff14", "3\x004")
    assert accepts(exact_match, "34", *wrong) == [0] * len(wrong)
    assert exact_match("a\ud800", "a\ud800") == (1, "a\ud800")


def test_last_step_reads_what_follows_the_last_arrow():
    assert accepts(last_step, "28", "13>22>28", "28", ">28", "1>2>28") == [1] * 4
    assert accepts(last_step, "28", "28>", "13>22", "28>13", "13>028", "") == [0] * 5


def test_long_answers_are_kept_as_a_beginning_and_a_digest():
    first, second = "x" * 300 + "a", "x" * 300 + "b"
    assert shortened("x" * 256) == "x" * 256
    assert shortened(first)[:256] == "x" * 256 and len(shortened(first)) < 300
    assert shortened(first) != shortened(second)
    assert exact_match(first, "34").given == shortened(first)
    shortened("\ud800" * 1000)


# DAPO's rule.


@pytest.mark.parametrize(
    "line",
    [
        *("Answer: 34", "answer: 34", "ANSWER : 34", "Answer:34", "Answer:\n34", "Answer: $34$"),
        *(r"Answer: \boxed{34}", "Answer: x=34", "Answer: $x = 34$", r"Answer: \text{34}"),
        *("Answer: 34 dollars", "Answer: 34 cm", r"Answer: 34^\circ", "Answer: 3{,}4"),
        *("Answer: a 34", "The Answer: 34", "Answer: 12\nAnswer: 34"),
    ],
)
def test_dapo_accepts(line):
    assert math_dapo(f"So we get it.\n{line}", "34") == (1, "34")


@pytest.mark.parametrize(
    "line",
    [
        *("34", "Answer 34", "Answer is 34", "Answer: 34.", "Answer: 34.0", "Answer: 034"),
        *("**Answer:** 34", "Answer: 34 or 12", "Answer: 34\nAnswer: 12", r"\boxed{34}"),
        *("Answer: **34**", "Answer: \uff13\uff14", "Answer: 3\x004", "Answer:", "Answer: -34"),
    ],
)
def test_dapo_rejects(line):
    assert math_dapo(line, "34").score == 0


def test_dapo_normalises_as_minerva_does():
    # Both sides: shorthand fractions and roots, thousands, units, text.
    for given, answer in (
        (r"\frac12", r"\frac{1}{2}"),
        (r"\sqrt3", r"\sqrt{3}"),
        ("1,234,567", "1234567"),
        (r"5\ \text{m}", "5"),
        (r"\mbox{yes}", "yes"),
        (r"12\$", "12"),
        ("7 square units", "7"),
        (r"\overline{AB}", "AB"),
    ):
        assert math_dapo(f"Answer: {given}", answer).score == 1, given
    assert math_dapo("Answer: 1,234.5", "1234.5").score == 0, "only whole numbers lose commas"


def test_dapo_reads_the_last_300_characters():
    line = "Answer: 34"
    assert math_dapo(line + "\n" + "x" * (300 - len(line) - 1), "34").score == 1
    assert math_dapo(line + "\n" + "x" * (300 - len(line)), "34").score == 0
    assert math_dapo("x" * 10**6 + line, "34").score == 1


# Math-verify.

STRICT = [
    LatexExtractionConfig(
        boxed_match_priority=0,
        normalization_config=NormalizationConfig(
            basic_latex=True,
            units=True,
            malformed_operators=False,
            nits=False,
            boxed="all",
            equations=False,
        ),
    )
]
# The library's README and docstrings, and what they say of it; then cases of each kind it names.
DOCUMENTED = [
    ("${1,3} \\cup {2,4}$", "${1,2,3,4}$", True),
    ("$1 < x < 2$", "$(1,2)$", True),  # the prediction may be the interval, not the other way
    ("$(1,2)$", "$1 < x < 2$", False),
    ("$101$", "$a+2z = 2z + a = 101$", True),  # a chain may lead to the number
    ("$a+2z = 2z + a = 101$", "$101$", False),
    ("$\\frac{1}{2}$", "The answer is $\\frac{1}{2}$", True),
    ("$\\frac{1}{3}$", "$0.333333$", True),
    ("$\\frac{1}{3}$", "$0.33$", False),
    ("$1$", "$x = 1$", True),
    ("$10$", "$10 \\text{ cm}$", True),
    ("$a < 2$", "$2 > a$", True),
    ("$a < 2$", "$2 < a$", False),
    ("$x+1$", "$1+x$", True),
    ("$x^2-1$", "$(x-1)(x+1)$", True),
    ("$\\sqrt{2}$", "$\\frac{2}{\\sqrt{2}}$", True),
    ("$[0,1)$", "$[0,1)$", True),
    ("$[0,1)$", "$[0,1]$", False),
    ("$\\{1,2\\}$", "$\\{2,1\\}$", True),
    ("$28\\%$", "$28$", True),
    (
        "$\\begin{pmatrix}1 & 2\\\\3 & 4\\end{pmatrix}$",
        "$\\begin{pmatrix}1 & 2\\\\3 & 4\\end{pmatrix}$",
        True,
    ),
    (
        "$\\begin{pmatrix}1 & 2\\\\3 & 4\\end{pmatrix}$",
        "$\\begin{pmatrix}1 & 2\\\\4 & 3\\end{pmatrix}$",
        False,
    ),
    ("$\\text{Evelyn}$", "\\boxed{\\text{Evelyn}}", True),
    ("$90^\\circ$", "\\boxed{90}", True),
    ("$6-5i$", "\\boxed{-5i + 6}", True),
]


@pytest.mark.parametrize(("gold", "completion", "expected"), DOCUMENTED)
def test_results_are_the_librarys_own(gold, completion, expected):
    # The library with its own time-outs and tolerances.
    own = verify(parse(gold, STRICT), parse(completion, STRICT, extraction_mode="first_match"))
    assert own == expected
    assert math_verify(completion, gold).score == expected
    assert math_verify(completion, gold.strip("$")).score == expected, "publishers omit dollars"


@pytest.mark.parametrize(
    "completion",
    [
        *(r"\boxed{34}", r"$\boxed{34}$", r"\boxed{34.0}", r"\boxed{034}", r"\boxed{\boxed{34}}"),
        *("Answer: 34", "answer : 34", "so\nAnswer: $34$", "The answer is $34$.", "$34$"),
        *(r"\(34\)", r"\[34\]", "\\boxed{12}\nAnswer: 34", "\\boxed{12}\nAnswer: $34$"),
        *(
            rf"\boxed{{12}} {'so it seemed' * 6} \boxed{{34}}",
            "x" * 10**6 + r"\boxed{34}",
        ),
    ],
)
def test_math_verify_accepts(completion):
    assert math_verify(completion, "34") == (1, "34")


@pytest.mark.parametrize(
    "completion",
    [
        *("", "34", "I think 12 then 34", "I think $12$ then $34$", "The answer is 34"),
        *("**Answer:** 34", "Answer: 34 or 12", "Answer: 34.", "my answer: 34", r"\boxed 34"),
        *(r"\boxed{12} or \boxed{34}", r"\boxed{12,34}", r"\boxed{34 \text{ or } 12}"),
        *("\\boxed{34}\nAnswer: 12", r"\boxed{34}, no: I should have said that it is \boxed{12}"),
        *(
            r"\boxed{34} but better, as I see it now, \boxed{\frac{}",
            r"\boxed{34",
            r"\boxed{3\x004}",
        ),
        *(r"\boxed{34} and finally, as nobody will read, \boxed{\foo", "\\boxed{\uff13\uff14}"),
        *(r"\boxed{34}" + "x" * 2000, r"\boxed{34!}", r"\boxed{-34}", r"\boxed{34 \pm 1}"),
        r"\boxed{\frac13}",
    ],
)
def test_math_verify_rejects(completion):
    assert math_verify(completion, "34").score == 0


@pytest.mark.parametrize("answer", [r"\frac43", r"\sqrt2", r"\frac{1}2", "1,000,000", r"\$12"])
def test_answers_are_read_as_publishers_write_them(answer):
    fixed = {r"\frac43": r"\frac{4}{3}", r"\sqrt2": r"\sqrt{2}", r"\frac{1}2": r"\frac{1}{2}"}
    assert math_verify(f"\\boxed{{{fixed.get(answer, answer)}}}", answer).score == 1


@pytest.mark.parametrize(
    ("answer", "completion", "score"),
    [
        ("1.6e-19", r"\boxed{1.6 \times 10^{-19}}", 1),
        ("1.6e-19", r"\boxed{16 \cdot 10^{-20}}", 1),
        ("1.6e-19", r"\boxed{0.16 \times 10^{-18}}", 1),
        ("1.6e-19", r"\boxed{5 \times 10^{-19}}", 0),
        ("1.6e-19", r"\boxed{1.7 \times 10^{-19}}", 0),
        ("1.6e-19", r"\boxed{0.0}", 0),
        ("0.0000001", r"\boxed{10^{-7}}", 1),
        ("0.0000001", r"\boxed{0.0000002}", 0),
        (r"\{10^{-20}, 1\}", r"\boxed{\{1, 10^{-20}\}}", 1),
        (r"\{10^{-20}, 1\}", r"\boxed{\{1, 10^{-21}\}}", 0),
        ("4.5e33", r"\boxed{4.5 \times 10^{33}}", 1),
        ("4.5e33", r"\boxed{4.6 \times 10^{33}}", 0),
        ("0", r"\boxed{0}", 1),
        ("0", r"\boxed{0.0}", 1),
    ],
)
def test_small_numbers_are_told_apart(answer, completion, score):
    assert math_verify(completion, answer).score == score


def test_equal_numbers_are_one_answer():
    def given(*texts):
        return {math_verify(f"\\boxed{{{text}}}", "34").given for text in texts}

    assert given("34", "34.0", "034", " 34 ") == {"34"}
    assert given("0.5", r"\frac{1}{2}", r"\frac{2}{4}") == {"1/2"}
    assert given("x + 1", "x+1") == {"x+1"}
    assert math_verify("nothing", "34").given is None


# The choice.


def prepared(**reward):
    return Config(
        dataset=DatasetConfig(name="dapo_math_17k", evaluation=("aime24", "own")),
        model=ModelConfig(checkpoint="somewhere"),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(max_prompt_tokens=8),
        reward=RewardConfig(**reward),
    )


def test_every_source_has_its_verifier():
    config = prepared(per_source=(("own", "mine:score"),))
    chosen = {name: verifier_of(config, name) for name in ("dapo_math_17k", "aime24", "own")}
    assert chosen == {"dapo_math_17k": "math_dapo", "aime24": "math_verify", "own": "mine:score"}
    assert verifier_of(Config(), "reverse_digits") == "exact_match"
    assert verifier_of(Config(), "chained_sum") == "last_step"
    everywhere = prepared(verifier="math_verify", per_source=(("own", "exact_match"),))
    assert verifier_of(everywhere, "dapo_math_17k") == "math_verify"
    assert verifier_of(everywhere, "own") == "exact_match"
    with pytest.raises(UserError, match=re.escape("no verifier judges own; set reward.verifier")):
        verifier_of(prepared(), "own")


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        ({"verifier": "math"}, "reward.verifier is 'math'; it must be one of exact_match"),
        ({"verifier": "file.py:"}, "reward.verifier"),
        ({"verifier": ":score"}, "reward.verifier"),
        ({"per_source": (("a", "math_dapo"), ("a", "math_verify"))}, "no source is named twice"),
        ({"per_source": (("a", "nothing"),)}, "reward.per_source is 'nothing'"),
        ({"wrong": 1.0}, "reward.wrong is 1.0; it must be below 1"),
        ({"wrong": float("-inf")}, "reward.wrong"),
        ({"workers": 0}, "reward.workers is 0; it must be 1 or more, or None"),
        ({"deadline_s": 0.0}, "reward.deadline_s"),
        ({"memory_mib": 10}, "reward.memory_mib is 10; it must be 256 or more"),
    ],
)
def test_a_bad_reward_section_is_refused(reward, said):
    with pytest.raises(UserError, match=re.escape(said)):
        RewardConfig(**reward)


def test_the_reward_section_survives_json_and_costs_no_compilation():
    config = prepared(per_source=(("own", "mine.py:score"), ("aime24", "math_dapo")))
    import json

    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config
    assert computation(config) == computation(prepared(verifier="math_dapo", workers=3))


def test_examples_in_the_documentation_are_right():
    for module in (verifiers, symbolic):
        assert doctest.testmod(module).failed == 0
    page = Path(__file__).parent.parent / "docs" / "rewards.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0 and result.attempted >= 6
