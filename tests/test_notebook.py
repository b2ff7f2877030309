"""The notebook: every cell runs, in a kernel of its own, and prints what it says it does; what is committed holds no output."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed; `pip install nbclient ipykernel`")
nbformat = pytest.importorskip("nbformat")

TOUR = Path(__file__).resolve().parent.parent / "examples" / "tour.ipynb"
SECONDS = 4


def printed(cells: list[Any]) -> str:
    return "".join(
        output["text"] for cell in cells for output in cell.get("outputs", []) if output.output_type == "stream"
    )


def test_the_tour_runs(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(TOUR, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear its outputs: they are of one machine"
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = f"{SECONDS = }"
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join(filter(None, [str(TOUR.parent.parent), os.environ.get("PYTHONPATH")]))
    )
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()

    said = printed(code)
    assert "family fp32.d64.causal\n" in said and "elsa-tune show cpp." in said
    assert float(re.findall(r"([\d.]+) \[[\d.]+, [\d.]+\] times as fast as torch's fastest", said)[0]) > 0
    differences = [float(found) for found in re.findall(r"largest difference: (\S+)", said)]
    assert len(differences) == 2 and max(differences) < 2e-6
    assert "xxxx........\n.xxxx.......\n" in said, "the window of three keys before and its own"
    errors = [float(found) for found in re.findall(r"^(?:torch|elsa-tune|as exact as torch) +(\S+)$", said, re.M)]
    assert len(errors) == 3 and min(errors) > 0 and max(errors) < 1e-6
    (figure,) = (data["application/vnd.plotly.v1+json"] for cell in code for data in shown(cell))
    measured = [y for line in figure["data"] for y in line["y"]]
    assert measured and all(y > 0 for y in measured), "torch's own kernels are among them"
    assert re.search(r"^ *1 calls of fp32\.d64\.causal\+window\.softcap@", said, re.M)


def shown(cell: Any) -> list[Any]:
    """What a cell displays, if it is a plot."""
    return [output["data"] for output in cell.outputs if "application/vnd.plotly.v1+json" in output.get("data", {})]
