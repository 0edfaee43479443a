"""The front of the command line: what it costs, what it lists, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import clipworks
from clipworks import cli
from clipworks.errors import DataError

SOURCE = Path(clipworks.__file__).parent.parent
RUN = "from clipworks.cli import main; main()"
RUNNER = CliRunner()


def python(code: str, *args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(SOURCE), "COLUMNS": "100"}
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def context() -> tuple[Any, Any]:
    group = typer.main.get_command(cli.app)
    return group, group.make_context("clipworks", ["papers"])


def leaves(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        for name, one in command.commands.items():
            yield from leaves(one, f"{path} {name}")
    else:
        yield path, command


def test_help_lists_every_command_in_its_group_and_loads_no_heavy_library() -> None:
    code = (
        "import sys\nfrom clipworks.cli import main\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "heavy = {'torch', 'numpy', 'PIL', 'lancedb', 'pyarrow', 'transformers'} & set(sys.modules)\n"
        "print('HEAVY', sorted(heavy))"
    )
    done = python(code, "--help")
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    places = [done.stdout.index(f"─ {panel} ─") for panel in cli.COMMANDS]
    assert places == sorted(places)
    group, found = context()
    for name in group.list_commands(found):
        assert f"│ {name} " in done.stdout


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    done = python("import sys, clipworks; print({'torch', 'numpy', 'rich', 'typer'} & set(sys.modules))")
    assert done.stdout.strip() == "set()"


@pytest.mark.slow
@pytest.mark.parametrize(("code", "args", "limit"), [(RUN, ["--help"], 1.0), ("import clipworks", [], 0.3)])
def test_help_takes_less_than_a_second_and_an_import_less_than_a_third(
    code: str, args: list[str], limit: float
) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        assert python(code, *args).returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < limit


def test_every_command_shows_an_example_and_takes_json() -> None:
    group, found = context()
    names = group.list_commands(found)
    commands = [leaf for name in names for leaf in leaves(group.get_command(found, name), name)]
    assert commands
    for path, command in commands:
        text = f"{command.help} {command.epilog or ''}"
        assert f"clipworks {path} " in text, f"{path} has no example in its help"
        options = {spelling for parameter in command.params for spelling in parameter.opts}
        assert "--json" in options, f"{path} has no --json"


def test_the_commands_of_the_front_are_the_files_that_are_there() -> None:
    group, found = context()
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - {"__init__", "console"}
    assert set(group.list_commands(found)) == files


def test_version_is_the_package_s() -> None:
    done = RUNNER.invoke(cli.app, ["--version"])
    assert (done.exit_code, done.stdout) == (0, f"clipworks {clipworks.__version__}\n")


def test_no_command_prints_the_help() -> None:
    done = RUNNER.invoke(cli.app, [])
    assert done.exit_code == 0
    assert "Usage: clipworks" in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["clasify"], "there is no command 'clasify'; did you mean classify?"),
        (["xyzzy"], "there is no command 'xyzzy'; `clipworks --help` lists them"),
        (["index", "querry"], "query"),
        (["classify", "--lables", "a"], "--labels"),
        (["classify", "x.jpg", "--top", "many"], "--top"),
        (["--verzion"], "--version"),
    ],
)
def test_a_wrong_command_line_is_one_line_with_the_nearest_name(args: list[str], said: str) -> None:
    done = RUNNER.invoke(cli.app, args)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def ends(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    def fail() -> None:
        raise error

    import clipworks.cli.models as module

    monkeypatch.setattr(module, "models", fail)
    return RUNNER.invoke(cli.app, ["models"])


def test_an_error_of_the_input_is_one_line_on_stderr_and_exit_code_2(monkeypatch: pytest.MonkeyPatch) -> None:
    done = ends(monkeypatch, DataError("x.csv: two\nlines"))
    assert (done.exit_code, done.stdout, done.stderr) == (2, "", "error: x.csv: two lines\n")


def test_a_file_that_the_system_refuses_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    done = ends(monkeypatch, PermissionError(13, "Permission denied", "/some/file"))
    assert (done.exit_code, done.stderr) == (2, "error: /some/file: Permission denied\n")


def test_an_interruption_is_one_line_and_exit_code_130(monkeypatch: pytest.MonkeyPatch) -> None:
    done = ends(monkeypatch, KeyboardInterrupt())
    assert (done.exit_code, done.stderr) == (130, "interrupted\n")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    done = ends(monkeypatch, RuntimeError("a bug"))
    assert isinstance(done.exception, RuntimeError)
    code = (
        "import clipworks.cli.models as m\ndef models(): 1 / 0\nm.models = models\n"
        "from clipworks.cli import main; main()"
    )
    outcome = python(code, "models")
    assert outcome.returncode == 1
    assert "Traceback" in outcome.stderr
    assert "ZeroDivisionError" in outcome.stderr


def test_a_reader_who_leaves_early_causes_no_complaint() -> None:
    code = (
        "import clipworks.cli.models as m\n"
        "def models():\n  import typer\n  for _ in range(100_000): typer.echo('x' * 80)\n"
        "m.models = models\nfrom clipworks.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "models"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=30) == 1
    assert said == b""


def test_ctrl_c_ends_a_running_command_with_130() -> None:
    # A shell starts what runs in the background deaf to Ctrl-C, and that is inherited.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import clipworks.cli.models as m\n"
        "def models():\n  import time\n  print('ready', flush=True)\n  time.sleep(60)\n"
        "m.models = models\nfrom clipworks.cli import main; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "models"],
        env=os.environ | {"PYTHONPATH": str(SOURCE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "interrupted\n"
        assert process.wait(timeout=30) == 130
