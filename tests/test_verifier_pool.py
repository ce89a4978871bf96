"""The pool under workers that hang, die, overflow and lie; and users' own functions."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import typing
from pathlib import Path

import numpy as np
import pytest

from occ_jax.config import Config, RewardConfig, TaskConfig, Verifier
from occ_jax.data.examples import Example
from occ_jax.data.tokenizer import DIGITS
from occ_jax.errors import UserError
from occ_jax.rewards.judging import judge_completions, open_pool
from occ_jax.rewards.pool import Item, VerifierPool, reward_metrics

ROOT = Path(__file__).parent.parent
# What a completion asks for, this function does.
FUNCTION = """
import math, os, signal, subprocess, sys, time

print("imported", flush=True)
ONCE = []

def score(completion, answer, record):
    match completion.split(":"):
        case ["value", text]: return float(text)
        case ["length"]: return len(answer)
        case ["record"]: return float(record["prompt"] == "p" and record["source"] == "s")
        case ["hang"]: sum(range(10**13))  # in C, deaf to signals
        case ["deaf"]: signal.setitimer(signal.ITIMER_REAL, 0); sum(range(10**13))
        case ["sleep", text]: time.sleep(float(text)); return 1
        case ["exit"]: os._exit(3)
        case ["quit"]: sys.exit(3)
        case ["kill"]: os.kill(os.getpid(), signal.SIGKILL)
        case ["fill"]: return len(bytearray(2**40))
        case ["recurse"]: return score(completion, answer, record)
        case ["raise"]: raise KeyError("no such\\nkey")
        case ["none"]: return None
        case ["text"]: return "1"
        case ["nan"]: return math.nan
        case ["big"]: return 10**400
        case ["true"]: return True
        case ["print"]: print("from a worker"); return 1
        case ["jax"]: return sum(name.split(".")[0] in ("jax", "jaxlib") for name in sys.modules)
        case ["platform"]: return float(os.environ["JAX_PLATFORMS"] == "cpu")
        case ["pid"]: return os.getpid()
        case ["spawn", path]:
            child = subprocess.Popen(["sleep", "1000"])
            open(path, "w").write(str(child.pid))
            sum(range(10**13))
    return len(completion)
"""


@pytest.fixture
def function(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(FUNCTION)
    return f"{path}:score"


def pool_of(*verifiers, workers=2, deadline_s=1.0, memory_mib=1024):
    config = RewardConfig(workers=workers, deadline_s=deadline_s, memory_mib=memory_mib)
    return VerifierPool(verifiers, config)


def pids(pool, function):
    """Those of both workers: one sleeps while the other answers."""
    found = pool.judge([Item(function, "pid", "") for _ in range(64)])
    return sorted({int(score) for score in found.scores})


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_verdicts_come_back_in_order():
    with pool_of("exact_match", "math_dapo", "last_step") as pool:
        items = [Item("exact_match", str(i), str(i - i % 3 % 2)) for i in range(1000)]
        items += [Item("math_dapo", f"Answer: {i}", "7") for i in range(10)]
        items += [Item("last_step", "1>7", "7")]
        for _ in range(2):
            found = pool.judge(items)
            assert found.scores.dtype == np.float32
            assert found.scores[:1000].tolist() == [float(i % 3 != 1) for i in range(1000)]
            assert found.scores[1000:].tolist() == [i == 7 for i in range(10)] + [1]
            assert found.given[:2] == ["0", "1"] and found.given[-1] == "7"
            assert set(found.failures) == {""}
        assert len(pool.judge([]).scores) == 0
    metrics = reward_metrics([found, found])
    assert metrics["timing_s/reward"] == pytest.approx(2 * found.seconds)
    assert metrics["perf/reward_throughput"] == pytest.approx(1011 / found.seconds)
    assert [metrics[f"reward/{kind}"] for kind in ("timeouts", "deaths", "errors")] == [0, 0, 0]


def test_jax_is_kept_out_of_the_workers(function):
    verifiers = (*typing.get_args(Verifier), function)
    with pool_of(*verifiers, workers=1) as pool:
        found = pool.judge([Item(function, "jax", ""), Item(function, "platform", "")])
    assert found.scores.tolist() == [0, 1]


def test_a_function_of_the_users_own(function, capfd):
    record = {"id": "7", "source": "s", "prompt": "p"}
    with pool_of(function, workers=1) as pool:
        texts = ("value:0.25", "value:-3", "true", "record", "print", "length", "\ud800\x00")
        found = pool.judge([Item(function, text, "abc", record) for text in texts])
    assert found.scores.tolist() == [0.25, -3, 1, 1, 1, 3, 2]
    assert found.given == [None] * 7
    out, err = capfd.readouterr()
    assert "from a worker" not in out and "from a worker" in err


def test_a_module_on_the_path_can_hold_the_function(tmp_path, monkeypatch):
    package = tmp_path / "my_rewards"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "own.py").write_text("from my_rewards import helper\nscore = helper.score\n")
    (package / "helper.py").write_text("def score(completion, answer, record): return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pool_of("my_rewards.own:score", workers=1) as pool:
        assert pool.judge([Item("my_rewards.own:score", "", "")]).scores.tolist() == [1]


def test_only_the_completion_at_hand_is_lost(function, caplog):
    bad = {"hang": "timeout", "exit": "death", "kill": "death", "fill": "error", "quit": "error"}
    bad |= dict.fromkeys(("raise", "none", "text", "nan", "big", "recurse"), "error")
    texts = [f"value:{i}" for i in range(200)]
    for place, text in enumerate(bad):
        texts.insert(7 * place, text)
    with pool_of(function) as pool:
        started = time.monotonic()
        found = pool.judge([Item(function, text, "", {"id": f"q{text}"}) for text in texts])
        assert time.monotonic() - started < 20
        for text, score, failure in zip(texts, found.scores, found.failures, strict=True):
            assert failure == bad.get(text, "")
            assert score == (0 if text in bad else float(text.removeprefix("value:")))
        metrics = reward_metrics([found])
        assert [metrics[f"reward/{kind}"] for kind in ("timeouts", "deaths", "errors")] == [1, 2, 8]
        assert pool.judge([Item(function, "value:5", "")] * 9).scores.tolist() == [5] * 9
    (line,) = [found.getMessage() for found in caplog.records]
    said = "11 of 211 verdicts failed (time-outs 1, deaths 2, errors 8), the first: "
    assert line.startswith(said) and line.endswith(" on qhang") and "\n" not in line


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hang", "no verdict of 2 of 2: {} took longer than reward.deadline_s on q7"),
        (
            "exit",
            "no verdict of 2 of 2: the process of {} ended, or was killed for its memory on q7",
        ),
    ],
)
def test_a_function_that_never_returns_ends_the_run(function, text, said):
    record = {"id": "q7"}
    with pool_of(function, "exact_match", deadline_s=0.3) as pool:
        items = [Item(function, text, "", record), Item(function, text, "", record)]
        with pytest.raises(UserError) as caught:
            pool.judge([*items, Item("exact_match", "1", "1")])
        assert str(caught.value) == said.format(function)
        assert pool.judge([Item("exact_match", "1", "1")]).scores.tolist() == [1]


def test_time_outs_and_deaths_are_told_of(function, caplog):
    with pool_of(function, "math_verify", workers=1, deadline_s=0.5) as pool:
        tower = Item("math_verify", r"\boxed{9^{9^{9^9}}}", "34", {"id": "q1"})
        assert pool.judge([tower]).failures == ["timeout"], "no function of the user's: no end"
        pool.judge([Item(function, "value:1", ""), Item(function, "kill", "")])
    assert [found.getMessage() for found in caplog.records] == [
        "1 of 1 verdicts failed (time-outs 1), the first: math_verify took longer than "
        "reward.deadline_s on q1",
        "1 of 2 verdicts failed (deaths 1), the first: the process of "
        f"{function} ended, or was killed for its memory",
    ]


def test_hanging_workers_cost_a_deadline_each_and_hold_up_nobody(function):
    # Six of one second on two workers: three rounds.
    with pool_of(function) as pool:
        items = [Item(function, "hang", "")] * 6 + [Item(function, "value:1", "")] * 100
        found = pool.judge(items)
    assert found.failures.count("timeout") == 6 and found.scores.sum() == 100
    assert 3 <= found.seconds < 8


def test_a_slow_verifier_within_its_deadline_is_awaited(function):
    with pool_of(function, workers=1) as pool:
        found = pool.judge([Item(function, "sleep:0.4", "")] * 5)  # 2 s for a deadline of 1
    assert found.scores.tolist() == [1] * 5


def test_large_completions_pass_and_do_not_jam(function):
    huge = "x" * (64 * 2**20)
    with pool_of(function, "exact_match", deadline_s=3.0) as pool:
        items = [Item(function, huge, ""), Item("exact_match", huge, huge)]
        items += [Item("exact_match", "y" * 100_000, "y" * 100_000)] * 50
        items += [Item(function, "hang", ""), Item(function, huge, "")]
        found = pool.judge(items)
    assert found.scores.tolist() == [len(huge), *[1] * 51, 0, len(huge)]
    assert len(found.given[1]) < 300


def test_what_hangs_is_killed_with_all_it_started(function, tmp_path):
    with pool_of(function, workers=1) as pool:
        items = [Item(function, f"spawn:{tmp_path / 'pid'}", ""), Item(function, "value:1", "")]
        assert pool.judge(items).failures == ["timeout", ""]
        child = int((tmp_path / "pid").read_text())
        wait_until(lambda: gone(child))


def wait_until(condition, seconds=10):
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < seconds
        time.sleep(0.01)


def test_closing_leaves_no_process(function):
    pool = pool_of(function)
    workers = pids(pool, function)
    assert workers and not any(map(gone, workers))
    pool.close()
    assert all(map(gone, workers)), "reaped, too: a zombie would still answer to signals"
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.judge([Item(function, "value:1", "")])


def test_a_pool_that_is_dropped_closes_itself(function):
    pool = pool_of(function)
    workers = pids(pool, function)
    del pool
    assert all(map(gone, workers))


def test_a_worker_that_dies_between_batches_is_nobodys_fault(function):
    with pool_of(function, workers=1) as pool:
        (worker,) = pids(pool, function)
        os.kill(worker, signal.SIGKILL)
        time.sleep(0.2)
        found = pool.judge([Item(function, "value:2", "")] * 3)
        assert found.scores.tolist() == [2] * 3 and set(found.failures) == {""}


def test_an_interrupted_batch_does_not_answer_the_next(function):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pool_of(function) as pool:
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                pool.judge([Item(function, "sleep:0.8", "")] * 10)
        finally:
            signal.signal(signal.SIGALRM, previous)
        assert pool.judge([Item(function, "value:7", "")] * 10).scores.tolist() == [7] * 10


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("def other(): pass", "mine.py:score does not exist"),
        ("score = 3", "mine.py:score is not callable"),
        ("def score(:", "SyntaxError"),
        ("raise RuntimeError('at\\nonce')", "RuntimeError: at once"),
    ],
)
def test_a_function_that_cannot_be_had_is_named(tmp_path, source, said):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError) as caught:
        pool_of(f"{tmp_path / 'mine.py'}:score")
    message = str(caught.value)
    assert said in message and str(tmp_path / "mine.py") in message and "\n" not in message


def test_a_file_or_module_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none.py:score cannot be imported: .*no file"):
        pool_of(f"{tmp_path / 'none.py'}:score")
    with pytest.raises(UserError, match="nowhere:score cannot be imported: ModuleNotFoundError"):
        pool_of("nowhere:score")


def test_a_worker_that_cannot_start_is_not_tried_for_ever(tmp_path):
    (tmp_path / "mine.py").write_text("import os; os._exit(1)")
    with pytest.raises(UserError, match="verifier processes do not start"):
        pool_of(f"{tmp_path / 'mine.py'}:score", workers=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise", "raised KeyError: 'no such\\nkey' on q7"),
        ("none", "returned None; it must be a finite number on q7"),
        ("nan", "returned nan; it must be a finite number on q7"),
    ],
)
def test_a_function_that_always_fails_ends_the_run(function, text, said):
    with pool_of(function, workers=1) as pool:
        with pytest.raises(UserError) as caught:
            pool.judge([Item(function, text, "", {"id": "q7"})] * 5)
        assert said in str(caught.value) or said.replace("\\n", " ") in str(caught.value)
        assert "\n" not in str(caught.value)
        assert pool.judge([Item(function, "value:1", "")]).scores.tolist() == [1]


def test_an_orphan_that_hangs_ends_by_itself(function, tmp_path):
    """The pool's process is killed while a worker is deaf to all but the kernel, without a timer:
    a function of the user's that limits its own time with one has none left."""
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from occ_jax.config import RewardConfig
        from occ_jax.rewards.pool import Item, VerifierPool

        pool = VerifierPool([{function!r}], RewardConfig(workers=1, deadline_s=0.5))
        print(int(pool.judge([Item({function!r}, "pid", "")]).scores[0]), flush=True)
        pool._config = RewardConfig(workers=1, deadline_s=1000.0)  # this side waits
        pool.judge([Item({function!r}, "deaf", "")])
        """)
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(0.3)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    wait_until(lambda: gone(worker), seconds=5)


def test_a_script_without_a_main_guard_can_use_the_pool(tmp_path):
    """Fresh interpreters do not run the main script again, as a pool of multiprocessing would."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import jax
        from occ_jax.config import RewardConfig
        from occ_jax.rewards.pool import Item, VerifierPool

        print("main runs", flush=True)
        with VerifierPool(["math_verify"], RewardConfig(workers=2)) as pool:
            print(pool.judge([Item("math_verify", "\\\\boxed{34}", "34")]).scores)
        """)
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (0, "main runs\n[1.]\n"), done.stderr


# From tokens.


def test_truncated_completions_are_wrong_unless_judged(function):
    task = TaskConfig("reverse_digits", digits=3)
    example = Example("123=", "321", "reverse_digits", "0")
    spelled = DIGITS.encode("321")
    rows = np.array([[[*spelled, 1, 0], [*spelled, 0, 0], [*DIGITS.encode("3214"), 2]]])
    for truncated, expected in (("wrong", [1, 0, 0]), ("judged", [1, 0, 0])):
        config = Config(task=task, reward=RewardConfig(truncated=truncated, workers=1))
        with open_pool(config) as pool:
            scores, judged = judge_completions(pool, config, DIGITS, [example], rows)
        assert scores.tolist() == [expected]
        assert judged.given[0] == "321"
        assert (judged.given[1] is None) == (truncated == "wrong")
    config = Config(
        task=task, reward=RewardConfig(verifier=function, truncated="judged", workers=1)
    )
    with open_pool(config) as pool:
        scores, _ = judge_completions(pool, config, DIGITS, [example], rows)
    assert scores.tolist() == [[3, 3 + 2 * len("<pad>"), 5]]


def test_throughput_counts_what_verifiers_were_asked_about():
    config = Config(task=TaskConfig("reverse_digits", digits=3), reward=RewardConfig(workers=1))
    example = Example("123=", "321", "reverse_digits", "0")
    ended, cut = [*DIGITS.encode("321"), 1], [*DIGITS.encode("321"), 0]
    with open_pool(config) as pool:
        _, judged = judge_completions(
            pool, config, DIGITS, [example], np.array([[ended, cut, cut]])
        )
    assert (judged.num_judged, len(judged.failures)) == (1, 3)
    found = reward_metrics([judged._replace(seconds=0.5)] * 2)
    assert found["perf/reward_throughput"] == 2


def test_a_source_that_is_not_there_is_refused():
    config = Config(reward=RewardConfig(per_source=(("aime24", "math_dapo"),)))
    with pytest.raises(UserError, match="names 'aime24', which this config neither trains"):
        open_pool(config)
