"""Every notebook runs from top to bottom."""

import json
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("quick_compilation")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    matplotlib.use("Agg")
    cells = [
        "".join(cell["source"])
        for cell in json.loads(path.read_text())["cells"]
        if cell["cell_type"] == "code"
    ]
    # Less work than a reader would ask for; the cells are the same otherwise.
    small = '"configs/reverse_digits.py", ["--warm-start.steps=2", "--rollout.num-prompts=8"]'
    source = "\n".join(cells).replace("STEPS = 30", "STEPS = 2")
    source = source.replace('"configs/reverse_digits.py"', small)
    names: dict[str, object] = {}
    exec(compile(source, str(path), "exec"), names)
    assert names["runs"] if "runs" in names else names["rows"]
