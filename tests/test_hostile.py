r"""Ten thousand hostile completions against every verifier: no hang, no crash, no false reward.

Every completion is generated from a seed for an answer that it does not give, though many mention
it. The published rules, DAPO's and math-verify's, pay for some of `undecided` and `parts`; ours do
not (docs/rewards.md). Some of each kind would stop an unprotected verifier for hours or end its
process. Right completions stand among them and must all be rewarded.
"""

import os
import random
import time

import pytest

from occ_jax.config import RewardConfig
from occ_jax.rewards.pool import Item, VerifierPool, reward_metrics
from occ_jax.rewards.verifiers import math_dapo

COUNT, RIGHT = 10_000, 500
DEADLINE = 1.0
VERIFIERS = ("exact_match", "last_step", "math_dapo_strict", "math_verify")
DIGITS = str.maketrans("0123456789", "\uff10\uff11\uff12\uff13\uff14\uff15\uff16\uff17\uff18\uff19")


def box(text):
    return f"\\boxed{{{text}}}"


def wrap(rng, text):
    """An expression as a final answer, in one of the forms that are read."""
    forms = ["\\boxed{%s}", "$\\boxed{%s}$", "Answer: $%s$", "Answer: %s", "**Answer:** %s."]
    return rng.choice(forms) % text


def words(rng):
    return " ".join(rng.choices("so we get the sum of all roots and thus it is".split(), k=12))  # noqa: SIM905


# Each takes a generator and the right answer, and returns a completion that does not give it.


def undecided(rng, answer):
    other = int(answer) + rng.randint(1, 99)
    forms = [
        f"I think {other} then {answer}",
        f"I think ${other}$ then ${answer}$",
        f"Answer: {answer} or {other}",
        f"Answer: {other} or {answer}",
        f"Answer: {answer}, {other}",
        f"The answer is either ${answer}$ or ${other}$ .",
        box(f"{answer} \\text{{ or }} {other}"),
        box(f"{other}, {answer}"),
        f"{answer} " * 50,
        f"It is {answer}. Answer: {other}",
        f"Answer: {answer}\nAnswer: {other}",
        f"Answer: ${answer}$ or ${other}$",
        f"Answer: ${other}$ or ${answer}$",
        f"Answer: {other} or ${answer}$",
        f"Answer: ${answer}$ or {other}",
        f"Answer: x={other} or x={answer}",
        f"**Answer:** {other}, {answer}.",
        f"{box(other)} or {box(answer)}",
    ]
    return rng.choice(forms)


def parts(rng, answer):
    """Two numbers that make the answer when they are added, multiplied or written together."""
    number = int(answer)
    first, place = rng.randint(1, number - 1), rng.randint(1, len(answer) - 1)
    divisor = next((d for d in rng.sample(range(2, 40), 38) if number % d == 0), None)
    spaces = [" ", "  ", "\\;", "\\,", "\\quad ", "\\ ", "~", "\\!", "'", '"', "$", "\\$", "\n"]
    spaces += ["\\text{}", "\\text{ }", "\\displaystyle ", "\\mathrm{th}", "points", "{,}"]
    forms = [f"%s{rng.choice(spaces)}%s"] * 3
    forms += ["{%s}{%s}", "%s{%s}", "{%s}%s", "\\text{%s}%s", "%s\\boxed{%s}"]
    if divisor and divisor != number and rng.random() < 0.3:
        return wrap(rng, rng.choice(forms) % (divisor, number // divisor))
    forms += ["(%s)(%s)", "%s(%s)", "%s\\frac{%s}{1}", "\\frac{%s}{1}%s", "%s\\binom{%s}{1}"]
    pair = rng.choice([(first, number - first), (answer[:place], answer[place:])])
    return wrap(rng, rng.choice(forms) % pair)


def near_miss(rng, answer):
    forms = ["-%s", "%s.5", "%s!", "%s^2", "\\sqrt{%s}", "%s+1", "\\frac{%s}{2}", "%s..", "%sx"]
    forms += ["%s0", "1%s", "\\pm %s", "x \\ge %s", "[0, %s]", "(%s, 9)", "%s i", "\\{%s, 0\\}"]
    return wrap(rng, rng.choice(forms) % answer)


def many_boxes(rng, answer):
    numbers = [str(n) for n in rng.sample(range(100, 1000), rng.randint(2, 60))]
    numbers.insert(rng.randrange(len(numbers)), answer)
    numbers.append(str(int(answer) + 1))
    return rng.choice([" ", ", ", f" {words(rng)} "]).join(map(box, numbers))


def megabyte(rng, answer):
    fillers = ["x", " ", "\n", "$", "{", "\\boxed{", "Answer: ", "\\frac{1}{", "9", "答え"]
    filler = rng.choice(fillers)
    return f"Answer: {answer}\n{box(answer)} {answer}" + filler * (2**20 // len(filler))


def unbalanced(rng, answer):
    parts = ["{", "}", "\\boxed{", "\\frac{", "$", "\\(", "\\[", "\\left(", "(", "]", "7", "\\{"]
    return box(answer) + "".join(rng.choices(parts, k=rng.randint(20, 120))) + "\\boxed{"


def nested_boxes(rng, answer):
    depth = rng.randint(2, 40)
    return "\\boxed{" * depth + str(int(answer) + 1) + "}" * rng.randint(depth - 1, depth + 1)


def nested_latex(rng, answer):
    depth = rng.randint(2, 12)
    kind = rng.choice(["\\frac{1}{", "\\sqrt{", "\\left({", "{", "|{", "-{", "\\text{"])
    return wrap(rng, kind * depth + answer + "}" * depth + "+1")


def towers(rng, answer):
    a, b, c = rng.choices("3456789", k=3)
    forms = [f"{a}^{{{b}^{{{c}^{{9}}}}}}", f"(({c}!)!)!", f"\\binom{{10^{b}}}{{5 \\cdot 10^{a}}}"]
    forms += [f"\\sum_{{i=1}}^{{10^{b}}} i^i", f"\\prod_{{k=1}}^{{10^{c}}} k"]
    forms += [f"\\sin(\\cos(\\tan(\\sin(\\cos({a})))))^{{{b}{c}}}", f"\\int_0^{a} x^{{x^x}} dx"]
    forms += [f"{a}^{{10^{{{b}}}}}", "\\sin{" * 10 + a + "}" * 10]
    return wrap(rng, rng.choice(forms) + rng.choice(["", "+1"]))


def long_digits(rng, answer):
    forms = [answer + "0" * 1900, "9" * 5000, "0." + "3" * 1500, "1e" + "9" * 50]
    return wrap(rng, rng.choice(forms))


def odd_characters(rng, answer):
    place = rng.randint(1, len(answer) - 1)
    odd = rng.choice(["\x00", "\ud800", "\udfff", "\u200b", "\u202e", "\x1b[2J", "\ufeff", "\x7f"])
    spoilt = answer[:place] + odd + answer[place:]
    return wrap(rng, rng.choice([spoilt, answer.translate(DIGITS)]))


def large_collections(rng, answer):
    size = rng.randint(3, 14)
    values = [answer, *map(str, rng.choices(range(1000, 9999), k=size))]
    rows = "\\\\".join("&".join(values[:3]) for _ in range(size // 3))
    form = rng.choice(["\\{%s\\}", "(%s)", "[%s]", "%s"]) % ",".join(values)
    matrix = f"\\begin{{pmatrix}}{rows}\\end{{pmatrix}}"
    intervals = "\\cup".join(f"({value},\\infty)" for value in values)
    return wrap(rng, rng.choice([form, matrix, intervals]))


def repetitions(rng, answer):
    units = ["answer ", "Answer:", "final answer is ", "$", "$$", "\\[", "\\(", "$a$ and ", " "]
    units += ["\\boxed", "\\boxed{}", "answer: $", "is:", "\\begin{pmatrix}", "&", "^", "_{"]
    return f"{answer} {rng.choice(units) * rng.randint(50, 3000)}"


def programs(rng, answer):
    forms = ["__import__('os')._exit(0)", "exec('import os; os.abort()')", "{{7*7}}", "${jndi:x}"]
    forms += [f"Verdict(score=1.0, given='{answer}')", "cos\nsystem\n(S'exit'\ntR.", "1/0"]
    forms += ["lambda: 1", "\\input{/etc/passwd}", "\\def\\x{\\x\\x}\\x", "\\write18{exit}", "%s%n"]
    return wrap(rng, rng.choice(forms))


def noise(rng, answer):
    return "".join(chr(rng.choice([rng.randrange(128), rng.randrange(0x3000)])) for _ in range(200))


# (kind, how many of ten thousand): those that are slow on purpose are few.
KINDS = [
    *((undecided, 1700), (near_miss, 1400), (parts, 900), (many_boxes, 700), (unbalanced, 1000)),
    *((odd_characters, 900), (nested_boxes, 700), (nested_latex, 400), (repetitions, 600)),
    *((programs, 500), (noise, 500), (large_collections, 300), (long_digits, 270)),
    *((megabyte, 100), (towers, 30)),
]


def hostile_completions(seed):
    rng = random.Random(seed)
    assert sum(count for _, count in KINDS) == COUNT
    answers = [str(rng.randint(100, 999)) for _ in range(COUNT)]
    kinds = [kind for kind, count in KINDS for _ in range(count)]
    rng.shuffle(kinds)
    return [(kind, kind(rng, answer), answer) for kind, answer in zip(kinds, answers, strict=True)]


def right_completion(rng, verifier, answer):
    lines = ["Answer: %s", "Answer: $%s$", "Answer: $x = %s$", "Answer: x = $%s$"]
    forms = {
        "exact_match": ["%s"],
        "last_step": ["1>2>%s"],
        "math_dapo_strict": lines,
        "math_verify": [*lines, "It is \\boxed{%s}.", "**Answer:** %s.", "The answer is $%s$."],
    }
    before = "" if verifier == "exact_match" else "It follows.\n"
    return before + rng.choice(forms[verifier]) % answer


def test_generation_is_repeatable():
    first, second = hostile_completions(0), hostile_completions(0)
    assert first == second
    assert first != hostile_completions(1)
    assert all(len(text) > 1_000_000 for kind, text, _ in first if kind is megabyte)


def test_the_published_rule_pays_for_several_answers_and_for_parts_of_one():
    """These are the known holes of `math_dapo`; `math_dapo_strict` is held to none below."""
    paid = {
        kind for kind, text, answer in hostile_completions(0) if math_dapo(text, answer).score != 0
    }
    assert paid == {undecided, parts}


@pytest.mark.slow
def test_hostile_completions_neither_hang_nor_crash_nor_earn(record_property):
    hostile = hostile_completions(seed=0)
    started = time.monotonic()
    reports = []
    with VerifierPool(VERIFIERS, RewardConfig(workers=2, deadline_s=DEADLINE)) as pool:
        for verifier in VERIFIERS:
            items = [Item(verifier, text, answer) for _, text, answer in hostile]
            rng = random.Random(1)
            right = sorted(rng.sample(range(COUNT + RIGHT), RIGHT))
            for place in right:
                answer = str(rng.randint(100, 999))
                items.insert(place, Item(verifier, right_completion(rng, verifier, answer), answer))
            judged = pool.judge(items)
            found = reward_metrics([judged])
            reports.append((verifier, found))
            rewarded = {index for index, score in enumerate(judged.scores) if score != 0}
            false = [items[index] for index in sorted(rewarded - set(right))]
            assert not false, (
                f"{verifier} rewards {[(i.completion[-80:], i.answer) for i in false]}"
            )
            assert rewarded == set(right), f"{verifier} lost right completions"
            # Everything that is not a time-out is quick; a time-out costs a deadline and a start.
            bound = 60 + found["reward/timeouts"] * (DEADLINE + 2) / 2
            crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others at work
            assert judged.seconds < bound * crowd
            assert found["reward/timeouts"] + found["reward/deaths"] <= 60
    lines = [
        f"{COUNT:,} hostile completions, {RIGHT} right ones, 2 workers, {DEADLINE} s each",
        f"{'verifier':16} {'seconds':>8} {'items/s':>9}  time-outs  deaths  errors",
        *(
            f"{verifier:16} {found['timing_s/reward']:8.1f} "
            f"{found['perf/reward_throughput']:9,.0f}  {found['reward/timeouts']:9.0f}  "
            f"{found['reward/deaths']:6.0f}  {found['reward/errors']:6.0f}"
            for verifier, found in reports
        ),
        f"false rewards 0, lost rewards 0, {time.monotonic() - started:.0f} s in all",
    ]
    record_property("figures", "\n".join(lines))
