"""Config fields: their facts, and the refusal of values that their types do not allow."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal, get_args, get_origin

import jaxtyping
import pytest

from occ_jax.cli.evaluate import EvaluationOptions, _header
from occ_jax.config import (
    Config,
    DatasetConfig,
    DeltaNetConfig,
    Fact,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    WarmStartConfig,
    YarnConfig,
    computation,
    fields_with,
    flatten,
    from_dict,
    to_dict,
)
from occ_jax.config.checks import PositiveInt, Section, field_hints, section_type
from occ_jax.config.facts import setting
from occ_jax.errors import UserError
from occ_jax.training.warm_start import cache_path

PARTS = {
    "yarn": YarnConfig(),
    "latent_attention": LatentAttentionConfig(),
    "delta_net": DeltaNetConfig(),
    "moe": MoEConfig(),
}
# A model with every part, and so with every field.
WHOLE = flatten(to_dict(dataclasses.replace(Config(), model=ModelConfig(**PARTS))))
SECTIONS = [
    *(section_type(hint) for hint in field_hints(Config).values()),
    *(type(part) for part in PARTS.values()),
]
FIELDS = [(kind, name, hint) for kind in SECTIONS for name, hint in field_hints(kind).items()]


@pytest.fixture(autouse=True)
def no_other_type_checks():
    """Lets values of a wrong type reach the checks of the config, as they do outside of tests."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def leaves(fact: Fact) -> set[str]:
    return fields_with(fact, Config) & WHOLE.keys()


def in_sections(*sections: str) -> set[str]:
    return {name for name in WHOLE if name.partition(".")[0] in sections}


def test_a_run_may_be_resumed_with_other_values_of_these_fields():
    assert leaves(Fact.MAY_CHANGE) == {
        "dataset.directory",
        "reward.workers",
        "rollout.max_rounds",
        "rollout.gather_weights",
        "model.remat",
        "model.attention_kernel",
        "model.attention_columns",
        "model.logits_columns",
        "run.directory",
        "run.steps",
        "run.checkpoint_every",
        "run.keep_checkpoints",
        "run.keep_every",
        "run.wandb_project",
        "warm_start.cache_directory",
        *(f"mesh.{field.name}" for field in dataclasses.fields(MeshConfig)),
    }


def test_trained_parameters_go_with_other_values_of_these_fields():
    others = {name for name in WHOLE if not name.startswith("model.")}
    assert leaves(Fact.SAME_MODEL) == others | {
        "model.dtype",
        "model.remat",
        "model.attention_kernel",
        "model.attention_columns",
        "model.logits_columns",
    }


def test_no_checkpoint_decides_these_fields():
    assert fields_with(Fact.NOT_IN_CHECKPOINT, ModelConfig) == {
        "param_dtype",
        "dtype",
        "scan_layers",
        "remat",
        "attention_kernel",
        "attention_columns",
        "logits_columns",
    }


def test_an_evaluation_does_not_depend_on_these_fields_of_the_rollout():
    assert fields_with(Fact.SAME_SAMPLES, RolloutConfig) == {
        *("num_prompts", "group_size", "old_log_probs", "dynamic_sampling", "max_rounds")
    }
    header = _header(Config(), "reverse_digits", "", EvaluationOptions(None, 1, [1], False))
    assert header["sampling"] == {
        "max_prompt_tokens": 0,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "sampling_chunks": 1,
        "gather_weights": True,
    }


def test_compiled_programs_do_not_read_these_sections():
    sections = ("task", "dataset", "warm_start", "reward", "run")
    assert leaves(Fact.SAME_PROGRAM) == in_sections(*sections)
    config = from_dict({name: {"seed": 7} for name in ("task", "warm_start", "run")})
    assert config != Config() and computation(config) == Config()
    other = from_dict({"optimizer": {"b1": 0.8}})
    assert computation(other) == other


def test_a_warm_up_is_determined_by_these_fields():
    assert WHOLE.keys() - leaves(Fact.SAME_WARM_UP) == in_sections(
        "model", "task", "warm_start"
    ) - {
        "warm_start.cache_directory",
        "model.remat",
        "model.attention_kernel",
        "model.attention_columns",
        "model.logits_columns",
        "model.delta_net.chunk_size",
    }


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"remat": "full", "attention_kernel": "plain", "logits_columns": 4}, True),
        ({"attention_columns": 4}, True),
        ({"dtype": "bfloat16"}, False),
        ({"param_dtype": "bfloat16"}, False),
        ({"num_layers": 3}, False),
    ],
)
def test_a_warm_up_is_found_again_where_only_memory_and_speed_differ(changes, same):
    config = Config()
    changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
    assert (cache_path(changed) == cache_path(config)) == same
    moved = dataclasses.replace(config, warm_start=WarmStartConfig(cache_directory="elsewhere"))
    assert cache_path(moved).name == cache_path(config).name
    for other in ({"warm_start": WarmStartConfig(steps=31)}, {"task": TaskConfig(digits=5)}):
        assert cache_path(dataclasses.replace(config, **other)) != cache_path(config)


def test_a_field_without_facts_is_in_no_list():
    @dataclass(frozen=True)
    class New(Section, path="new"):
        plain: int = 0
        marked: int = setting(0, Fact.MAY_CHANGE | Fact.SAME_MODEL)

    for fact in Fact:
        marked = fact in (Fact.MAY_CHANGE, Fact.SAME_MODEL)
        assert fields_with(fact, New) == ({"marked"} if marked else set())


def wrong_values(hint):
    """Values that no field of this type has."""
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    yield object()
    if hint is not bool:
        yield True
    if hint in (int, float, bool):
        yield from ("3", math.nan, math.inf, None, ())
    if hint is int:
        yield 3.0
    if get_origin(hint) is Literal:
        yield from ("", 0, None)
    if get_origin(hint) is tuple:
        yield from ((object(),), [], "ab")


@pytest.mark.parametrize(
    ("kind", "name", "hint"), FIELDS, ids=[f"{kind.path}.{name}" for kind, name, _ in FIELDS]
)
def test_every_field_refuses_values_of_other_types_in_one_line(kind, name, hint):
    for value in wrong_values(hint):
        with pytest.raises(UserError) as caught:
            kind(**{name: value})
        said = str(caught.value)
        assert said.startswith(f"{kind.path}.{name} is {value!r}; it must be ")
        assert "\n" not in said


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: RunConfig(steps="3"), "run.steps is '3'; it must be a whole number"),
        (lambda: RolloutConfig(group_size=0), "rollout.group_size is 0; it must be positive"),
        (
            lambda: RolloutConfig(temperature=math.nan),
            "rollout.temperature is nan; it must be a finite number",
        ),
        (
            lambda: TaskConfig(seed=2**31),
            "task.seed is 2147483648; it must be between 0 and 2^31 - 1",
        ),
        (
            lambda: ModelConfig(remat="all"),
            "model.remat is 'all'; it must be one of none, dots, full",
        ),
        (
            lambda: DatasetConfig(evaluation=["aime24"]),
            "dataset.evaluation is ['aime24']; it must be a tuple[str, ...]",
        ),
        (lambda: Config(task=3), "task is 3; it must be a TaskConfig"),
        (lambda: ModelConfig(moe=3), "model.moe is 3; it must be a MoEConfig, or None"),
        (lambda: from_dict({"task": 3}), "task is 3; it must be a TaskConfig"),
        (
            lambda: from_dict({"task": {"name": {"a": 1}}}),
            "task.name is {'a': 1}; it must be one of reverse_digits, sort_digits, addition, "
            "chained_sum",
        ),
        (lambda: from_dict({"task": {"path": "a"}}), "the config has no field task.path"),
    ],
)
def test_a_refused_value_is_one_exact_line(make, said):
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == said


def test_a_config_with_every_part_survives_json():
    config = dataclasses.replace(
        Config(), model=ModelConfig(**{**PARTS, "moe": MoEConfig(dense_layers=(1,))})
    )
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


def test_whole_numbers_are_numbers():
    @dataclass(frozen=True)
    class Numbers(Section, path="numbers"):
        real: float = 0.0
        count: PositiveInt | None = None

    assert Numbers(real=3, count=2).real == 3
    with pytest.raises(UserError, match=r"^numbers\.count is 0; it must be positive, or None$"):
        Numbers(count=0)
