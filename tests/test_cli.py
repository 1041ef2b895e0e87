"""The command line, as a user types it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from handloom.cli import main
from tests.conftest import BACKEND
from tests.run.run_log import epochs_in

# Hides modules as if they were not installed, and then is the command `handloom`.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
hidden, find_spec = sys.argv.pop(1).split(","), PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in hidden else find_spec(name, *rest)
from handloom.cli import main
main()
"""

REPORTER = """
import os
def main(run_dir, epochs=7):
    (run_dir / "made").mkdir()
    return f"{epochs} epochs on {os.environ['KERAS_BACKEND']}"
"""

TRAINER = """
import keras
import numpy as np
from keras import ops

import handloom as hl

class Line(hl.Model):
    def train_step(self, data):
        x, y = data
        return {"error": self.minimize(lambda: ops.mean((self(x) - y) ** 2))}

def main(run_dir, epochs=3):
    keras.utils.set_random_seed(0)
    model = Line([keras.layers.Dense(1)])
    model.compile("sgd")
    x = np.linspace(-1, 1, 64, dtype="float32")[:, None]
    history = model.fit(x, 2 * x + 1, epochs=epochs, verbose=0, run_dir=run_dir).history
    return f"{history['error'][0] > history['error'][-1]} in {len(history['error'])}"
"""


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path, monkeypatch):
    """Where a user stands: an empty directory, and a Keras that is not configured."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras-home"))
    monkeypatch.setenv("KERAS_BACKEND", BACKEND)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def reporter(tmp_path):
    """A file of a user's that trains nothing and says what it was told."""
    (tmp_path / "reporter.py").write_text(REPORTER)
    return "reporter.py"


def run(*words, **environment):
    return CliRunner().invoke(main, ["run", *map(str, words)], env=environment)


def answer(result):
    """The second line of the output: what the recipe returned."""
    assert result.exit_code == 0, result.output
    return result.output.splitlines()[1]


def refusal(result):
    """The one line of an error."""
    assert result.exit_code == 1, result.output
    assert result.output.splitlines()[-1].startswith("Error: ")
    return result.output.splitlines()[-1]


def run_without(hidden, *words, backend=None):
    """Runs the command in a process of its own, with modules hidden."""
    environment = os.environ | ({"KERAS_BACKEND": backend} if backend else {})
    if backend is None:
        del environment["KERAS_BACKEND"]
    command = [sys.executable, "-c", WITHOUT, hidden, "run", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


# --------------------------------------------------------------- help and list


@pytest.mark.once
@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["list"], ["--version"]])
def test_what_needs_no_backend_imports_none_and_no_keras(words):
    code = (
        "import sys\nfrom handloom.cli import main\n"
        f"main({words}, standalone_mode=False)\n"
        "print('imported:', *{'keras', 'jax', 'tensorflow', 'torch', 'numpy', 'matplotlib'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1].strip() == "imported:"


@pytest.mark.once
def test_help_names_the_commands():
    output = CliRunner().invoke(main, ["--help"]).output
    assert "run " in output
    assert "list " in output


@pytest.mark.once
def test_list_names_every_recipe_with_its_first_line():
    lines = CliRunner().invoke(main, ["list"]).output.splitlines()
    listed = dict(re.split(" {2,}", line) for line in lines)
    assert list(listed) == ["digits", "gan-digits", "loop-by-hand", "wide-and-deep"]
    assert listed["gan-digits"] == "Handwritten digits drawn by a GAN: two networks, two optimizers, one step."


# ----------------------------------------------------------------- what to run


@pytest.mark.once
@pytest.mark.parametrize("typed", ["gan-digit", "gan_digits", "gandigits"])
def test_an_unknown_recipe_is_answered_with_the_nearest_one(typed):
    assert f"There is no recipe '{typed}'; did you mean 'gan-digits'?" in refusal(run(typed))


@pytest.mark.once
def test_a_recipe_like_no_other_is_answered_with_all_of_them():
    message = refusal(run("xyz"))
    assert "there are digits, gan-digits, loop-by-hand, wide-and-deep." in message
    assert "For a file of your own, give its path: xyz.py" in message


@pytest.mark.once
def test_a_file_that_is_not_there_is_named():
    assert "There is no file nowhere/train.py." in refusal(run("nowhere/train.py"))


@pytest.mark.once
def test_a_file_without_main_is_told_what_it_lacks_and_leaves_nothing(tmp_path):
    Path("train.py").write_text("main = 3\n")
    assert "train.py has no function main(run_dir, epochs=...)" in refusal(run("train.py", "--run-dir", "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.once
@pytest.mark.parametrize("name", ["json.py", "my.train-2.py"])
def test_a_file_may_have_any_name_also_that_of_a_module(name):
    Path(name).write_text(REPORTER)
    assert answer(run(name)).startswith("7 epochs")


@pytest.mark.once
def test_a_file_finds_its_neighbours(tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    (folder / "neighbour_of_train.py").write_text("ANSWER = 'from next door'\n")
    (folder / "train.py").write_text("from neighbour_of_train import ANSWER\ndef main(run_dir): return ANSWER\n")
    assert answer(run("project/train.py")) == "from next door"


@pytest.mark.once
def test_an_error_in_a_file_keeps_its_traceback():
    Path("train.py").write_text("def main(run_dir): return 1 / 0\n")
    result = run("train.py")
    assert isinstance(result.exception, ZeroDivisionError)
    assert not Path("runs", f"train-{BACKEND}", "run.json").exists()


def test_a_file_of_the_users_trains_on_the_backend_at_hand(tmp_path):
    Path("line.py").write_text(TRAINER)
    result = run("line.py")
    assert result.output.startswith(f"line.py on {BACKEND}\n")
    assert answer(result) == "True in 3"
    assert len(epochs_in(tmp_path / "runs" / f"line-{BACKEND}")) == 3


def test_a_recipe_runs_by_its_name_for_so_many_epochs():
    output = run("wide-and-deep", "--epochs", 1, "--run-dir", "out").output
    assert output.startswith(f"wide-and-deep on {BACKEND}\n")
    assert len(epochs_in(Path("out"))) == 1
    result = json.loads(Path("out", "run.json").read_text())["result"]
    assert result.startswith("Accuracy on held-out tumours: ")
    assert result in output
    assert (
        f"Everything is in out{os.sep}: checkpoints{os.sep}, curves.png, events.jsonl, model.weights.h5, run.json"
        in output
    )


@pytest.mark.once
def test_epochs_are_the_files_own_unless_given(reporter):
    assert answer(run(reporter)).startswith("7 epochs")
    assert answer(run(reporter, "--epochs", 2)).startswith("2 epochs")


@pytest.mark.once
@pytest.mark.parametrize("words", [["--epochs", "0"], ["--epochs", "some"], ["--backend", "numpy"], ["--fresher"]])
def test_options_that_make_no_sense_are_refused_with_the_usage(reporter, words):
    result = run(reporter, *words)
    assert result.exit_code == 2
    assert "Usage: " in result.output


# ---------------------------------------------------------------- which backend


@pytest.mark.once
def test_the_backend_asked_for_comes_before_the_one_in_the_environment(reporter):
    assert answer(run(reporter, KERAS_BACKEND="torch")) == "7 epochs on torch"
    assert answer(run(reporter, "--backend", "tensorflow", KERAS_BACKEND="torch")) == "7 epochs on tensorflow"


@pytest.mark.once
@pytest.mark.parametrize(
    ("configured", "expected"),
    [
        ('{"backend": "torch"}', "torch"),
        ('{"backend": "tensorflow", "floatx": "float32"}', "tensorflow"),
        ('{"backend": "openvino"}', "jax"),  # Not one of ours: the first that is installed.
        ("{}", "jax"),
        ("not JSON", "jax"),
        (None, "jax"),
    ],
)
def test_without_either_it_is_what_keras_is_configured_for_or_the_first_installed(
    reporter, tmp_path, configured, expected
):
    if configured is not None:
        (tmp_path / "keras-home").mkdir()
        (tmp_path / "keras-home" / "keras.json").write_text(configured)
    assert answer(run(reporter, KERAS_BACKEND=None)) == f"7 epochs on {expected}"


@pytest.mark.once
@pytest.mark.parametrize("name", ["jax", "tensorflow", "torch"])
def test_a_backend_that_is_not_installed_is_answered_with_what_to_install(name, tmp_path):
    result = run_without(name, "digits", "--backend", name, "--run-dir", "out")
    assert result.returncode == 1
    assert f"set to the backend '{name}', which is not installed" in result.stderr
    assert f'pip install "handloom[{name}]"' in result.stderr
    assert "or choose an installed one: KERAS_BACKEND=" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.once
def test_with_no_backend_installed_at_all_one_is_proposed():
    result = run_without("jax,tensorflow,torch", "digits")
    assert result.returncode == 1
    assert 'pip install "handloom[jax]".' in result.stderr
    assert "choose an installed one" not in result.stderr


@pytest.mark.once
def test_a_backend_that_is_not_ours_is_answered_with_those_that_are():
    result = run_without("", "digits", backend="numpy")
    assert result.returncode == 1
    assert "Handloom runs on jax, tensorflow, torch; Keras is set to 'numpy'." in result.stderr


@pytest.mark.once
@pytest.mark.parametrize("missing", ["sklearn", "matplotlib"])
def test_what_recipes_need_is_asked_for_before_anything_is_trained(missing, tmp_path):
    result = run_without(missing, "digits", "--run-dir", "out", backend="jax")
    assert result.returncode == 1
    assert f'The recipes need {missing}, not installed here: pip install "handloom[recipes]".' in result.stderr
    assert "Epoch" not in result.stdout
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------- the run directory


@pytest.mark.once
def test_a_run_leaves_a_record_of_itself_where_it_says(reporter, tmp_path):
    result = run(reporter)
    folder = tmp_path / "runs" / f"reporter-{BACKEND}"
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    seconds = record.pop("seconds")
    assert 0 <= seconds < 60
    assert record == {"recipe": "reporter.py", "backend": BACKEND, "result": f"7 epochs on {BACKEND}"}
    where = Path("runs", f"reporter-{BACKEND}")
    assert f"Everything is in {where}{os.sep}: made{os.sep}, run.json" in result.output


@pytest.mark.once
@pytest.mark.parametrize(("returned", "shown"), [("None", "Done."), ("{1: object}", "{1: <class 'object'>}")])
def test_a_main_may_return_anything_or_nothing(returned, shown):
    Path("train.py").write_text(f"def main(run_dir): return {returned}\n")
    assert answer(run("train.py", "--run-dir", "out")) == shown
    assert json.loads(Path("out", "run.json").read_text()).keys() == {"recipe", "backend", "seconds", "result"}


@pytest.mark.once
def test_every_run_without_a_directory_gets_one_of_its_own(reporter, tmp_path):
    for _ in range(3):
        answer(run(reporter))
    name = f"reporter-{BACKEND}"
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {name, f"{name}-2", f"{name}-3"}


@pytest.mark.once
def test_a_directory_that_holds_a_run_is_used_again_only_fresh(reporter):
    answer(run(reporter, "--run-dir", "out", "--epochs", 1))
    Path("out", "old").touch()
    message = refusal(run(reporter, "--run-dir", "out", "--epochs", 2))
    assert "out holds a run; --fresh empties it. Choose another directory with --run-dir." in message
    assert json.loads(Path("out", "run.json").read_text())["result"].startswith("1 epochs")
    answer(run(reporter, "--run-dir", "out", "--epochs", 2, "--fresh"))
    assert {path.name for path in Path("out").iterdir()} == {"made", "run.json"}
    assert json.loads(Path("out", "run.json").read_text())["result"].startswith("2 epochs")


@pytest.mark.once
def test_a_run_whose_checkpoints_are_there_goes_on_where_it_is_asked_for():
    run("wide-and-deep", "--epochs", 1, "--run-dir", "out")
    output = run("wide-and-deep", "--epochs", 2, "--run-dir", "out").output
    assert f"Resuming from {Path('out', 'checkpoints')}" in output
    assert len(epochs_in(Path("out"))) == 2
    assert "Resuming" not in run("wide-and-deep", "--epochs", 1, "--run-dir", "out", "--fresh").output
    assert len(epochs_in(Path("out"))) == 1


@pytest.mark.once
@pytest.mark.parametrize("fresh", [[], ["--fresh"]])
def test_a_directory_that_is_no_run_is_never_emptied(reporter, fresh):
    Path("thesis").mkdir()
    Path("thesis", "chapter-1.tex").write_text("Dear reader")
    message = refusal(run(reporter, "--run-dir", "thesis", *fresh))
    assert "thesis holds files that are of no finished run. Choose another directory" in message
    assert Path("thesis", "chapter-1.tex").read_text() == "Dear reader"
    assert len(list(Path("thesis").iterdir())) == 1


@pytest.mark.once
def test_a_run_is_not_removed_for_one_that_cannot_begin(reporter):
    answer(run(reporter, "--run-dir", "out"))
    Path("broken.py").write_text("import nothing_of_that_name\n")
    assert isinstance(run("broken.py", "--run-dir", "out", "--fresh").exception, ModuleNotFoundError)
    assert Path("out", "run.json").exists()


@pytest.mark.once
def test_a_fresh_run_may_be_where_one_stands_and_follows_no_link(tmp_path, monkeypatch):
    for name, text in {"train.py": REPORTER, "elsewhere/kept": "kept"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    answer(run("../train.py", "--run-dir", "."))
    Path("link").symlink_to(tmp_path / "elsewhere")
    answer(run("../train.py", "--run-dir", ".", "--fresh"))
    assert not Path("link").is_symlink()
    assert (tmp_path / "elsewhere" / "kept").read_text() == "kept"


@pytest.mark.once
def test_a_directory_is_made_with_those_above_it_and_an_empty_one_is_used(reporter):
    answer(run(reporter, "--run-dir", "a/b/c"))
    Path("empty").mkdir()
    answer(run(reporter, "--run-dir", "empty"))
    assert Path("a", "b", "c", "run.json").exists()
    assert Path("empty", "run.json").exists()
