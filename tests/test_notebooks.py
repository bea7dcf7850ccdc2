"""The notebooks run from top to bottom; the committed ones are executed, without errors or local paths."""

import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("name", NAMES)


def read(name):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def texts(cell):
    """Everything in a cell's outputs that is text."""
    for output in cell.outputs:
        yield output.get("text", "")
        yield from output.get("traceback", [])
        for kind, content in output.get("data", {}).items():
            if kind.startswith("text/"):
                yield re.sub(r"data:[\w/;-]+,[\w+/=]+", "", content)  # sound, as base64


def test_there_is_one_for_each_stage():
    assert NAMES[:5] == ["01_data", "02_model", "03_train", "04_probe", "05_noise"]


def execute(name):
    """The notebook with new outputs. Raises CellExecutionError, with the cell and its traceback."""
    resources = {"metadata": {"path": str(FOLDER)}}
    return NotebookClient(read(name), timeout=300, kernel_name="python3", resources=resources).execute()


@pytest.fixture(scope="module")
def executed(request):
    """{name: future of the executed notebook}. Two run at a time, each with the one thread of conftest.py."""
    chosen = {item.callspec.params["name"] for item in request.session.items if "executed" in item.fixturenames}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(execute, name) for name in sorted(chosen, reverse=True)}  # the longest first


@every_notebook
def test_a_notebook_runs_from_top_to_bottom(name, executed):
    book = executed[name].result()
    assert all(cell.execution_count for cell in book.cells if cell.cell_type == "code")


@pytest.mark.parametrize("told", ["working directory", "notebook's folder", "Jupyter", "VS Code"])
def test_the_first_cell_finds_the_project(told, tmp_path):
    """In a copy of the project, by whatever tells where the notebook lies."""
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (project / "notebooks").mkdir(parents=True)
    for path in FOLDER.parent.glob("*.py"):
        shutil.copy(path, project)
    shutil.copy(FOLDER / "lesson.py", project / "notebooks")
    notebook = str(project / "notebooks" / "some.ipynb")
    env = {**os.environ, "JPY_SESSION_NAME": notebook if told == "Jupyter" else ""}
    where = nbformat.v4.new_code_cell(f"__vsc_ipynb_file__ = {notebook!r}" if told == "VS Code" else "")
    start = {"working directory": project, "notebook's folder": project / "notebooks"}.get(told, elsewhere)
    firsts = {next(cell.source for cell in read(name).cells if cell.cell_type == "code") for name in NAMES}
    for source in firsts:  # the same in all, as it should be, or a few
        found = nbformat.v4.new_code_cell("import model; print(model.__file__)")
        book = nbformat.v4.new_notebook(cells=[where, nbformat.v4.new_code_cell(source), found])
        resources = {"metadata": {"path": str(start)}}
        NotebookClient(book, timeout=120, kernel_name="python3", resources=resources).execute(env=env)
        assert found.outputs[0].text.strip() == str(project / "model.py")


@every_notebook
def test_a_committed_notebook_is_complete(name):
    book = read(name)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    prose = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not executed from top to bottom"
    assert not any(output.output_type == "error" for cell in code for output in cell.outputs)
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert book.metadata.kernelspec.name == "python3"
    paper = "https://arxiv.org/abs/2502.12511"
    for part in ("What you will learn", "Exercises", "<summary>Answer</summary>", paper):
        assert part in prose, part
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 1_500_000


@every_notebook
def test_a_committed_notebook_shows_no_path_of_a_machine(name):
    folders = [tempfile.gettempdir() + os.sep, f"{Path.home()}{os.sep}", str(FOLDER.parent)]
    folders += ["site-packages", "ipykernel_"]
    local = re.compile("|".join([r"/home/\w", r"[/\\]Users[/\\]", *map(re.escape, folders)]))
    for cell in read(name).cells:
        for text in texts(cell) if cell.cell_type == "code" else ():
            assert not local.search(text), f"{cell.id}: {local.search(text)[0]} in {text[:200]!r}"
