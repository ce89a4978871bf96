"""Digit tasks, their tokens, the pipelines over them and the reward that judges completions."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st

from occ_jax.config import Config, RolloutConfig, RunConfig, TaskConfig
from occ_jax.data.examples import Example, make_prompt
from occ_jax.data.pipeline import (
    encode_completions,
    evaluation_prompts,
    iterate,
    pad_prompts,
    prompt_columns,
    training_prompts,
)
from occ_jax.data.tasks import (
    completion_tokens,
    has_unique_completion,
    make_example,
    prompt_tokens,
    split_of,
)
from occ_jax.data.tokenizer import ALPHABET, DIGITS, decode_completion
from occ_jax.errors import UserError
from tests.tiny import score_completions

encode, decode = DIGITS.encode, DIGITS.decode
PAD_ID, (EOS_ID,), VOCAB_SIZE = DIGITS.pad_id, DIGITS.eos_ids, DIGITS.vocab_size

TASKS = ("reverse_digits", "sort_digits", "addition", "chained_sum")
SPLITS = ("train", "evaluation")
SMALLEST = {
    "reverse_digits": TaskConfig("reverse_digits", digits=2),
    "sort_digits": TaskConfig("sort_digits", digits=2),
    "addition": TaskConfig("addition", digits=1),
    "chained_sum": TaskConfig("chained_sum", digits=1, terms=2),
}
each_task = pytest.mark.parametrize("name", TASKS)
configs = st.builds(
    TaskConfig,
    name=st.sampled_from(TASKS),
    digits=st.integers(2, 12),
    terms=st.integers(2, 9),
    seed=st.integers(0, 2**31 - 1),
)
indices = st.integers(0, 2**31 - 2)
streams = st.integers(0, 2**31 - 1)


def example_of(prompt, completion, answer):
    return Example(prompt, answer, source="by hand", id="0", completion=completion)


def prompts_of(config, examples):
    return [make_prompt(Config(task=config), DIGITS, example) for example in examples]


def training_iterator(config, batch_size, stream=0):
    whole = Config(task=config, run=RunConfig(seed=stream))
    return iterate(training_prompts(whole, DIGITS).prompts, batch_size)


def numbers(prompt):
    return [int(part) for part in prompt.removesuffix("=").split("+")]


def right_completion(config, prompt):
    """From the prompt's text alone."""
    match config.name:
        case "reverse_digits":
            return "".join(reversed(prompt[:-1]))
        case "sort_digits":
            return "".join(digit * prompt.count(digit) for digit in "0123456789")
        case "addition":
            total = sum(numbers(prompt))  # units first
            return "".join(str(total // 10**place % 10) for place in range(config.digits + 1))
        case "chained_sum":
            return ">".join(str(total) for total in itertools.accumulate(numbers(prompt)))[
                len(str(numbers(prompt)[0])) + 1 :
            ]


def every_prompt(config):
    """All prompts of a smallest config: those of one hundred pairs of digits."""
    middle = "" if config.name in ("reverse_digits", "sort_digits") else "+"
    return {f"{a}{middle}{b}=" for a in range(10) for b in range(10)}


# Tasks.


def test_examples_by_hand():
    digits = TaskConfig("sort_digits", digits=4)
    assert right_completion(digits, "3031=") == "0133"
    assert right_completion(TaskConfig("addition", digits=2), "07+05=") == "210"
    assert right_completion(TaskConfig("chained_sum", digits=2, terms=3), "09+05+90=") == "14>104"


@given(config=configs, split=st.sampled_from(SPLITS), index=indices, stream=streams)
def test_completions_are_right(config, split, index, stream):
    example = make_example(config, split, index, stream)
    prompt, completion, answer = example.prompt, example.completion, example.answer
    assert prompt.endswith("=")
    assert completion == right_completion(config, prompt)
    if config.name == "chained_sum":
        assert len(numbers(prompt)) == config.terms
        assert answer == str(sum(numbers(prompt)))
    else:
        assert answer == completion
    assert has_unique_completion(config) == (config.name != "chained_sum")


@given(config=configs, split=st.sampled_from(SPLITS), index=indices, stream=streams)
def test_an_example_depends_on_seed_stream_and_index_alone(config, split, index, stream):
    example = make_example(config, split, index, stream)
    assert make_example(config, split, index, stream) == example
    # Six digits or more leave no room for coincidence.
    config = dataclasses.replace(config, digits=max(config.digits, 6))
    example = make_example(config, split, index, stream)
    others = (
        make_example(config, split, index + 1, stream),
        make_example(config, split, index, stream + 1),
        make_example(dataclasses.replace(config, seed=config.seed ^ 1), split, index, stream),
    )
    assert len({found.prompt for found in (example, *others)}) == 4
    assert example.id not in {found.id for found in others[:2]}


@each_task
def test_splits_share_no_prompt(name):
    config = TaskConfig(name, digits=3, terms=3)
    train, evaluation = (
        {make_example(config, split, index).prompt for index in range(1500)} for split in SPLITS
    )
    assert not train & evaluation
    assert {split_of(prompt) for prompt in train} == {"train"}
    assert {split_of(prompt) for prompt in evaluation} == {"evaluation"}


@each_task
def test_splits_of_the_smallest_tasks_are_a_partition(name):
    config = SMALLEST[name]
    train, evaluation = (
        {make_example(config, split, index).prompt for index in range(2000)} for split in SPLITS
    )
    assert train and evaluation
    assert not train & evaluation
    # 2000 draws leave out one of a hundred prompts once in ten million times, here never.
    assert train | evaluation == every_prompt(config)


def test_one_prompt_in_eight_is_for_evaluation():
    prompts = [f"{number:04d}=" for number in range(10_000)]
    share = np.mean([split_of(prompt) == "evaluation" for prompt in prompts])
    assert abs(share - 1 / 8) < 0.01  # three standard deviations


@given(
    config=st.one_of(configs, st.sampled_from(list(SMALLEST.values()))),
    split=st.sampled_from(SPLITS),
    index=indices,
)
def test_lengths_are_the_promised_ones(config, split, index):
    example = make_example(config, split, index)
    assert len(encode(example.prompt)) == prompt_tokens(config)
    assert len(encode(example.completion)) + 1 <= completion_tokens(config)
    # The longest completion is that of nines.
    nines = "9" * config.digits
    terms = {"addition": 2, "chained_sum": config.terms}.get(config.name, 1)
    longest = right_completion(config, "+".join([nines] * terms) + "=")
    assert completion_tokens(config) == len(longest) + 1


# Tokens.


@given(st.text(ALPHABET))
def test_encoding_round_trips(text):
    ids = encode(text)
    assert len(ids) == len(text)
    assert set(ids) <= set(range(2, VOCAB_SIZE))
    assert decode(ids) == text
    assert decode_completion(DIGITS, [*ids, EOS_ID, PAD_ID, *encode("7")]) == text


def test_special_tokens_are_spelled_out():
    assert decode([PAD_ID, *encode("12"), EOS_ID, *encode("7")]) == "<pad>12<eos>7"
    assert decode_completion(DIGITS, [*encode("1"), PAD_ID, *encode("2")]) == "1<pad>2"


def test_every_character_has_a_token_of_its_own():
    assert VOCAB_SIZE == 16
    assert sorted([PAD_ID, EOS_ID, *encode(ALPHABET)]) == list(range(VOCAB_SIZE))


def test_an_unknown_character_is_refused_by_name():
    with pytest.raises(UserError, match="holds '-x'; the digit tasks' alphabet"):
        encode("1x-x2")


def test_decoding_survives_rows_of_the_embedding_beyond_the_alphabet():
    # `model.vocab_size` may exceed the tokenizer's, and a random policy samples such tokens.
    assert decode([*encode("1"), VOCAB_SIZE, *encode("2")]) == "1\N{REPLACEMENT CHARACTER}2"


# Pipelines.


@each_task
def test_the_iterator_yields_examples_in_order(name):
    config = TaskConfig(name, digits=3)
    iterator = training_iterator(config, 4, stream=5)
    for step in range(3):
        expected = [make_example(config, "train", 4 * step + row, 5) for row in range(4)]
        assert next(iterator) == prompts_of(config, expected)


def test_a_restored_iterator_continues_with_the_next_batch():
    config = TaskConfig(digits=8)
    iterator = training_iterator(config, 4)
    for _ in range(3):
        next(iterator)
    state = iterator.get_state()
    expected = [next(iterator) for _ in range(3)]
    restored = training_iterator(config, 4)
    restored.set_state(state)
    assert [next(restored) for _ in range(3)] == expected
    iterator.set_state(state)
    assert next(iterator) == expected[0]


def test_streams_and_seeds_have_examples_of_their_own():
    config = TaskConfig(digits=8)
    batches = [
        {prompt.example.prompt for prompt in next(training_iterator(config_, 64, stream))}
        for config_, stream in (
            (config, 0),
            (config, 1),
            (dataclasses.replace(config, seed=1), 0),
        )
    ]
    assert len(set.union(*batches)) == 3 * 64


def test_processes_share_the_prompts_of_every_step():
    config = Config(task=TaskConfig(digits=8))
    prompts = training_prompts(config, DIGITS).prompts
    alone = iterate(prompts, 6)
    shares = [iterate(prompts, 2, process=host, num_processes=3) for host in range(3)]
    for _ in range(3):
        step = next(alone)
        found = [next(share) for share in shares]
        assert [prompt for share in found for prompt in share] == step
    assert len({str(share.get_state()) for share in shares}) == 1


def test_evaluation_prompts_are_the_first_of_their_split():
    config = Config(task=TaskConfig("sort_digits", digits=4))
    (prompts,) = evaluation_prompts(config, DIGITS, 8).values()
    assert evaluation_prompts(config, DIGITS, 3) == {"sort_digits": prompts[:3]}
    examples = [make_example(config.task, "evaluation", index) for index in range(8)]
    assert prompts == prompts_of(config.task, examples)


@given(config=configs, split=st.sampled_from(SPLITS))
def test_encoded_examples_are_padded_on_the_promised_sides(config, split):
    examples = [make_example(config, split, index) for index in range(4)]
    prompts, prompt_valid = pad_prompts(Config(task=config), DIGITS, prompts_of(config, examples))
    completions, completion_valid = encode_completions(config, DIGITS, examples)
    assert prompts.shape == prompt_valid.shape == (4, prompt_tokens(config))
    assert completions.shape == completion_valid.shape == (4, completion_tokens(config))
    assert prompts.dtype == completions.dtype == np.int32
    for row, example in enumerate(examples):
        length = len(example.completion) + 1
        assert decode(prompts[row].tolist()) == example.prompt
        assert decode_completion(DIGITS, completions[row].tolist()) == example.completion
        assert completions[row, length - 1] == EOS_ID
        np.testing.assert_array_equal(completions[row, length:], PAD_ID)
        np.testing.assert_array_equal(
            completion_valid[row], np.arange(len(completions[0])) < length
        )
    np.testing.assert_array_equal(prompt_valid, prompts != PAD_ID)


def test_short_prompts_are_padded_on_the_left():
    config = Config(task=TaskConfig("reverse_digits", digits=4))
    prompts = prompts_of(config.task, [example_of("12=", "21", "21")])
    tokens, valid = pad_prompts(config, DIGITS, prompts)
    np.testing.assert_array_equal(tokens, [[PAD_ID, PAD_ID, *encode("12=")]])
    np.testing.assert_array_equal(valid, [[False, False, True, True, True]])


def test_prompts_have_the_configured_width():
    rollout = RolloutConfig(max_prompt_tokens=7)
    config = Config(task=TaskConfig("reverse_digits", digits=4), rollout=rollout)
    assert prompt_columns(config) == 7
    prompts = prompts_of(config.task, [example_of("1234=", "4321", "4321")])
    tokens, _ = pad_prompts(config, DIGITS, prompts)
    np.testing.assert_array_equal(tokens, [[PAD_ID, PAD_ID, *encode("1234=")]])
    long = prompts_of(config.task, [example_of("1234567=", "7654321", "7654321")])
    with pytest.raises(UserError, match=r"prompt 0 of by hand has 8 tokens; .* allows 7"):
        pad_prompts(config, DIGITS, long)


# Rewards.

WIDTH = 10


def score(config, example, *completions):
    """Rewards of completions written as token lists or as texts that end themselves."""
    rows = [[*encode(row), EOS_ID] if isinstance(row, str) else list(row) for row in completions]
    ids = np.array([[row + [PAD_ID] * (WIDTH - len(row)) for row in rows]])
    example = example._replace(source=config.name)
    scores = score_completions(Config(task=config), DIGITS, [example], ids)
    assert scores.dtype == np.float32
    return scores[0].tolist()


@given(config=configs, split=st.sampled_from(SPLITS), index=indices)
def test_right_completions_earn_one(config, split, index):
    examples = [make_example(config, split, index + step) for step in range(2)]
    tokens, _ = encode_completions(config, DIGITS, examples)
    # Each problem with its own completion and the other's.
    pairs = np.stack([tokens, tokens[::-1]], axis=1)
    scores = score_completions(Config(task=config), DIGITS, examples, pairs)
    same = float(examples[0].answer == examples[1].answer)
    np.testing.assert_array_equal(scores, [[1, same], [1, same]])


def test_wrong_and_cut_completions_earn_nothing():
    config = TaskConfig("reverse_digits", digits=3)
    example = example_of("123=", "321", "321")
    assert score(config, example, "321", "320", "3211", "32", "", ">321", "1>321") == [1] + [0] * 6
    assert score(config, example, encode("321"), [EOS_ID, *encode("321")]) == [0, 0]


def test_what_follows_the_end_is_ignored():
    config = TaskConfig("reverse_digits", digits=3)
    example = example_of("123=", "321", "321")
    trailing = [*encode("321"), EOS_ID, *encode("99"), EOS_ID, 5]
    assert score(config, example, trailing) == [1]


def test_a_padding_token_inside_a_completion_is_not_overlooked():
    # The policy can sample it, and of one prompt exactly one completion is right.
    config = TaskConfig("reverse_digits", digits=3)
    example = example_of("123=", "321", "321")
    first, *rest = encode("321")
    assert score(config, example, [first, PAD_ID, *rest, EOS_ID]) == [0]
    assert score(config, example, [PAD_ID, first, *rest, EOS_ID]) == [0]
    chained = TaskConfig("chained_sum", digits=1, terms=2)
    first, second = encode("14")
    example = example_of("9+5=", "14", "14")
    assert score(chained, example, [first, second, EOS_ID]) == [1]
    assert score(chained, example, [first, PAD_ID, second, EOS_ID]) == [0]


def test_tokens_beyond_the_alphabet_are_wrong():
    config = TaskConfig("reverse_digits", digits=3)
    example = example_of("123=", "321", "321")
    assert score(config, example, [*encode("321"), VOCAB_SIZE, EOS_ID], "321") == [0, 1]


def test_chained_sums_are_judged_by_their_last_number():
    config = TaskConfig("chained_sum", digits=1, terms=3)
    example = example_of("9+5+1=", "14>15", "15")
    right = ("14>15", "15", "13>15", "7>8>15", "+=>15")
    assert score(config, example, *right) == [1] * len(right)
    wrong = ("14>16", "15>14", "14>15>", "14", "", "14>015", "14+15", "15>")
    assert score(config, example, *wrong) == [0] * len(wrong)
    assert score(config, example, encode("14>15")) == [0]
