"""Prepared sets as prompts: every one once an epoch, whoever asks, wherever a run was stopped."""

import dataclasses
import os
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from occ_jax.cli.arguments import main
from occ_jax.config import (
    Config,
    DatasetConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    WarmStartConfig,
)
from occ_jax.data.chat import Message
from occ_jax.data.examples import Example, make_prompt, prompt_text
from occ_jax.data.pipeline import (
    encode_completions,
    evaluation_prompts,
    iterate,
    pad_prompts,
    prompts_read,
    training_prompts,
)
from occ_jax.data.tasks import make_example
from occ_jax.data.tokenizer import load_tokenizer
from occ_jax.errors import UserError
from occ_jax.files import read_rows
from tests.checkpoint_files import GOLDEN, change_json, write_tokenizer
from tests.published_files import dapo_rows, json_lines, parquet, rows_of
from tests.tiny import config_file, score_completions

SIZE = 23


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A training set of SIZE messages and an evaluation set of 30 problems, and a tokenizer."""
    root = tmp_path_factory.mktemp("sets")
    write_tokenizer(root / "checkpoint")
    for name, file in (
        ("dapo_math_17k", parquet(root / "dapo", dapo_rows(SIZE, copies=2))),
        ("aime24", json_lines(root / "aime", rows_of("HuggingFaceH4/aime_2024", 30))),
    ):
        command = ["prepare", name, "--source", str(file), "--allow-row-count"]
        assert main([*command, "--data-directory", str(root / "data")]) == 0
    return root


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory / "checkpoint")


def config_of(root, *, seed=0, max_prompt_tokens=256, **dataset):
    return Config(
        dataset=DatasetConfig(
            **{
                "name": "dapo_math_17k",
                "evaluation": ("aime24",),
                "directory": str(root / "data"),
                **dataset,
            }
        ),
        model=ModelConfig(checkpoint=str(root / "checkpoint")),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(max_prompt_tokens=max_prompt_tokens),
        run=RunConfig(seed=seed),
    )


def ids(batch):
    return [prompt.example.id for prompt in batch]


# Order.


@given(
    seed=st.integers(0, 2**31 - 1),
    batch=st.integers(1, 9),
    hosts=st.integers(1, 4),
    stops=st.lists(st.integers(1, 6), min_size=1, max_size=3),
)
@settings(max_examples=20)
def test_no_prompt_is_repeated_or_skipped(directory, tokenizer, seed, batch, hosts, stops):
    """Hosts that are stopped again and again see together what one undisturbed host sees."""
    training = training_prompts(config_of(directory, seed=seed), tokenizer)
    undisturbed = iterate(training.prompts, batch * hosts)
    states = [None] * hosts
    seen = []
    for steps in stops:
        expected = [ids(next(undisturbed)) for _ in range(steps)]
        found = []
        for host in range(hosts):
            share = iterate(training.prompts, batch, process=host, num_processes=hosts)
            if states[host] is not None:
                share.set_state(states[host])
            found.append([ids(next(share)) for _ in range(steps)])
            states[host] = share.get_state()
            assert prompts_read(share) * hosts == prompts_read(undisturbed)
        for step in range(steps):
            together = [prompt for share in found for prompt in share[step]]
            assert together == expected[step]
            seen += together
    # Epochs follow one another without a gap, wherever steps end.
    everything = {f"9a9b6eb4-{index:04d}" for index in range(SIZE)}
    whole = len(seen) // SIZE * SIZE
    for start in range(0, whole, SIZE):
        assert set(seen[start : start + SIZE]) == everything
    rest = seen[whole:]
    assert len(set(rest)) == len(rest)


def test_every_epoch_and_every_seed_has_an_order_of_its_own(directory, tokenizer):
    epochs = []
    for seed in (0, 1):
        prompts = training_prompts(config_of(directory, seed=seed), tokenizer).prompts
        batches = iterate(prompts, SIZE)
        epochs += [tuple(ids(next(batches))) for _ in range(3)]
    assert len(set(epochs)) == 6
    assert len({tuple(sorted(epoch)) for epoch in epochs}) == 1
    again = training_prompts(config_of(directory, seed=1), tokenizer).prompts
    assert tuple(ids(next(iterate(again, SIZE)))) == epochs[3]


def test_evaluation_prompts_keep_their_publishers_order(directory, tokenizer):
    config = config_of(directory)
    (found,) = evaluation_prompts(config, tokenizer, 512).values()
    assert ids(found) == [str(60 + index) for index in range(30)]
    assert evaluation_prompts(config, tokenizer, 4) == {"aime24": found[:4]}
    assert [prompt.example.answer for prompt in found[:3]] == ["1", "2", "3"]


# Text.


def test_a_problem_is_put_in_the_template_and_the_chat(directory, tokenizer):
    config = config_of(directory, template="Q: {problem} \\boxed{}?", system="brief")
    example = Example("what is {x}?", "1", "aime24", "60")
    prompt = make_prompt(config, tokenizer, example)
    assert tokenizer.decode(prompt.tokens) == (
        "<|im_start|>system\nbrief<|im_end|>\n"
        "<|im_start|>user\nQ: what is {x}? \\boxed{}?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert prompt_text(config, example) == "brief\n\nQ: what is {x}? \\boxed{}?"


def test_published_messages_are_used_as_they_are(directory, tokenizer):
    (prompt,) = next(iterate(training_prompts(config_of(directory), tokenizer).prompts, 1))
    (message,) = prompt.example.prompt
    assert tokenizer.decode(prompt.tokens) == (
        f"<|im_start|>user\n{message.content}<|im_end|>\n<|im_start|>assistant\n"
    )
    own = Example((Message("system", "mine"), message), "1", "dapo_math_17k", "0")
    config = config_of(directory, system="other")
    assert tokenizer.decode(make_prompt(config, tokenizer, own).tokens).startswith(
        "<|im_start|>system\nmine<|im_end|>\n<|im_start|>user\n"
    )


@pytest.mark.parametrize(
    ("thinking", "ending"),
    [
        ("template", "assistant\n"),
        ("on", "assistant\n"),
        ("off", "assistant\n<think>\n\n</think>\n\n"),
    ],
)
def test_thinking_is_passed_to_the_template(directory, tokenizer, thinking, ending):
    config = config_of(directory, thinking=thinking)
    prompt = make_prompt(config, tokenizer, Example("1?", "1", "aime24", "60"))
    assert tokenizer.decode(prompt.tokens).endswith(ending)


def test_without_chat_prompts_are_plain_text(directory, tokenizer):
    config = config_of(directory, chat=False, template="{problem}\nAnswer:")
    prompt = make_prompt(config, tokenizer, Example("1?", "1", "aime24", "60"))
    assert tokenizer.decode(prompt.tokens) == "1?\nAnswer:"


# Length.


def lengths(directory, tokenizer):
    prompts = training_prompts(config_of(directory), tokenizer).prompts
    return [len(prompts[index].tokens) for index in range(SIZE)]


def test_long_prompts_are_left_out_and_counted(directory, tokenizer):
    """Those of two digits have more tokens than those of one."""
    limit = min(lengths(directory, tokenizer))
    config = config_of(directory, max_prompt_tokens=limit, overlong="drop")
    training = training_prompts(config, tokenizer)
    fit = [length for length in lengths(directory, tokenizer) if length <= limit]
    assert (training.epoch, training.overlong) == (len(fit), SIZE - len(fit))
    assert 0 < training.overlong < SIZE
    batch = next(iterate(training.prompts, 2 * training.epoch))
    assert set(Counter(ids(batch)).values()) == {2}
    tokens, valid = pad_prompts(config, tokenizer, batch)
    assert tokens.shape == (2 * training.epoch, limit)
    assert np.all(valid)


def test_long_prompts_are_refused_by_name(directory, tokenizer):
    limit = min(lengths(directory, tokenizer))
    config = config_of(directory, max_prompt_tokens=limit)
    long = SIZE - sum(length <= limit for length in lengths(directory, tokenizer))
    with pytest.raises(
        UserError,
        match=rf"prompt 9a9b6eb4-\d+ of dapo_math_17k has \d+ tokens; rollout.max_prompt_tokens "
        rf"allows {limit}; {long} of 23 prompts are too long, dataset.overlong drop",
    ):
        training_prompts(config, tokenizer)
    for overlong in ("drop", "error"):
        config = config_of(directory, max_prompt_tokens=3, overlong=overlong)
        with pytest.raises(UserError, match="23 of 23 prompts are too long, no prompt is left"):
            training_prompts(config, tokenizer)


def test_evaluation_sets_are_never_shortened(directory, tokenizer):
    config = config_of(directory, max_prompt_tokens=3, overlong="drop")
    with pytest.raises(UserError, match=r"prompt 60 of aime24 has .* allows 3"):
        evaluation_prompts(config, tokenizer, 512)


# Mistakes.


def test_a_missing_set_is_answered_with_the_command(directory, tokenizer):
    config = config_of(directory, evaluation=("math500",))
    with pytest.raises(UserError) as caught:
        evaluation_prompts(config, tokenizer, 4)
    where = directory / "data"
    assert str(caught.value) == (
        f"no set math500 in {where} (prepared sets: aime24, dapo_math_17k); "
        f"occ-jax prepare math500 --source FILE --data-directory {where}"
    )


def test_a_damaged_set_is_named(tmp_path, tokenizer):
    file = json_lines(tmp_path / "aime", rows_of("HuggingFaceH4/aime_2024", 30))
    command = ["prepare", "aime24", "--source", str(file), "--data-directory"]
    assert main([*command, str(tmp_path / "data")]) == 0
    config = config_of(tmp_path, name="aime24")
    (records,) = (tmp_path / "data").rglob("*.array_record*")
    whole = records.read_bytes()
    for broken in (whole[: len(whole) // 2], bytes(len(whole)), b""):
        records.write_bytes(broken)
        with pytest.raises(UserError, match=r"aime24.1\.0\.0 is damaged; delete it"):
            training_prompts(config, tokenizer)
    records.write_bytes(whole)
    assert training_prompts(config, tokenizer).epoch == 30
    (records.parent / "dataset_info.json").write_text("{")
    with pytest.raises(UserError, match=r"aime24.1\.0\.0 is damaged; delete it"):
        training_prompts(config, tokenizer)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset.evaluation": ()}, "dataset.evaluation is ()"),
        ({"dataset.name": ""}, "dataset.evaluation is ('aime24',)"),
        ({"dataset.name": "DAPO"}, "dataset.name is 'DAPO'"),
        ({"dataset.evaluation": ("../x",)}, "dataset.evaluation is '../x'"),
        ({"dataset.evaluation": ("a", "a")}, "without repetitions"),
        ({"dataset.template": "no place"}, "a text with {problem} in it once"),
        ({"dataset.chat": False, "dataset.thinking": "on"}, "dataset.chat is False"),
        ({"rollout.max_prompt_tokens": 0}, "rollout.max_prompt_tokens is 0"),
        ({"warm_start.steps": 5}, "warm_start.steps is 5"),
    ],
)
def test_contradictory_configs_are_refused(tmp_path, changes, said):
    config = config_of(tmp_path)
    with pytest.raises(UserError) as caught:
        sections = {}
        for name, value in changes.items():
            section, field = name.split(".")
            sections.setdefault(section, {})[field] = value
        parts = {
            section: dataclasses.replace(getattr(config, section), **fields)
            for section, fields in sections.items()
        }
        dataclasses.replace(config, **parts)
    assert said in str(caught.value)


# Whole commands.

CONFIG = """\
from occ_jax.config import *


def get_config():
    return Config(
        dataset=DatasetConfig(
            name="dapo_math_17k", evaluation=("aime24", "own"), directory={data!r},
            template="{{problem}}",
        ),
        model=ModelConfig(
            vocab_size=64, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8,
            intermediate_size=32,
        ),
        warm_start=WarmStartConfig(steps=0),
        rollout=RolloutConfig(
            num_prompts=4, group_size=2, max_prompt_tokens=96, max_new_tokens=4
        ),
        reward=RewardConfig(per_source=(("own", "exact_match"),), workers=1),
        algorithm=AlgorithmConfig(updates_per_rollout=2),
        run=RunConfig(
            directory={run!r}, evaluate_every=2, evaluation_prompts=4,
            evaluation_samples=2, checkpoint_every=1, num_logged_samples=4,
        ),
    )
"""


@pytest.mark.usefixtures("quick_compilation")
def test_prepare_train_resume_evaluate_compare_generate(tmp_path, capsys):
    own = [{"q": f"what is {index} + {index}?", "a": 2 * index} for index in range(3)]
    columns = ["--prompt-column", "q", "--answer-column", "a"]
    for name, file, *rest in (
        ("dapo_math_17k", parquet(tmp_path / "dapo.parquet", dapo_rows(8, copies=2))),
        ("aime24", json_lines(tmp_path / "aime.jsonl", rows_of("HuggingFaceH4/aime_2024", 30))),
        ("own", json_lines(tmp_path / "own.jsonl", own), *columns),
    ):
        command = ["prepare", name, "--source", str(file), "--data-directory"]
        assert main([*command, str(tmp_path / "data"), "--allow-row-count", *rest]) == 0
    config = tmp_path / "config.py"

    paths = {"data": "data", "run": "run"}
    paths = {name: str(tmp_path / path) for name, path in paths.items()}
    config.write_text(CONFIG.format(**paths))
    pretrained = ["--model.checkpoint", str(GOLDEN / "mimo")]
    assert main(["train", str(config), *pretrained, "--run.steps", "1"]) == 0
    assert "dapo_math_17k: 8 prompts an epoch, 0 over 96 tokens" in capsys.readouterr().err
    # Written otherwise it is the same directory; a run knows which it was when it is evaluated.
    pretrained[1] = os.path.relpath(pretrained[1])
    assert main(["train", str(config), *pretrained, "--run.steps", "4"]) == 0
    order = [row["id"] for row in read_rows(tmp_path / "run" / "samples.jsonl")]
    assert len(order) == 16
    assert len(set(order[:8])) == len(set(order[8:])) == 8, "two epochs of two steps"
    assert order[:8] != order[8:]
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [row["data/epoch"] for row in rows] == [0, 0.5, 1, 1.5, 2]
    assert {(row["data/prompts"], row["data/overlong_prompts"]) for row in rows} == {(8, 0)}
    for name in ("val/accuracy", "val/aime24/avg@2", "val/own/pass@2", "val/own/agreement_1"):
        assert 0 <= rows[-1][name] <= 1

    figures = ["--prompts", "4", "--samples", "2"]
    for step in ("3", "4"):
        checkpoint = ["--checkpoint", str(tmp_path / "run" / "checkpoints" / step)]
        capsys.readouterr()
        assert main(["evaluate", str(config), *checkpoint, *figures]) == 0
        table = capsys.readouterr().out
        assert re.search(
            r"^\| set +\| questions +\| +avg@2 .*\n\| -.*\n\| aime24 .*\n\| own ", table
        )
    pair = [str(tmp_path / "run" / "evaluations" / step) for step in ("3", "4")]
    assert main(["compare-evaluations", *pair]) == 0
    table = capsys.readouterr().out
    for row in (r"aime24 +\| +avg +\| +4", r"own +\| +pass@2 +\| +3", r"mean of sets +\| +avg"):
        assert re.search(rf"^\| {row} ", table, re.M), table

    checkpoint = ["--checkpoint", str(tmp_path / "run")]
    assert main(["generate", str(config), *checkpoint, "--prompt", "what is 1 + 1?"]) == 0
    assert capsys.readouterr().out.startswith("what is 1 + 1?\n\n")


# Digit tasks with a checkpoint's tokenizer.


@pytest.mark.parametrize("name", ["reverse_digits", "addition", "chained_sum"])
def test_digit_tasks_run_with_a_checkpoints_tokenizer(tokenizer, name):
    config = Config(task=TaskConfig(name, digits=4))
    examples = [make_example(config.task, "train", index) for index in range(4)]
    prompts = [make_prompt(config, tokenizer, example) for example in examples]
    tokens, valid = pad_prompts(config, tokenizer, prompts)
    completions, mask = encode_completions(config.task, tokenizer, examples)
    for row, example in enumerate(examples):
        assert tokenizer.decode(tokens[row][valid[row]].tolist()) == example.prompt
        assert (
            tokenizer.decode(completions[row][mask[row]].tolist())
            == f"{example.completion}<|im_end|>"
        )
    scores = score_completions(config, tokenizer, examples, completions[:, None])
    np.testing.assert_array_equal(scores, 1)


def test_a_tokenizer_that_needs_many_tokens_a_character_is_refused(tokenizer):
    wordy = tokenizer._replace(encode=lambda text: [5] * 2 * len(text))
    task = TaskConfig("reverse_digits", digits=4)
    with pytest.raises(UserError, match="in 8 tokens; task reverse_digits needs one token"):
        encode_completions(task, wordy, [make_example(task, "train", 0)])


def test_only_the_exact_answer_is_right(tokenizer):
    config = Config(task=TaskConfig("reverse_digits", digits=3))
    example = Example("123=", "321", "reverse_digits", "0")
    texts = {
        "321<|im_end|>": 1,
        "321<|endoftext|>": 1,  # the checkpoint's other end
        "321<|im_end|>4": 1,
        "321": 0,  # cut by the length limit
        " 321<|im_end|>": 0,
        "321 <|im_end|>": 0,
        "3<|im_start|>21<|im_end|>": 0,
        "0321<|im_end|>": 0,
        "<|im_end|>321<|im_end|>": 0,
    }
    rows = [tokenizer.encode(text) for text in texts]
    ids = np.array([[row + [1] * (8 - len(row)) for row in rows]])
    scores = score_completions(config, tokenizer, [example], ids)
    assert scores[0].tolist() == list(texts.values())


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tmp_path, capsys):
    config = config_file(tmp_path)
    directory = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "mimo", directory)
    change_json(directory / "config.json", vocab_size=59)
    assert main(["train", str(config), "--model.checkpoint", str(directory)]) == 2
    said = "model.vocab_size is 59; the tokenizer needs at least 60"
    assert said in capsys.readouterr().err
