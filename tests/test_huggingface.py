"""Published checkpoints: the same numbers as transformers, and handed back as they were.

`tests/golden` holds tiny checkpoints in every family's published format and what transformers
computes from them (`tests/parity/make_golden.py` makes both; `make parity` compares live).
"""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from occ_jax.cli.arguments import main
from occ_jax.config import ModelConfig
from occ_jax.errors import UserError
from occ_jax.models import Model, load_pretrained, read_config, save_pretrained
from occ_jax.models.huggingface.tensors import open_checkpoint
from occ_jax.rollout import sample
from tests.checkpoint_files import GOLDEN, change_json, copied, files

CASES = sorted(path.stem for path in GOLDEN.glob("*.npz"))
HYBRID, SPARSE = "qwen3_next", "deepseek"  # between them every part, and every layout of layers
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
apply = jit(Model.apply, static_argnums=0, static_argnames="mtp_depth")


def close(found, wanted, lengths, ahead=0):
    """To 1e-4 of the largest entry, on columns that exist."""
    real = np.arange(wanted.shape[1]) < (lengths - ahead)[:, None]
    error = np.abs(np.where(real[..., None], np.asarray(found) - wanted, 0))
    assert error.max() <= 1e-4 * np.abs(wanted).max()


def compare(directory, golden, suffix="", like=ModelConfig(), **options):
    config = read_config(directory, like, **options)
    model, params = load_pretrained(directory, config=config)
    tokens, lengths = golden["tokens"], golden["lengths"]
    modules = "mtp_logits_1" in golden
    out = apply(model, params, tokens, lengths, mtp_depth=2 if modules else 0)
    close(out.logits, golden["logits"], lengths)
    if modules:
        before = config.mtp_trunk_hidden == "pre_norm"
        close(out.hidden, golden["pre_norm" if before else "hidden"], lengths)
        for k, logits in enumerate(out.mtp_logits, start=1):
            close(logits, golden[f"mtp_logits_{k}{suffix}"], lengths, k)
    return model, params


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_transformers(case):
    golden = dict(np.load(GOLDEN / f"{case}.npz"))
    model, params = compare(GOLDEN / case, golden)
    # Greedy completions of the left-padded prompts, decoded from the cache one token at a time.
    tokens, lengths = golden["tokens"], golden["lengths"]
    columns = tokens.shape[1]
    rows = [np.roll(row, columns - length) for row, length in zip(tokens, lengths, strict=True)]
    rollout = jit(
        functools.partial(
            sample,
            *(model,),
            group_size=1,
            max_new_tokens=golden["completions"].shape[1],
            temperature=0.0,
            eos_ids=(),
            pad_id=0,
        )
    )(params, np.stack(rows), np.arange(columns) >= columns - lengths[:, None], jax.random.key(0))
    np.testing.assert_array_equal(rollout.tokens[:, columns:], golden["completions"])


@pytest.mark.parametrize("case", [HYBRID, SPARSE])
def test_scanned_layers_load_stacked(case):
    golden = dict(np.load(GOLDEN / f"{case}.npz"))
    compare(GOLDEN / case, golden, like=ModelConfig(scan_layers=True))


def test_the_other_reading_of_mimo():
    golden = dict(np.load(GOLDEN / "mimo.npz"))
    compare(GOLDEN / "mimo", golden, "_post_norm", mtp_trunk_hidden="post_norm")


@pytest.mark.parametrize("case", CASES)
def test_a_round_trip_gives_every_file_back(case, tmp_path):
    model, params = load_pretrained(GOLDEN / case)
    save_pretrained(model, params, tmp_path / "saved")
    assert files(tmp_path / "saved") == files(GOLDEN / case)


@pytest.mark.parametrize("case", [HYBRID, "deepseek_fp8_small_blocks"])
def test_a_round_trip_of_stacked_bfloat16_layers(case, tmp_path):
    like = ModelConfig(scan_layers=True, param_dtype="bfloat16")
    config = read_config(GOLDEN / case, like)
    model, params = load_pretrained(GOLDEN / case, config=config)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} >= {"bfloat16"}
    save_pretrained(model, params, tmp_path / "saved")
    assert files(tmp_path / "saved") == files(GOLDEN / case)


@pytest.mark.parametrize("case", ["glm", "mimo", HYBRID, "qwen3_5_moe", "deepseek"])
def test_trained_parameters_come_back(case, tmp_path):
    model, params = load_pretrained(GOLDEN / case)
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), params)
    saved = tmp_path / "saved"
    save_pretrained(model, moved, saved, dtype="float32")
    _, found = load_pretrained(saved)
    jax.tree.map(np.testing.assert_array_equal, found, moved)


def test_a_model_without_its_modules_carries_them_over(tmp_path):
    config = read_config(GOLDEN / "glm_air", num_mtp_modules=0)
    model, params = load_pretrained(GOLDEN / "glm_air", config=config)
    assert params["mtp"] == {}
    theta = params["trunk"]
    theta["head"]["kernel"] = theta["head"]["kernel"] + 1.0
    save_pretrained(model, params, tmp_path / "saved")
    before, after = open_checkpoint(GOLDEN / "glm_air"), open_checkpoint(tmp_path / "saved")
    changed = {
        name for name in before.tensors if not np.array_equal(before.read(name), after.read(name))
    }
    # The head, and the copy of it that a drafter reads.
    assert changed == {"lm_head.weight", "model.layers.2.shared_head.head.weight"}


def test_fp8_weights_that_outgrow_their_scale_get_another(tmp_path):
    case = "deepseek_fp8_small_blocks"
    model, params = load_pretrained(GOLDEN / case)
    kernel = params["trunk"]["layers"][0][0]["mixer"]["output"]["kernel"]
    params["trunk"]["layers"][0][0]["mixer"]["output"]["kernel"] = kernel.at[0, 0].set(50.0)
    save_pretrained(model, params, tmp_path / "saved")
    _, found = load_pretrained(tmp_path / "saved")
    again = found["trunk"]["layers"][0][0]["mixer"]["output"]["kernel"]
    assert abs(float(again[0, 0]) - 50.0) < 1e-3
    rows, columns = open_checkpoint(GOLDEN / case).block
    np.testing.assert_array_equal(again[columns:], kernel[columns:])
    assert np.abs(again[:columns, :rows] - kernel[:columns, :rows])[1:, 1:].max() < 50 / 16


def test_an_unquantised_copy_says_so(tmp_path):
    model, params = load_pretrained(GOLDEN / "deepseek_fp8_small_blocks")
    save_pretrained(model, params, tmp_path / "saved", dtype="bfloat16")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config
    saved = open_checkpoint(tmp_path / "saved")
    assert {tensor.dtype for tensor in saved.tensors.values()} == {"BF16", "F32"}
    _, again = load_pretrained(tmp_path / "saved")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), again, params)


# The command.


def test_convert_both_ways(tmp_path, capsys):
    source, middle, back = GOLDEN / "glm_air", tmp_path / "orbax", tmp_path / "back"
    assert main(["convert", str(source), str(middle)]) == 0
    assert main(["convert", str(middle), str(back)]) == 0
    said = capsys.readouterr().out
    assert f"{middle}: " in said and f"{back}: " in said and "1 MTP modules" in said
    assert files(back) == files(source)


def test_a_step_of_training_from_a_checkpoint(tmp_path, capsys):
    # Every regime, and what transformers makes of the result, is in tests/parity/test_training.py.
    source, run, saved = GOLDEN / "mimo", tmp_path / "run", tmp_path / "saved"
    config = str(Path(__file__).parents[1] / "configs" / "addition.py")
    options = {
        "model.checkpoint": source,
        "run.directory": run,
        "task.digits": 1,
        "warm-start.steps": 0,
        "run.steps": 1,
        "rollout.num-prompts": 2,
        "rollout.group-size": 2,
        "rollout.max-new-tokens": 4,
        "algorithm.updates-per-rollout": 2,
        "run.evaluation-prompts": 2,
        "optimizer.learning-rate": 0.01,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        assert main(["train", config, *arguments]) == 0
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    assert main(["convert", str(run), str(saved)]) == 0
    before, after = open_checkpoint(source), open_checkpoint(saved)
    assert before.tensors == after.tensors
    name = "model.mtp_layers.0.input_proj.weight"
    assert not np.array_equal(before.read(name), after.read(name))
    # Resumed runs and evaluations want the same model; the checkpoint decides what it decides.
    capsys.readouterr()
    assert main(["train", config, *arguments, "--model.hidden-size", "64"]) == 2
    assert f"model.hidden_size is 64; {source / 'config.json'} says 32" in capsys.readouterr().err
    assert main(["train", config, *arguments, "--model.num-mtp-modules", "2"]) == 2
    assert "has 1 MTP modules" in capsys.readouterr().err


def test_a_run_from_a_damaged_checkpoint_writes_nothing(tmp_path, capsys):
    directory, run = copied(tmp_path, "mimo"), tmp_path / "run"
    sorted(directory.glob("*.safetensors"))[0].unlink()
    config = str(Path(__file__).parents[1] / "configs" / "addition.py")
    options = ("--model.checkpoint", str(directory), "--warm-start.steps", "0")
    assert main(["train", config, *options, "--run.directory", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "missing" in error
    assert not run.exists()


# What is wrong with a directory is said in one line that names file and tensor.


def refuse(directory, *said, **options):
    with pytest.raises(UserError) as caught:
        load_pretrained(directory, config=read_config(directory, **options))
    message = str(caught.value)
    assert "\n" not in message
    for text in said:
        assert text in message


def test_a_missing_shard(tmp_path):
    directory = copied(tmp_path, "glm_air")
    first = sorted(directory.glob("*.safetensors"))[0]
    first.unlink()
    refuse(directory, first.name, "missing")


def test_a_truncated_shard(tmp_path):
    directory = copied(tmp_path, "glm_air")
    last = sorted(directory.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-10])
    refuse(directory, last.name, "truncated", "tensor")


def test_a_shard_of_garbage(tmp_path):
    directory = copied(tmp_path, "glm_air")
    first = sorted(directory.glob("*.safetensors"))[0]
    first.write_bytes(b"garbage garbage")
    refuse(directory, first.name, "no valid safetensors file")


def test_a_tensor_of_another_shape(tmp_path):
    directory = copied(tmp_path, "glm_air")
    change_json(directory / "config.json", intermediate_size=41)
    refuse(directory, ".safetensors", "model.layers.0.mlp.gate_proj.weight", "[40, 24]", "[41, 24]")


def test_a_missing_tensor(tmp_path):
    directory = copied(tmp_path, "glm_air")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = index["weight_map"].pop("model.norm.weight")
    path.write_text(json.dumps(index))
    tensors = load_file(directory / file)
    tensors.pop("model.norm.weight")
    save_file(tensors, directory / file)
    refuse(directory, str(directory), "no tensor model.norm.weight")


def test_a_copy_that_differs(tmp_path):
    directory = copied(tmp_path, "glm_air")
    place = open_checkpoint(directory).tensors["model.layers.2.shared_head.head.weight"]
    with (directory / place.file).open("r+b") as file:
        file.seek(place.start)
        file.write(b"\x01\x02")
    refuse(directory, place.file, "model.layers.2.shared_head.head.weight", "lm_head.weight")


def test_modules_that_are_not_there(tmp_path):
    refuse(GOLDEN / "qwen2_tied", "has 0 MTP modules", num_mtp_modules=1)


@pytest.mark.parametrize(
    ("case", "values", "said"),
    [
        ("glm", {"architectures": ["Llama4"]}, "architectures is ['Llama4']; it must be one of"),
        ("qwen2_tied", {"use_sliding_window": True}, "use_sliding_window is True"),
        ("deepseek", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek", {"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ("glm", {"hidden_size": "24"}, "hidden_size is '24'; it must be a whole number"),
        ("glm", {"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_config_that_is_not_supported(case, values, said, tmp_path):
    directory = copied(tmp_path, case)
    change_json(directory / "config.json", **values)
    refuse(directory, "config.json", said)


def test_no_directory_no_config_and_no_json(tmp_path):
    refuse(tmp_path / "nowhere", "no checkpoint directory")
    refuse(tmp_path, "holds no config.json")
    directory = copied(tmp_path, "glm_air")
    (directory / "config.json").write_text("{")
    refuse(directory, "config.json is no valid JSON")


def test_nothing_is_overwritten_and_nothing_half_written_stays(tmp_path):
    model, params = load_pretrained(GOLDEN / "qwen3_tied")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    with pytest.raises(UserError, match="not empty; nothing was written"):
        save_pretrained(model, params, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    other = Model(dataclasses.replace(model.config, checkpoint=""))
    with pytest.raises(UserError, match="did not come from a Hugging Face directory"):
        save_pretrained(other, params, tmp_path / "new")


# Memory.

# Anonymous memory: what is mapped from the files is the kernel's to take back at any time.
_LOAD = """
import re, sys, threading, time
import jax
from occ_jax.config import ModelConfig
from occ_jax.models import load_pretrained, read_config
def resident():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read()).group(1))
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.002)
config = read_config(sys.argv[1], ModelConfig(scan_layers=True))
jax.block_until_ready(jax.numpy.zeros(8))
before = peak = resident()
threading.Thread(target=watch, daemon=True).start()
params = jax.block_until_ready(load_pretrained(sys.argv[1], config=config)[1])
print(peak - before)
"""


@pytest.mark.slow
def test_loading_holds_the_model_and_one_tensor_more(tmp_path):
    directory = tmp_path / "big"
    shutil.copytree(
        GOLDEN / "qwen3_tied", directory, ignore=shutil.ignore_patterns("*.safetensors*")
    )
    size, wide, layers, vocabulary = 512, 2048, 24, 3000
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    change_json(
        directory / "config.json",
        **heads,
        hidden_size=size,
        intermediate_size=wide,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        max_window_layers=layers,
    )
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape, np.float32)

    tensors = {"model.embed_tokens.weight": draw(vocabulary, size), "model.norm.weight": draw(size)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, shape in {
            **{f"self_attn.{x}_proj": (512, size) for x in "qkv"},
            "self_attn.o_proj": (size, 512),
            **{f"self_attn.{x}_norm": (64,) for x in "qk"},
            **{f"mlp.{x}_proj": (wide, size) for x in ("gate", "up")},
            "mlp.down_proj": (size, wide),
            "input_layernorm": (size,),
            "post_attention_layernorm": (size,),
        }.items():
            tensors[f"{layer}{name}.weight"] = draw(*shape)
    save_file(tensors, directory / "model.safetensors")
    total = sum(x.nbytes for x in tensors.values())
    largest = max(x.nbytes for x in tensors.values())
    done = subprocess.run(
        [sys.executable, "-c", _LOAD, str(directory)], capture_output=True, text=True, check=True
    )
    peak = int(done.stdout) * 1024
    print(
        f"model {total / 2**20:.0f} MiB, largest tensor {largest / 2**20:.0f} MiB, "
        f"peak {peak / 2**20:.0f} MiB"
    )
    # Compiling the handful of programs that place tensors takes its share too.
    assert 0.9 * total < peak < total + 10 * largest + 60 * 2**20
