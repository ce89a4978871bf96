"""Records that resume and never mix, the figures made of them, and two policies compared."""

import json
import math
import resource
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from occ_jax.cli.evaluate import evaluation_directory
from occ_jax.config import Config, MeshConfig
from occ_jax.data.examples import Example, Prompt
from occ_jax.data.tokenizer import DIGITS
from occ_jax.errors import UserError
from occ_jax.evaluation import evaluate as evaluation
from occ_jax.evaluation.identity import fingerprint, verifier_identity
from occ_jax.evaluation.records import Record, RecordFile, Sampled, read_records
from occ_jax.evaluation.summary import (
    compare_evaluations,
    comparison_cells,
    evaluation_cells,
    evaluation_report,
    per_question,
    read_evaluation,
    summarise,
)
from occ_jax.parallel.sharding import make_mesh
from occ_jax.rewards.pool import Judged, VerifierPool
from occ_jax.setup import Setup

HEADER = {"policy": "0123", "set": "sums", "samples": 2, "seed": 0, "sampling": {"temperature": 1}}


def questions(count, answer="4"):
    examples = [Example(f"2 + {i}", answer, "sums", f"q{i}") for i in range(count)]
    return [Prompt(example, (index, 1)) for index, example in enumerate(examples)]


def sample(part, start):
    """Two answers each, a function of the chunk's place and the question's place in it."""
    return [
        Sampled(
            tokens=np.array([[start, row], [start, row + 1]]),
            texts=[f"answer {start} {row} \ud800\x00", "another"],
            lengths=[row + 1, 7],
            truncated=[False, row % 2 == 1],
            figures={"agreed_1": float(row), "drafted_1": 4.0},
        )
        for row in range(len(part))
    ]


def judge(pool, config, tokenizer, examples, tokens):
    flat = tokens.reshape(-1, tokens.shape[-1])
    judged = Judged(
        scores=(flat.sum(-1) % 2).astype(np.float32),
        given=[None if total % 3 == 0 else str(total) for total in flat.sum(-1).tolist()],
        failures=["timeout" if total % 5 == 0 else "" for total in flat.sum(-1).tolist()],
        seconds=0.1,
        num_judged=len(flat),
    )
    return judged.scores.reshape(tokens.shape[:2]), judged


def evaluate(prompts, sampler=sample, file=None, **options):
    """`evaluate` in chunks of three questions, with stand-ins for the model and the verifier."""
    stand_ins = {
        "_answer": lambda setup, params, part, start, *_: sampler(part, start),
        "judge_completions": judge,
        "call_of": lambda *_: evaluation.Call(3, 1),
    }
    with mock.patch.multiple(evaluation, **stand_ins):
        pool = mock.Mock(spec=VerifierPool)
        setup = Setup(Config(), make_mesh(MeshConfig()), DIGITS, pool)
        return evaluation.evaluate(setup, {}, prompts, jax.random.key(0), 2, file=file, **options)


def run(path, prompts, header=HEADER, **options):
    file = RecordFile(path, header, prompts)
    try:
        return evaluate(prompts, file=file, **options)
    finally:
        file.close()


def record(id, scores, given=None, **changed):
    count = len(scores)
    values = {
        "source": "sums",
        "answer": "4",
        "given": given if given is not None else ["4" if s else "5" for s in scores],
        "lengths": [10] * count,
        "truncated": [False] * count,
        "failures": [""] * count,
        "figures": {},
        **changed,
    }
    return Record(id=id, scores=[float(score) for score in scores], **values)


# Records.


def test_records_hold_every_answer_of_every_question(tmp_path):
    records = run(tmp_path / "sums.jsonl", questions(5), {**HEADER, "completions": True})
    assert [found.id for found in records] == ["q0", "q1", "q2", "q3", "q4"]
    assert records[4] == Record(
        id="q4",
        source="sums",
        answer="4",
        scores=[0.0, 1.0],  # tokens (3, 1) and (3, 2)
        given=["4", "5"],
        lengths=[2, 7],
        truncated=[False, True],
        failures=["", "timeout"],
        figures={"agreed_1": 1.0, "drafted_1": 4.0},
        completions=["answer 3 1 \ud800\x00", "another"],
    )
    header, read = read_records(tmp_path / "sums.jsonl")
    assert read == records
    assert header["num_questions"] == 5 and header["policy"] == "0123"
    assert evaluate(questions(5))[4] == records[4]._replace(completions=None)


def test_an_evaluation_killed_anywhere_ends_as_if_it_had_not_been(tmp_path):
    whole = tmp_path / "whole.jsonl"
    expected = run(whole, questions(7))
    content = whole.read_bytes()
    header = content.index(b"\n") + 1
    cut = tmp_path / "cut.jsonl"
    for length in [*range(header, len(content), 37), len(content) - 1, len(content)]:
        cut.write_bytes(content[:length])
        assert run(cut, questions(7)) == expected
        assert cut.read_bytes() == content


def test_answers_that_are_there_are_not_sampled_again(tmp_path):
    path, asked = tmp_path / "sums.jsonl", []

    def watched(part, start):
        asked.append((start, len(part)))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return sample(part, start)

    with pytest.raises(KeyboardInterrupt):
        run(path, questions(8), sampler=watched)
    assert run(path, questions(8), sampler=watched) == run(tmp_path / "b.jsonl", questions(8))
    assert asked == [(0, 3), (3, 3), (6, 2), (6, 2)]
    before = path.read_bytes()
    run(path, questions(8), sampler=watched)
    assert len(asked) == 4 and path.read_bytes() == before


def test_progress_is_told_of_what_is_there(tmp_path):
    seen = []
    run(tmp_path / "sums.jsonl", questions(7), show=lambda records: seen.append(len(records)))
    assert seen == [3, 6, 7]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"policy": "4567"}, "policy is '0123' in the file, '4567' in this evaluation"),
        ({"samples": 4}, "samples is 2 in the file, 4 in this evaluation"),
        ({"seed": 1}, "seed is 0 in the file, 1 in this evaluation"),
        ({"sampling": {"temperature": 0.6}}, "sampling is {'temperature': 1} in the file"),
        ({"verifier": "math_dapo"}, "verifier is None in the file, 'math_dapo' in this evaluation"),
    ],
)
def test_two_evaluations_never_mix(tmp_path, change, said):
    path = tmp_path / "sums.jsonl"
    run(path, questions(4))
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"holds the records of another evaluation") as caught:
        run(path, questions(4), header={**HEADER, **change})
    assert said in str(caught.value) and "choose another --output" in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("other", [questions(5), questions(4, answer="5"), questions(4)[::-1]])
def test_other_questions_are_another_evaluation(tmp_path, other):
    path = tmp_path / "sums.jsonl"
    run(path, questions(4))
    with pytest.raises(UserError, match="questions is '"):
        run(path, other)


def test_what_is_no_file_of_records_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "sums.jsonl"
    run(path, questions(4))
    lines = path.read_text().split("\n")
    for content, said in (
        ("", "is empty"),
        ("hello\n", "line 1 is damaged"),
        ('{"a": 1}\n', "is no file of evaluation records"),
        ("\n".join([lines[0], lines[1][:50], *lines[2:]]), "line 2 is damaged"),
        ("\n".join([lines[0], '{"id": "q0"}', *lines[2:]]), "line 2 is damaged: source is missing"),
        ("[]\n", "line 1 is damaged: it is no JSON object"),
        ("\n".join([lines[0], "[]", *lines[2:]]), "line 2 is damaged: it is no JSON object"),
        ("\n".join([lines[0], lines[1] + "\udcff", *lines[2:]]), "line 2 is damaged: "),
        ("\udcff\n", "line 1 is damaged: "),
        ("\n".join([without(lines[0], "format"), *lines[1:]]), "is no file of evaluation records"),
        ("\n".join([without(lines[0], "set"), *lines[1:]]), "line 1 is damaged: set is None"),
        ("\n".join([without(lines[0], "num_questions"), ""]), "line 1 .* num_questions is None"),
        *(
            (
                "\n".join([*lines[:2], without(lines[2], name), *lines[3:]]),
                f"line 3 .*: {name} is mis",
            )
            for name in ("id", "answer", "scores", "given", "lengths", "failures", "figures")
        ),
        ("\n".join([*lines[:2], without(lines[2], "", x=1), ""]), "line 3 .*: x is no field"),
        (
            "\n".join([*lines[:2], without(lines[2], "", scores=["1", 0]), ""]),
            r"scores is \['1', 0\]",
        ),
        ("\n".join([*lines[:2], without(lines[2], "", scores=[]), ""]), "scores holds 0 values"),
        ("\n".join([*lines[:2], without(lines[2], "", lengths=[1]), ""]), "holds 1 values for 2"),
        ("\n".join([*lines[:2], without(lines[2], "", figures=None), ""]), "figures is None"),
    ):
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
        attempts = (
            lambda: run(path, questions(4)),
            lambda: read_records(path),
            lambda: read_evaluation(tmp_path),
        )
        for attempt in attempts:
            with pytest.raises(UserError, match=said) as caught:
                attempt()
            assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
        assert path.read_bytes() == content.encode("utf-8", "surrogateescape")


def without(line, name, **changed):
    """A line of a file with a field taken out and others set."""
    values = {key: value for key, value in json.loads(line).items() if key != name}
    return json.dumps(values | changed)


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/sums.jsonl cannot be written: "):
        run(tmp_path / "file" / "sums.jsonl", questions(2))
    with pytest.raises(UserError, match=r"none.jsonl cannot be read: "):
        read_records(tmp_path / "none.jsonl")


def test_a_disk_that_fills_up_is_named_and_the_records_before_are_kept(tmp_path):
    path = tmp_path / "sums.jsonl"
    run(path, questions(7))
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:4]))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
    try:
        with pytest.raises(UserError, match=r"sums.jsonl cannot be written: File too large"):
            run(path, questions(7))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(path, questions(7))
    assert path.read_bytes() == whole


# Whose records.


def test_parameters_are_told_apart_by_any_bit_and_place():
    params = {"a": jnp.arange(24.0).reshape(4, 6), "b": jnp.ones(8, jnp.bfloat16)}
    known = fingerprint(params)
    assert len(known) == 16 and int(known, 16) >= 0
    assert fingerprint(jax.tree.map(jnp.copy, params)) == known
    a, b = params["a"], params["b"]
    others = [
        {"a": a.at[2, 3].set(jnp.nextafter(a[2, 3], 99.0)), "b": b},
        {"a": a.at[0, 0].set(-0.0), "b": b},
        {"a": a[::-1], "b": b},
        {"a": a.at[0].set(a[1]).at[1].set(a[0]), "b": b},
        {"a": a.reshape(6, 4), "b": b},
        {"a": a, "b": b.astype(jnp.float16)},
        {"a": a, "c": b},
    ]
    assert len({known, *map(fingerprint, others)}) == 8


def test_the_fingerprint_does_not_depend_on_where_parameters_lie():
    params = {"a": jnp.sin(jnp.arange(64.0)).reshape(8, 8), "b": jnp.arange(16, dtype=jnp.bfloat16)}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"a": PartitionSpec("x", "y"), "b": PartitionSpec(("x", "y"))}
    spread = {k: jax.device_put(v, NamedSharding(mesh, specs[k])) for k, v in params.items()}
    assert fingerprint(spread) == fingerprint(params)


def test_a_changed_reward_file_is_another_verifier(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def score(*_): return 1\n")
    first = verifier_identity(f"{file}:score")
    assert first.startswith(f"{file}:score ") and verifier_identity(f"{file}:score") == first
    file.write_text("def score(*_): return 0\n")
    assert verifier_identity(f"{file}:score") != first
    assert verifier_identity("math_dapo") == "math_dapo"


def test_so_is_a_changed_module(tmp_path, monkeypatch):
    package = tmp_path / "own_rewards"
    (package / "inner").mkdir(parents=True)
    for file in (package / "__init__.py", package / "inner" / "__init__.py"):
        file.write_text("raise AssertionError('imported')\n")
    module = package / "inner" / "rules.py"
    module.write_text("def score(*_): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for content in ("def score(*_): return 0\n", "def score(*_): return 1\n"):
        module.write_text(content)
        found.append(verifier_identity("own_rewards.inner.rules:score"))
    assert found[0].startswith("own_rewards.inner.rules:score ") and found[0] != found[1]
    assert verifier_identity("own_rewards:score") != "own_rewards:score"
    for name in ("own_rewards.none:score", "own_rewards.inner.rules.x:score", "sys:exit", "no:no"):
        assert verifier_identity(name) == name


def test_records_lie_beside_the_checkpoints_of_a_run_alone(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "models" / "mimo"
    published = tmp_path / "published"
    for directory in (run / "checkpoints" / "20", other):
        (directory / "params").mkdir(parents=True)
        (directory / "manifest.json").write_text("{}\n")
    published.mkdir()
    (published / "config.json").write_text('{"model_type": "mimo"}')
    expected = run / "evaluations" / "20"
    assert evaluation_directory(run / "checkpoints" / "20") == expected
    assert evaluation_directory(other) == Path("evaluations/mimo")
    assert evaluation_directory(published) == Path("evaluations/published")
    monkeypatch.chdir(run / "checkpoints")
    assert evaluation_directory(Path("20")) == expected


# Figures.


def test_figures_by_hand():
    records = [
        record("q0", [1, 1, 0, 0], lengths=[1, 2, 3, 4], figures={"agreed_1": 3, "drafted_1": 4}),
        record(
            "q1", [0, 0, 0, 0], truncated=[True] * 4, figures={"agreed_1": 0, "drafted_1": 4}
        )._replace(failures=["", "timeout", "", "death"]),
    ]
    figures = summarise(records)
    half = 1.959964 * math.sqrt(0.125) / math.sqrt(2)  # means 0.5 and 0: std sqrt(0.125)
    assert figures == pytest.approx(
        {
            "val/avg@4": 0.25,
            "val/avg@4_ci95": half,
            "val/accuracy": 0.25,
            "val/pass@4": 0.5,
            "val/maj@4": 0.25,  # a tie, and a miss
            "val/response_length/mean": 50 / 8,
            "val/response_length/clip_ratio": 0.5,
            "val/verifier_failures": 2,
            "val/agreement_1": 3 / 8,
        },
        rel=1e-6,
    )


def test_partial_credit_is_averaged_but_only_full_marks_pass():
    measures = per_question([record("q0", [0.5, 1, 0.25, 0], given=[None] * 4)], [1, 4])
    assert {name: values.tolist() for name, values in measures.items()} == {
        "avg@4": [0.4375],
        "pass@1": [0.25],
        "pass@4": [1.0],
    }, "and without answers there is no majority"


def test_an_objective_has_an_interval_of_its_own():
    records = [record(f"q{i}", [1], figures={"objective": i / 4}) for i in range(5)]
    figures = summarise(records)
    assert figures["val/objective"] == pytest.approx(0.5)
    assert figures["val/objective_ci95"] == pytest.approx(
        1.959964 * np.std([0, 1, 2, 3, 4], ddof=1) / 4 / math.sqrt(5), rel=1e-6
    )
    assert "val/avg@1_ci95" not in summarise(records[:1]), "one question has no interval"


def test_the_report_is_json_and_its_table_leaves_out_what_nobody_has():
    easy = [record("q0", [1, 1]), record("q1", [1, 0], lengths=[30, 50])]
    hard = [record("q0", [0, 0], failures=["timeout", "error"])]
    report = evaluation_report({"easy": easy, "hard": hard}, [1, 2])
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["sets"]["easy"]["avg@2"]["mean"] == 0.75
    assert report["sets"]["hard"]["avg@2"] == {"mean": 0.0, "half_width": None}
    assert report["sets"]["easy"]["response_length"] == {
        "mean": 25.0,
        "median": 20.0,
        "p95": pytest.approx(47.0),
        "max": 50,
    }
    assert report["sets"]["hard"]["verifier_failures"] == {"timeout": 1, "death": 0, "error": 1}
    assert report["mean"]["avg@2"] == {"mean": 0.375, "half_width": None}
    header, *rows = evaluation_cells(report)
    assert "agreement" not in header and "objective" not in header
    cells = [dict(zip(header, row, strict=True)) for row in rows]
    assert cells[0]["avg@2"] == "75.0 ± 49.0"
    assert (cells[1]["pass@2"], cells[1]["not judged"]) == ("0.0", "2")
    assert (cells[2]["set"], cells[2]["pass@2"], cells[2]["tokens"]) == (
        "mean of sets",
        "50.0",
        "–",
    )


def test_majorities_of_too_many_answers_are_refused_before_they_are_computed():
    many = [record("q0", [1] * 1001)]
    with pytest.raises(UserError, match=r"--k is 8 of 1,001 samples a question; .* \(--k 1001\)"):
        per_question(many, [1001, 8])
    assert per_question(many, [1001])["maj@1001"] == [1]
    nameless = [many[0]._replace(given=[None] * 1001)]
    assert per_question(nameless, [8])["pass@8"] == [1]
    assert per_question([record("q0", [1] * 1000)], [8])["maj@8"] == [1]


def test_more_answers_than_there_are_cannot_be_asked_of():
    with pytest.raises(UserError, match="--k is 3; it must be at most the 2 answers"):
        per_question([record("q0", [1, 0])], [3])
    with pytest.raises(UserError, match="question q1 of sums has 1 answers, others 2"):
        per_question([record("q0", [1, 0]), record("q1", [1])], [1])


# Two evaluations.


def written(directory, records, prompts=None, name="sums", **header):
    prompts = prompts if prompts is not None else questions(len(records))
    file = RecordFile(directory / f"{name}.jsonl", {**HEADER, "set": name, **header}, prompts)
    file.append(records)
    file.close()
    return directory


def test_two_policies_are_compared_question_by_question(tmp_path):
    a = [record("q0", [0, 0]), record("q1", [1, 0]), record("q2", [1, 1]), record("q3", [1, 0])]
    b = [
        record("q0", [1, 1, 0, 0]),
        record("q1", [1, 0, 0, 1]),
        record("q2", [1, 1, 1, 1]),
        record("q3", [1, 0, 0, 0]),
    ]
    written(tmp_path / "a", a)
    written(tmp_path / "b", b, policy="4567", samples=4, sampling={"temperature": 0.6})
    first, second = read_evaluation(tmp_path / "a"), read_evaluation(tmp_path / "b")
    found = compare_evaluations(first, second, [])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    average, passed, _ = found["rows"]
    assert (average["measure"], passed["measure"]) == ("avg", "pass@2")
    assert average["difference"]["mean"] == pytest.approx(0.0625)  # 0.5, 0, 0, -0.25
    assert (average["better"], average["worse"], average["equal"]) == (1, 1, 2)
    # pass@2 of c of 4: 1 - C(4-c, 2) / 6, so 5/6, 5/6, 1, 1/2 against 0, 1, 1, 1.
    assert passed["a"]["mean"] == 0.75
    assert passed["b"]["mean"] == pytest.approx((5 / 6 + 5 / 6 + 1 + 1 / 2) / 4)
    assert found["settings"] == {
        "sums": {"samples": [2, 4], "sampling": [{"temperature": 1}, {"temperature": 0.6}]}
    }
    header, row, *_ = comparison_cells(found)
    assert row[header.index("B - A")].startswith("+6.2 ± 30.") and "*" not in row[5]
    assert row[header.index("better/worse/equal")] == "1/1/2"


def test_a_difference_beyond_its_interval_is_marked(tmp_path):
    worse = [record(f"q{i}", [0, 0, 0, i % 2]) for i in range(8)]
    better = [record(f"q{i}", [1, 1, 0, i % 2]) for i in range(8)]
    a, b = written(tmp_path / "a", worse), written(tmp_path / "b", better)
    cells = comparison_cells(compare_evaluations(read_evaluation(a), read_evaluation(b), [1]))
    assert cells[1][5] == "+50.0 ± 0.0*"
    same = comparison_cells(compare_evaluations(read_evaluation(a), read_evaluation(a), [1]))
    assert same[1][5] == "+0.0 ± 0.0"


def test_several_sets_have_a_mean_difference(tmp_path):
    for name, gains in (("sums", (0, 1)), ("products", (1, 1))):
        for side, policy in (("a", "0"), ("b", "1")):
            records = [
                record(f"q{i}", [float(policy) * gain], given=["4"]) for i, gain in enumerate(gains)
            ]
            written(tmp_path / side, records, name=name, policy=policy)
    written(tmp_path / "a", [record("q0", [1])], name="only_in_a")
    found = compare_evaluations(
        read_evaluation(tmp_path / "a"), read_evaluation(tmp_path / "b"), [1]
    )
    assert {row["set"] for row in found["rows"]} == {"sums", "products"}
    assert found["mean"]["difference"]["mean"] == pytest.approx(0.75)
    assert comparison_cells(found)[-1][0] == "mean of sets"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: [r[0], r[1]._replace(answer="5")], "q1 has different answers"),
        (lambda r: [r[0], r[1]._replace(id="q9")], "only one of them has q1"),
        (lambda r: r[::-1], "different orders"),
    ],
)
def test_different_questions_cannot_be_compared(tmp_path, change, said):
    records = [record("q0", [1]), record("q1", [0])]
    a, b = written(tmp_path / "a", records), written(tmp_path / "b", change(records))
    with pytest.raises(UserError, match=said):
        compare_evaluations(read_evaluation(a), read_evaluation(b), [])


def test_what_cannot_be_compared_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no records of an evaluation"):
        read_evaluation(tmp_path)
    a = written(tmp_path / "a", [record("q0", [1])])
    b = written(tmp_path / "b", [record("q0", [1])], name="products")
    with pytest.raises(UserError, match=r"\(sums\) and .* \(products\) have no set in common"):
        compare_evaluations(read_evaluation(a), read_evaluation(b), [])
    written(tmp_path / "c", [record("q0", [1])], prompts=questions(3))
    with pytest.raises(UserError, match=r"holds 1 of 3 questions; start its evaluation again"):
        read_evaluation(tmp_path / "c")
