"""The package as it is installed: what it requires, imports and ships, and how it is started.

`make core` and `make wheel` test the same in environments of their own.
"""

import ast
import itertools
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import jax.numpy as jnp
import jaxtyping
import pytest

import occ_jax
from occ_jax.cli.arguments import main
from occ_jax.cli.config_file import load_config
from occ_jax.errors import UserError, missing_extra

ROOT = Path(__file__).parent.parent
SHIPPED = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages whose name on import is not the name they are installed by.
INSTALLED_AS = {
    "absl": "absl-py",
    "orbax": "orbax-checkpoint",
    "tensorflow_datasets": "tensorflow-datasets",
    "math_verify": "math-verify",
}


def requirements(*extras):
    """Names of the packages that the core and these extras require."""
    lists = [PROJECT["dependencies"], *(PROJECT["optional-dependencies"][x] for x in extras)]
    return {re.split(r"[^\w-]", line)[0] for line in itertools.chain(*lists)}


def imports(folder):
    """Packages that the modules of a folder import at run time, with the modules."""
    for path in sorted((ROOT / "occ_jax" / folder).rglob("*.py")):
        tree = ast.parse(path.read_text())
        ifs = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        guarded = [node for node in ifs if ast.unparse(node.test) == "TYPE_CHECKING"]
        for node in {*ast.walk(tree)}.difference(*map(ast.walk, guarded)):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [x.name for x in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                package = name.partition(".")[0]
                if package not in sys.stdlib_module_names and package != "occ_jax":
                    yield INSTALLED_AS.get(package, package), path.relative_to(ROOT)


def run(*arguments, cwd=ROOT):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("calibration", ()),
        ("models", ("models",)),
        ("rl", ("models",)),
        ("", ("models", "train", "wandb")),
    ],
)
def test_every_imported_package_is_required(folder, extras):
    assert [x for x in imports(folder) if x[0] not in requirements(*extras)] == []


def test_the_import_of_occ_jax_loads_no_jax():
    done = run("-c", "import occ_jax, sys; sys.exit('jax' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_package_can_be_imported():
    names = {name for name in dir(occ_jax) if not name.startswith("_")}
    calibration = {name for name, value in vars(occ_jax.calibration).items() if callable(value)}
    assert "calibrate_auxiliary" in calibration
    assert names >= calibration | {"Config", "load_config", "train", "models", "rl"}
    for name in names:
        assert getattr(occ_jax, name) is not None
    with pytest.raises(AttributeError, match="module 'occ_jax' has no attribute 'nothing'"):
        occ_jax.nothing  # noqa: B018


def test_tests_check_the_shapes_of_the_calibration():
    with pytest.raises(jaxtyping.TypeCheckError):
        occ_jax.log_prob_statistics(jnp.ones((2, 3)), jnp.ones((2, 2, 2)), jnp.ones((2, 3)))


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("models", "flax", "models"), ("rl", "jaxtyping", "models"), ("train", "orbax", "train")],
)
def test_a_name_without_its_extra_is_an_import_error_of_one_line(name, package, extra):
    code = f"import sys; sys.modules[{package!r}] = None; from occ_jax import {name}"
    done = run("-c", code)
    assert done.returncode == 1
    line = f"ImportError: occ_jax.{name} needs {package}: pip install 'occ_jax[{extra}]'"
    assert done.stderr.splitlines()[-1] == line
    assert done.stderr.count("Traceback") == 1


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["train", "reverse_digits"], "tyro"),
        (["train", "reverse_digits"], "orbax"),
        (["compare-evaluations", "a", "b"], "rich"),
    ],
)
def test_a_command_without_its_extra_ends_with_one_line(arguments, package, tmp_path):
    code = f"import sys; sys.modules[{package!r}] = None; from occ_jax.__main__ import main; "
    done = run("-c", f"{code} sys.exit(main())", *arguments, cwd=tmp_path)
    line = f"error: this command needs {package}: pip install 'occ_jax[train]'\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", line)


def test_a_missing_package_is_told_from_a_missing_module():
    wandb = ModuleNotFoundError("No module named 'wandb'", name="no_such_package.errors")
    said = missing_extra(wandb, "this command", "train")
    assert said == "this command needs no_such_package: pip install 'occ_jax[train]'"
    with pytest.raises(ModuleNotFoundError, match=r"'jax\.gone'"):
        missing_extra(ModuleNotFoundError("No module named 'jax.gone'", name="jax.gone"), "", "")


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_config_is_found_by_its_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(name) == load_config(str(ROOT / "configs" / f"{name}.py"))


def test_a_file_comes_before_a_shipped_config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.py").write_text("steps = 3\n")
    (tmp_path / "addition").write_text(
        "import base\nfrom occ_jax.config import Config, RunConfig\n"
        "def get_config():\n    return Config(run=RunConfig(steps=base.steps))\n"
    )
    assert load_config("addition").run.steps == 3


def test_an_unknown_name_lists_what_there_is():
    names = ", ".join(SHIPPED)
    with pytest.raises(UserError) as caught:
        load_config("revers_digits")
    assert str(caught.value) == (
        f"no config revers_digits; did you mean reverse_digits? occ_jax has {names}"
    )
    with pytest.raises(UserError) as caught:
        load_config("x")
    assert str(caught.value) == f"no config x; occ_jax has {names}"


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"occ_jax {occ_jax.__version__}\n")


@pytest.mark.parametrize(
    ("command", "program"),
    [(["run.py"], "run.py"), (["-m", "occ_jax"], "python -m occ_jax")],
)
def test_help_names_the_program_as_it_was_started(command, program):
    done = run(*command, "train", "reverse_digits", "--help")
    assert done.returncode == 0
    usages = [line for line in done.stdout.splitlines() if line.startswith("usage: ")]
    assert [line.startswith(f"usage: {program} ") for line in usages] == [True, True]


def test_the_wheel_holds_the_package_its_configs_and_no_more(tmp_path):
    done = run("-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path))
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.whl")
    wheel = zipfile.ZipFile(path)
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names >= {"occ_jax/py.typed", *(f"occ_jax/configs/{name}.py" for name in SHIPPED)}
    assert all(name.startswith("occ_jax/") for name in names)
    information = path.name.removesuffix("-py3-none-any.whl") + ".dist-info"
    metadata = wheel.read(f"{information}/METADATA").decode()
    required = re.findall(r"^Requires-Dist: (\w+)[^;\n]*$", metadata, re.MULTILINE)
    assert sorted(required) == ["jax", "optax"]
    assert f"Version: {occ_jax.__version__}\n" in metadata
    assert (
        "occ-jax = occ_jax.__main__:main" in wheel.read(f"{information}/entry_points.txt").decode()
    )
