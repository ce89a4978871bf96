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
from occ_jax.rewards import latex, symbolic, verifiers
from occ_jax.rewards.judging import verifier_of
from occ_jax.rewards.symbolic import math_verify
from occ_jax.rewards.verifiers import (
    exact_match,
    last_step,
    math_dapo,
    math_dapo_strict,
    shortened,
)


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


# DAPO's rule, as published and in our strict form.

DAPO_RULES = (math_dapo, math_dapo_strict)


@pytest.mark.parametrize("rule", DAPO_RULES)
@pytest.mark.parametrize(
    "line",
    [
        *("Answer: 34", "answer: 34", "ANSWER : 34", "Answer:34", "Answer:\n34", "Answer: $34$"),
        *(r"Answer: \boxed{34}", "Answer: x=34", "Answer: $x = 34$", r"Answer: \text{34}"),
        *("Answer: 34 dollars", "Answer: 34 cm", r"Answer: 34^\circ", r"Answer: \$34"),
        *("Answer: a 34", "The Answer: 34", "Answer: 12\nAnswer: 34", "Answer: x=$34$."),
        *(
            "Answer: $34$ cm",
            "Answer: $m+n = 34$",
            "Answer: $17 \\cdot 2 = 34$",
            "Answer: m+n = $34$",
        ),
    ],
)
def test_dapo_accepts(rule, line):
    assert rule(f"So we get it.\n{line}", "34") == (1, "34")


@pytest.mark.parametrize("rule", DAPO_RULES)
@pytest.mark.parametrize(
    "line",
    [
        *("34", "Answer 34", "Answer is 34", "Answer: 34.", "Answer: 34.0", "Answer: 034"),
        *("**Answer:** 34", "Answer: 34 or 12", "Answer: 34\nAnswer: 12", r"\boxed{34}"),
        *("Answer: **34**", "Answer: \uff13\uff14", "Answer: 3\x004", "Answer:", "Answer: -34"),
    ],
)
def test_dapo_rejects(rule, line):
    assert rule(line, "34").score == 0


@pytest.mark.parametrize(
    "given",
    [
        *("$34$ or $12$", "12 or $34$", "$12$ or $34$", "twelve or $34$", "$34$, $12$"),
        *("x=12 or x=34", "12 or x=34", "x=12, y=34", "12; x=34", r"$x=12\text{ or }x=34$"),
        *("$34$ Answer: $12$", "the area is $34$", "$34$ not $12$", "$34$ or 12", "3$ $4"),
    ],
)
def test_only_the_published_rule_pays_for_a_second_answer(given):
    assert math_dapo(f"Answer: {given}", "34").score == (given not in ("$12$ or $34$", "3$ $4"))
    assert math_dapo_strict(f"Answer: {given}", "34") == (0, None)


@pytest.mark.parametrize(
    "given",
    [
        *("3 4", "3,4", "3points4", "3{,}4", r"3\;4", r"3\ 4", '3"4', "3$4", r"3\text{4}"),
        *(r"\text{3}4", r"3\boxed{4}", r"\overline{3}4", r"3\text{s}4", "3 units 4"),
    ],
)
def test_only_the_published_rule_joins_digits_that_are_no_groups_of_three(given):
    assert math_dapo(f"Answer: {given}", "34") == (1, "34")
    assert math_dapo_strict(f"Answer: {given}", "34") == (0, None)
    whole = given.replace("3", "12", 1).replace("4", "345")
    grouped = "".join(character for character in given if character not in "34")
    well_formed = grouped in (",", "{,}", " ", r"\ ")
    assert math_dapo(f"Answer: {whole}", "12345").score == 1, whole
    assert math_dapo_strict(f"Answer: {whole}", "12345").score == well_formed, whole


@pytest.mark.parametrize("rule", DAPO_RULES)
def test_dapo_takes_a_list_where_the_answer_is_one(rule):
    assert rule("Answer: 1,2", "1,2").score == 1
    assert rule("Answer: (1, 2)", "(1,2)").score == 1


@pytest.mark.parametrize("rule", DAPO_RULES)
def test_dapo_normalises_as_minerva_does(rule):
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
        assert rule(f"Answer: {given}", answer).score == 1, given
    assert rule("Answer: 1,234.5", "1234.5").score == 0, "only whole numbers lose commas"


@pytest.mark.parametrize("rule", DAPO_RULES)
def test_dapo_reads_the_last_300_characters(rule):
    line = "Answer: 34"
    assert rule(line + "\n" + "x" * (300 - len(line) - 1), "34").score == 1
    assert rule(line + "\n" + "x" * (300 - len(line)), "34").score == 0
    assert rule("x" * 10**6 + line, "34").score == 1


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
        *(rf"\boxed{{12}} {'so it seemed' * 6} \boxed{{34}}", "x" * 10**6 + r"\boxed{34}"),
        *("**Answer:** 34", "**Answer: 34**", "Answer: **34**", "### Answer: 34", "> Answer: 34"),
        *("Final Answer: 34", "**Final answer**: $34$.", "Answer: 34.", "Answer:\n34"),
        "So it is.\r\n**Answer:**\r\n34\r\n",
        *("__Answer:__ _34_", "**Answer:**\n\n$$34$$", "Answer: the area is $34$ square units."),
        *("The answer is\n\\[\n34\n\\]", "The answer is: $34$", "Answer: \\(34\\)", r"\boxed {34}"),
    ],
)
def test_math_verify_accepts(completion):
    assert math_verify(completion, "34") == (1, "34")


@pytest.mark.parametrize(
    "completion",
    [
        *("", "34", "I think 12 then 34", "I think $12$ then $34$", "The answer is 34"),
        *(
            "my answer: 34",
            r"\boxed 34",
            r"\boxed{34",
            r"\boxed{3\x004}",
            "Answer: 34..",
            r"Answer: 34}",
        ),
        *(r"\boxed{12,34}", r"\boxed{34 \text{ or } 12}", r"\boxed{34 \text{ or 12}}"),
        *("\\boxed{34}\nAnswer: 12", r"\boxed{34}, no: I should have said that it is \boxed{12}"),
        *(r"\boxed{34} and finally, as nobody will read, \boxed{\foo", "\\boxed{\uff13\uff14}"),
        *(r"\boxed{34}" + "x" * 2000, r"\boxed{34!}", r"\boxed{-34}", r"\boxed{34 \pm 1}"),
        "Answer: 34}",
        r"\boxed{34} but better, as I see it now, \boxed{\frac{}",
    ],
)
def test_math_verify_rejects(completion):
    assert math_verify(completion, "34").score == 0


@pytest.mark.parametrize(
    "line",
    [
        *("34 or 12", "12 or 34", "$34$ or $12$", "$12$ or $34$", "12 or $34$", "$34$ or 12"),
        *("either $34$ or $12$", "$34$ maybe $12$", "$12$, so $34$", "not $34$", "twelve or $34$"),
        *(r"\boxed{12} or \boxed{34}", r"\boxed{34} or \boxed{12}", r"$\boxed{12}$, $\boxed{34}$"),
        *(r"\boxed{12}\boxed{34}", r"\boxed{12 \boxed{34}}", r"\boxed{12, \boxed{34}}"),
    ],
)
@pytest.mark.parametrize("anchor", ["Answer: ", "The answer is ", "", "**Final answer:** "])
def test_what_is_undecided_is_wrong(anchor, line):
    assert math_verify(anchor + line, "34").score == 0


def test_the_last_box_is_the_answer_whatever_stands_between():
    for between in (
        ". ",
        "\n",
        ",\n",
        ". No, ",
        f". {'x' * 40} or, ",
        f". {'x ' * 25}\nNo, ",
        "x" * 100,
    ):
        text = rf"First \boxed{{12}}{between}\boxed{{34}}"
        assert math_verify(text, "34") == (1, "34"), between
        assert math_verify(text, "12,34").score == 0, between
    for between in (", ", " or ", " and ", "$ and $", r"$, \text{ and } $", "; ", " "):
        text = rf"It is $\boxed{{12}}{between}\boxed{{34}}$."
        assert math_verify(text, "34").score == 0
        assert math_verify(text, "12,34").score == 1, "a list, on one line"
    assert math_verify("\\boxed{1}, \\boxed{234}", "1234").score == 0


PARTS = [
    *(
        "{} {}",
        r"{}\;{}",
        r"{}\,{}",
        r"{}\quad {}",
        r"{}\ {}",
        "{}~{}",
        r"{}\!{}",
        "{}'{}",
        '{}"{}',
    ),
    *("{}${}", r"{}\${}", r"{}\text{{}}{}", r"{}\text{{ }}{}", r"{}\displaystyle{}", "{}\n{}"),
    *("{{{}}}{{{}}}", "{}{{{}}}", "{{{}}}{}", r"{}\mathrm{{th}}{}", "{}({})", "({})({})"),
    *("({}){}", "{}[{}]", r"{}\{{{}\}}", r"{}\left({}\right)", r"{}\frac{{{}}}{{1}}"),
    *(r"\frac{{{}}}{{1}}{}", r"\frac{{{}}}1\frac{}1", r"{}\binom{{{}}}{{1}}", r"{}\ldots {}"),
    *("{}_1 {}", "{}_{{1}}{}", r"{}^\circ {}'", "{} {}/1", r"\{{{}\}}{}", r"{}\;\; {}"),
]


@pytest.mark.parametrize("form", PARTS)
def test_parts_are_not_put_together(form):
    """The library adds the first of these up, and joins what it drops something between."""
    for first, second, answer in (
        ("20", "14", "34"),
        ("3", "4", "7"),
        ("3", "4", "34"),
        ("1", "33", "34"),
    ):
        text = form.format(first, second)
        for completion in (f"\\boxed{{{text}}}", f"Answer: {text}", f"The answer is ${text}$"):
            assert math_verify(completion, answer).score == 0, completion
    for completion in ("Answer: 10 10 14", r"\boxed{10\,10\;14}", r"\boxed{3 4 + 27}"):
        assert math_verify(completion, "34").score == 0


def test_factors_side_by_side_are_a_product():
    for given, answer in (
        *(("2(17)", "34"), ("(2)(17)", "34"), (r"2\left(17\right)", "34"), ("20(14)", "280")),
        *((r"\frac{1}{2}68", "34"), (r"\frac{20}{1}14", "280"), (r"20\binom{14}{1}", "280")),
        *((r"2^{3}4", "32"), (r"2\frac{17}{x}", r"\frac{34}{x}"), (r"2\sqrt3\sqrt3", "6")),
        *((r"\log_2(8)", "3"), (r"\log_{2}{8}", "3"), (r"\sin^2(0)", "0"), (r"\sqrt[3]8", "2")),
    ):
        assert math_verify(f"\\boxed{{{given}}}", answer).score == 1, given


def test_a_mixed_number_has_a_proper_fraction():
    for given in (r"3\frac{1}{2}", r"3 \frac12", r"3\dfrac{1}{2}", "3 1/2"):
        assert math_verify(f"\\boxed{{{given}}}", "3.5").score == 1, given
    for given in (
        r"33\frac{1}{1}",
        r"30\frac{8}{2}",
        "33 1/1",
        r"20\tfrac{28}{2}",
        r"34\frac{0}{1}",
    ):
        assert math_verify(f"\\boxed{{{given}}}", "34").score == 0, given


@pytest.mark.parametrize("by", [",", " ", r"\,", r"\ ", "~", "{,}", r",\!", r",\! "])
def test_digits_in_groups_of_three_are_one_number(by):
    for groups in (("1", "234"), ("12", "000"), ("1", "000", "000")):
        text, whole = by.join(groups), "".join(groups)
        assert math_verify(f"\\boxed{{{text}}}", whole) == (1, whole)
        assert math_verify(f"Answer: -{text}.5", f"-{whole}.5").score == 1
    if by != ",":  # a list, as it is without a space after the comma
        for text in ("1234", "12"), ("1234", "567"), ("1", "23"), ("1", "000", "00"), ("0", "123"):
            assert math_verify(f"\\boxed{{{by.join(text)}}}", "".join(text)).score == 0


def test_lists_stay_lists():
    assert math_verify(r"\boxed{1, 2, 3}", "1,2,3").score == 1
    assert math_verify(r"\boxed{1, 234}", "1234").score == 0
    assert math_verify(r"\boxed{1 234, 5\,678}", "1234, 5678").score == 1
    assert math_verify("Answer: $1$, $2$ and $3$", "1,2,3").score == 1


def test_numbers_in_another_base_are_other_numbers():
    for given in ("10110_2", "10110_{2}", r"10110_{\text{2}}", "(10110)_2", "x = 10110_2"):
        assert math_verify(f"\\boxed{{{given}}}", "10110_2") == (1, "10110_2")
    for given in ("10110_3", "10110", "1011_2", "10110_{10}", "10110_2 0", "22"):
        assert math_verify(f"\\boxed{{{given}}}", "10110_2").score == 0, given
    for given in ("34_{12}", "34_5", "34_{10}", "34_5 + 0", "(34)_8"):
        assert math_verify(f"\\boxed{{{given}}}", "34").score == 0, given


# As the answers of MATH-500, Minerva, OlympiadBench and GSM8K are written.
GOLDS = [
    *(
        r"\left( 3, \frac{\pi}{2} \right)",
        "p - q",
        r"\frac{14}{3}",
        r"\text{Evelyn}",
        r"3\sqrt{13}",
    ),
    *(
        "(6,31,-1)",
        r"\pi",
        "1,-2",
        "[-2,7]",
        r"(0,9) \cup (9,36)",
        "4343_6",
        "10110_2",
        r"90^\circ",
    ),
    *(
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}",
        r"\left[\begin{matrix}1&2\\3&4\end{matrix}\right]",
    ),
    *(r"\dfrac{17}{50}", r"-\frac{35}{9}", "2k+2", r"\text{east}", r"\$36", r"36\%", "1,000,000"),
    *(r"11\sqrt2", r"\frac43", r"\frac{4}3", r"\frac4{3}", r"\frac 59", r"\tfrac12", r"\sqrt2"),
    *("4.5e33", "1.6e-19", "1e-3", "2.3e5", "27.0", ".5", "x=5", "Tuesday", r"\text{(C)}"),
    *(r"x \in [-2,7]", r"137 \frac{1}{2}", r"3\frac{1}{2}", "y = 2x + 3", r"1 \pm \sqrt{19}"),
    *("6 - 5i", r"5.4 \text{ cents}", r"864 \mbox{ inches}^2", r"\frac{270}7\text{ degrees}"),
    *("10,080", r"11,\! 111,\! 111,\! 100", r"12{,}345", r"1\,234", "1 000 000", r"0.\overline{3}"),
    *(
        r"\emptyset",
        r"\binom{5}{2}",
        "5!",
        "7(x+3)(x-3)",
        r"-\sqrt2+\frac12i",
        r"e^{i\pi/3}",
        "a_n",
    ),
    *(r"2\sin 40^\circ", r"\log_2 8", r"\frac{9 \sqrt{3}}{4}", r"6 \text{ or } 8", r"\{1, 2, 3\}"),
    *(r"2.5 \times 10^{-3}", r"9\pi \text{ square units}", "16x^2+4y=3", "|x-3|", r"\sqrt[3]2"),
]


@pytest.mark.parametrize("answer", GOLDS)
def test_an_answer_copied_verbatim_is_right(answer):
    assert math_verify(f"\\boxed{{{answer}}}", answer).score == 1
    assert math_verify(f"So it is.\nAnswer: {answer}", answer).score == 1
    assert math_verify(f"**Answer:** ${answer}$.", answer).score == 1
    assert math_verify(f"$\\boxed{{{answer}}}$", f"${answer}$").score == 1, "dollars in the data"
    assert math_verify(r"\boxed{12345678}", answer).score == 0


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        *((r"\dfrac43", r"\frac{4}{3}"), (r"\frac{4}3", r"\frac{4}{3}"), (r"\tfrac12", r"\frac12")),
        *((r"\frac{4}{3}", r"\frac43"), (r"\sqrt{2}", r"\sqrt2"), (r"\frac\pi2", r"\frac{\pi}{2}")),
        *((r"\frac{\sqrt3}2", r"\frac{\sqrt{3}}{2}"), ("1000000", "1,000,000"), ("12", r"\$12")),
        *(("4.50e33", r"4.5 \times 10^{33}"), ("0.001", "1e-3"), ("2.3E+5", r"2.3 \times 10^{5}")),
    ],
)
def test_spellings_of_one_number_are_equal(given, answer):
    assert math_verify(f"\\boxed{{{given}}}", answer).score == 1
    assert math_verify(f"Answer: {answer}", given).score == 1


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
    usual = {"dapo_math_17k": "math_dapo_strict", "aime24": "math_verify"}
    assert chosen == {**usual, "own": "mine:score"}
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
    for module in (latex, verifiers, symbolic):
        assert doctest.testmod(module).failed == 0
    page = Path(__file__).parent.parent / "docs" / "rewards.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0 and result.attempted >= 6
