"""Publishers' files to prepared sets: what is kept, what is refused, and in which words."""

import json
import socket

import pytest
from hypothesis import given, strategies as st

from occ_jax.cli.arguments import main
from occ_jax.data import answers
from occ_jax.data.chat import Message
from occ_jax.data.prepared import open_set
from occ_jax.data.published import PUBLISHED
from tests.published_files import dapo_row, dapo_rows, json_lines, parquet, rows_of


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the network is not to be touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def prepared(capsys, *arguments):
    """Runs the command; its output and every example of the set."""
    *rest, directory = map(str, arguments)
    assert main(["prepare", *rest, "--data-directory", directory]) == 0, capsys.readouterr().err
    found = open_set(arguments[-1], rest[0])
    return capsys.readouterr().out, [found.example(index) for index in range(found.size)]


def refused(capsys, *arguments):
    """Runs the command; the one line it answers, having written nothing."""
    *rest, directory = map(str, arguments)
    assert main(["prepare", *rest, "--data-directory", directory]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not arguments[-1].exists()
    return captured.err.removeprefix("error: ").strip()


# What the sets become.


@pytest.mark.parametrize("write", [parquet, json_lines])
@pytest.mark.parametrize(
    ("name", "publisher", "identity", "answer"),
    [
        ("dapo_math_17k", "BytedTsinghua-SIA/DAPO-Math-17k", "9a9b6eb4-0003", "4"),
        ("aime24", "HuggingFaceH4/aime_2024", "63", "4"),
        ("aime24", "Maxwell-Jia/AIME_2024", "2024-I-3", "4"),
        ("aime24", "BytedTsinghua-SIA/AIME-2024", "3", "4"),
        ("aime25", "math-ai/aime25", "3", "4"),
        ("aime25", "yentinglin/aime_2025", "3", "4"),
        ("aime25", "opencompass/AIME2025", "4", "4"),
        ("amc23", "math-ai/amc23", "3", "4"),
        ("math500", "HuggingFaceH4/MATH-500", "test/algebra/3.json", r"\frac{4}{1}"),
        ("minerva", "math-ai/minervamath", "4", "4e-3"),
        ("olympiadbench", "Hothan/OlympiadBench", "1603", r"$\frac{3}{1}$,-3"),
        ("gsm8k_train", "openai/gsm8k", "4", "4"),
        ("gsm8k_test", "openai/gsm8k", "4", "4"),
    ],
)
def test_every_publishers_schema(capsys, tmp_path, write, name, publisher, identity, answer):
    file = write(tmp_path / "rows", rows_of(publisher, 5))
    out, examples = prepared(capsys, name, "--source", file, "--allow-row-count", tmp_path / "data")
    assert f"{name}/1.0.0: 5 problems of " in out
    assert len(examples) == 5
    fourth = examples[3]
    assert (fourth.id, fourth.answer, fourth.source) == (identity, answer, name)
    if publisher.startswith("BytedTsinghua"):
        text = "solve it.\n\nwhat is 3 + 1?\n\nend with answer:"
        assert fourth.prompt == (Message("user", text),)
    elif publisher.startswith("Hothan"):
        assert fourth.prompt == "let n be an integer.\nfind all n with n^2 = 9."
        assert examples[2].prompt == "find all n with n^2 = 4."
    else:
        assert fourth.prompt == "what is 3 + 1?"


def test_every_published_set_and_publisher_is_tested():
    cases = test_every_publishers_schema.pytestmark[0].args[1]
    assert {case[0] for case in cases} == set(PUBLISHED)
    named = {
        publisher
        for problem_set in PUBLISHED.values()
        for columns in problem_set.columns
        for publisher in columns.publisher.split(" and ")
    }
    # The last has the columns of Hothan's.
    assert named == {case[1] for case in cases} | {"math-ai/olympiadbench"}


def test_repeated_prompts_are_kept_once(capsys, tmp_path):
    rows = [*dapo_rows(40, copies=2), dapo_row(77, "what is 5 + 1?", "7")]
    file = parquet(tmp_path / "dapo.parquet", rows)
    out, examples = prepared(
        capsys, "dapo_math_17k", "--source", file, "--allow-row-count", tmp_path / "data"
    )
    assert "40 problems of 81 rows" in out
    assert "left out: 41 rows that repeat a prompt, 1 of them with another answer" in out
    assert [example.answer for example in examples] == [str(index + 1) for index in range(40)]


def test_no_row_is_lost_and_none_moves(capsys, tmp_path):
    """More than one batch of the reader, and than TFDS's Parquet writer kept of 1000."""
    file = parquet(tmp_path / "train.parquet", rows_of("openai/gsm8k", 7473))
    out, examples = prepared(capsys, "gsm8k_train", "--source", file, tmp_path / "data")
    assert "7,473 problems of 7,473 rows" in out
    assert [example.prompt for example in examples] == [
        f"what is {index} + 1?" for index in range(7473)
    ]
    assert [example.answer for example in examples] == [str(index + 1) for index in range(7473)]


def test_a_set_may_lie_in_several_files(capsys, tmp_path):
    rows = rows_of("opencompass/AIME2025", 30)
    files = [
        json_lines(tmp_path / f"aime2025-{part}.jsonl", rows[start : start + 15])
        for part, start in (("I", 0), ("II", 15))
    ]
    _, examples = prepared(capsys, "aime25", "--source", *files, tmp_path / "data")
    assert [example.id for example in examples] == [str(index + 1) for index in range(30)]


def test_own_data(capsys, tmp_path):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "é?"}]
    rows = [
        {"task": {"text": "1 + 1?"}, "gold": 2, "key": "a"},
        {"task": {"text": chat}, "gold": "1,000", "key": "b"},
        {"task": {"text": "1 + 1?"}, "gold": 2, "key": "c"},
    ]
    file = json_lines(tmp_path / "own.jsonl", rows)
    columns = ("--prompt-column", "task.text", "--answer-column", "gold", "--id-column", "key")
    checks = ("--answers", "integer", "--distinct")
    out, examples = prepared(
        capsys, "my_own", "--source", file, *columns, *checks, tmp_path / "data"
    )
    assert "2 problems of 3 rows" in out
    assert [(example.id, example.prompt, example.answer) for example in examples] == [
        ("a", "1 + 1?", "2"),
        ("b", (Message("system", "be brief"), Message("user", "é?")), "1000"),
    ]


def test_bad_answers_may_be_left_out(capsys, tmp_path):
    rows = rows_of("math-ai/amc23", 4)
    rows[1]["answer"] = "twelve"
    file = json_lines(tmp_path / "amc.jsonl", rows)
    options = ("--allow-row-count", "--drop-bad-rows")
    out, examples = prepared(capsys, "amc23", "--source", file, *options, tmp_path / "data")
    assert "3 problems of 4 rows" in out
    assert "left out: 1 rows whose answer does not parse" in out
    assert [example.id for example in examples] == ["0", "2", "3"]


# What is refused.


def changed(publisher, index, **values):
    """Five rows of a publisher, with values of one of them changed or, by None, taken away."""
    rows = rows_of(publisher, 5)
    kept = {name: value for name, value in (rows[index] | values).items() if value is not None}
    return [*rows[:index], kept, *rows[index + 1 :]]


MINERVA, AMC, AIME = "math-ai/minervamath", "math-ai/amc23", "HuggingFaceH4/aime_2024"


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("minerva", changed(MINERVA, 2, answer=None), "{file} row 3: no value of answer"),
        ("minerva", changed(MINERVA, 2, answer=" "), "{file} row 3: answer ' ' is empty"),
        ("minerva", changed(MINERVA, 2, question=""), "{file} row 3: question is empty"),
        ("minerva", changed(MINERVA, 2, question=7), "row 3: question is neither a text nor"),
        ("minerva", changed(MINERVA, 2, question="\ud800"), "row 3: question is no valid Unicode"),
        (
            "minerva",
            changed(MINERVA, 2, answer=r"\frac{1}{2"),
            r"{file} row 3: answer '\\frac{{1}}{{2' has unbalanced braces or dollars",
        ),
        ("amc23", changed(AMC, 4, answer="4/2"), "{file} row 5: answer '4/2' is no number"),
        ("amc23", changed(AMC, 4, id=1), "{file} row 5: id 1 is also the id of {file} row 2"),
        ("aime24", changed(AIME, 0, answer="1000"), "row 1: answer '1000' is no integer from 0"),
        ("aime24", changed(AIME, 0, answer="3.5"), "row 1: answer '3.5' is no integer"),
        (
            "gsm8k_test",
            changed("openai/gsm8k", 1, answer="2"),
            "row 2: answer '2' has no \"####\" before its last number",
        ),
        (
            "dapo_math_17k",
            [*dapo_rows(2), dapo_row(2, "?", "x") | {"prompt": [{"role": "user"}]}],
            "row 3: prompt holds a message without role or content",
        ),
        (
            "dapo_math_17k",
            [dapo_row(0, "?", "1") | {"prompt": [{"role": "assistant", "content": "hi"}]}],
            "row 1: prompt ends with a turn of assistant, not of user",
        ),
        (
            "dapo_math_17k",
            [dapo_row(0, "?", "1") | {"reward_model": {"style": "rule"}}],
            "row 1: no value of reward_model.ground_truth",
        ),
        ("minerva", rows_of(AIME, 5), "has columns id, problem, solution, answer, url, year; "),
        ("minerva", rows_of(AIME, 5), "minerva needs question and answer (math-ai/minervamath)"),
        ("aime24", rows_of(AIME, 29), "29 problems in 29 rows; aime24 has 30. Is a file missing"),
        (
            "olympiadbench",
            rows_of("Hothan/OlympiadBench", 3),
            "3 problems in 3 rows; olympiadbench has 674 or 675.",
        ),
    ],
)
def test_a_bad_row_is_named(capsys, tmp_path, name, rows, said):
    file = json_lines(tmp_path / "rows.jsonl", rows)
    allow = () if "Is a file missing" in said or "674" in said else ("--allow-row-count",)
    line = refused(capsys, name, "--source", file, *allow, tmp_path / "data")
    assert said.format(file=file) in line


def test_a_bad_row_of_parquet_is_named_in_its_own_file(capsys, tmp_path):
    first = parquet(tmp_path / "first.parquet", rows_of(AIME, 20))
    rows = [row | {"id": 90 + index} for index, row in enumerate(rows_of(AIME, 10))]
    rows[6]["answer"] = "?"
    second = parquet(tmp_path / "second.parquet", rows)
    line = refused(capsys, "aime24", "--source", first, second, tmp_path / "data")
    assert line.startswith(f"{second} row 7: answer '?' is no number")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "holds no rows"),
        (b"PAR1 and no more", "is damaged Parquet"),
        (b"version https://git-lfs\noid", "row 1: neither Parquet nor JSON lines"),
        (b'{"question": "1?", "answer": "1"}\n{"question', "row 2: no valid JSON"),
        (b'{"question": "1?", "answer": "1"}\n[1, 2]\n', "row 2: a JSON object is expected"),
        (b'{"question": "\xff", "answer": "1"}\n', "row 1: neither Parquet nor JSON lines"),
    ],
)
def test_unreadable_files_are_named(capsys, tmp_path, content, said):
    file = tmp_path / "rows"
    file.write_bytes(content)
    line = refused(capsys, "minerva", "--source", file, tmp_path / "data")
    assert line.startswith(f"{file} ")
    assert said in line


def test_parquet_without_rows_is_refused(capsys, tmp_path):
    import pyarrow

    table = pyarrow.table({"question": pyarrow.array([], "string")})
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, file)
    assert "holds no rows" in refused(capsys, "minerva", "--source", file, tmp_path / "data")


def test_parquet_damaged_in_the_middle_is_refused(capsys, tmp_path):
    file = parquet(tmp_path / "rows.parquet", rows_of(MINERVA, 5000))
    content = bytearray(file.read_bytes())
    content[200:4000] = b"\0" * 3800
    file.write_bytes(content)
    assert f"{file} is damaged" in refused(capsys, "minerva", "--source", file, tmp_path / "data")


OWN = ("--prompt-column", "question", "--answer-column", "answer")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("aime_24",), "aime_24 is no published set"),
        (("aime_24",), "did you mean aime24"),
        (("Mine", *OWN), "'Mine' is no name for a set"),
        (("minerva", *OWN), "minerva is a published set with columns of its own"),
        (("mine", "--prompt-column", "question"), "needs both"),
        (("minerva", "--distinct"), "needs both"),
        (("minerva", "--answers", "latex"), "needs both"),
        (("mine", *OWN, "--answers", "prose"), "invalid choice"),
        (("mine", *OWN, "--id-column", "key"), "mine needs question and answer and key"),
        (("mine", *OWN, "--answers", "integer"), "row 1: answer '1e-3' is no integer"),
        (("minerva", "--model.hidden-size", "3"), "unknown argument --model.hidden-size"),
    ],
)
def test_mistaken_arguments_get_one_line(capsys, tmp_path, arguments, said):
    file = json_lines(tmp_path / "rows.jsonl", rows_of(MINERVA, 5))
    assert said in refused(capsys, *arguments, "--source", file, tmp_path / "data")


def test_what_is_prepared_is_not_overwritten(capsys, tmp_path):
    file = json_lines(tmp_path / "rows.jsonl", rows_of(MINERVA, 5))
    command = ["prepare", "minerva", "--source", str(file), "--allow-row-count"]
    command += ["--data-directory", str(tmp_path / "data")]
    assert main(command) == 0
    before = {p: p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()}
    assert main(command) == 2
    assert "is prepared already; delete it" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "data").rglob("*") if p.is_file()} == before


def test_a_directory_that_cannot_be_written_is_named(capsys, tmp_path):
    file = json_lines(tmp_path / "rows.jsonl", rows_of(MINERVA, 5))
    command = ["prepare", "minerva", "--source", str(file), "--allow-row-count"]
    assert main([*command, "--data-directory", str(file / "data")]) == 2
    assert f"{file / 'data'} cannot be written" in capsys.readouterr().err


# Answers.


@pytest.mark.parametrize(
    ("read", "value", "expected"),
    [
        (answers.number, "27.0", "27"),
        (answers.number, 27.0, "27"),
        (answers.number, "-1,234,567", "-1234567"),
        (answers.number, "0.50", "0.5"),
        (answers.number, "1e3", "1000"),
        (answers.integer, 7, "7"),
        (answers.integer, "-007", "-7"),
        (answers.aime, "025", "25"),
        (answers.aime, "336^\\circ", "336"),
        (answers.aime, "336^{\\circ}", "336"),
        (answers.aime, "336°", "336"),
        (answers.gsm8k, "#### 1\nno\n#### 2,000", "2000"),
        (answers.latex, " $\\frac{1}{2}$ ", "\\frac{1}{2}"),
        (answers.latex, "$1$, $2$", "$1$, $2$"),
        (answers.latex, ["$1$", "\\{2\\}"], "1, \\{2\\}"),
        (answers.latex, "[0, 1)", "[0, 1)"),
        (answers.latex, r"\left\{x\right\}, \$5", r"\left\{x\right\}, \$5"),
    ],
)
def test_answers_by_hand(read, value, expected):
    assert read(value) == expected


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (answers.any_text, "  "),
        (answers.number, "1,23"),
        (answers.number, "nan"),
        (answers.number, "1e999999999"),
        (answers.number, "1e-999999999"),
        (answers.number, "1 2"),
        (answers.integer, "1.5"),
        (answers.integer, "1e-3"),
        (answers.aime, "-1"),
        (answers.aime, "1000"),
        (answers.gsm8k, "12"),
        (answers.latex, "}{"),
        (answers.latex, "{"),
        (answers.latex, "$1"),
        (answers.latex, "$$"),
        (answers.latex, []),
        (answers.latex, ["1", ""]),
    ],
)
def test_what_is_no_answer_is_refused(read, value):
    with pytest.raises(ValueError):
        read(value)


@given(value=st.integers(-(10**12), 10**12))
def test_numbers_are_read_however_they_are_written(value):
    for text in (str(value), f"{value:,}", f"{value}.00", f"{value:+}"):
        assert answers.integer(text) == str(value)


@given(text=st.text(max_size=20) | st.text("{}$\\ 1", max_size=12))
def test_any_text_is_an_answer_or_a_value_error(text):
    for read in (answers.any_text, answers.number, answers.aime, answers.gsm8k, answers.latex):
        try:
            assert read(text).strip()
        except ValueError:
            continue


# Prepared sets.


def small_set(tmp_path):
    file = json_lines(tmp_path / "rows.jsonl", rows_of(MINERVA, 5))
    command = ["prepare", "minerva", "--source", str(file), "--allow-row-count"]
    assert main([*command, "--data-directory", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def test_a_prepared_set_remembers_its_files(tmp_path):
    directory = small_set(tmp_path)
    metadata = json.loads((directory / "minerva" / "1.0.0" / "metadata.json").read_text())
    assert metadata == {"files": ["rows.jsonl"]}
    assert [path.name for path in directory.iterdir()] == ["minerva"]
