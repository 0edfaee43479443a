"""What the commands share: options that take several values, JSON, bars."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from clipworks.cli import console
from clipworks.errors import ConfigError

VALUES = st.sampled_from(["a cat", "a dog", "x.jpg", "-", "3"])
OPTIONS = st.sampled_from(["--labels", "--top", "--json", "--labels=one", "-k"])


@given(st.lists(VALUES | OPTIONS, max_size=12))
def test_only_repetitions_of_the_greedy_option_are_added(args: list[str]) -> None:
    result = console.repeated(args, {"--labels"})
    place = 0
    for argument in result:
        if place < len(args) and argument == args[place]:
            place += 1
        else:
            assert argument == "--labels"
    assert place == len(args)


@given(st.lists(VALUES | OPTIONS, max_size=12))
def test_every_value_after_the_greedy_option_stands_behind_it(args: list[str]) -> None:
    expected, inside = [], False
    for argument in args:
        if argument.startswith("--labels"):
            inside = True
            expected += [argument.partition("=")[2]] if "=" in argument else []
        elif argument.startswith("-") and argument != "-":
            inside = False
        elif inside:
            expected.append(argument)
    result = console.repeated(args, {"--labels"})
    taken = [argument.partition("=")[2] for argument in result if argument.startswith("--labels=")]
    followed = [
        after
        for before, after in pairwise(result)
        if before == "--labels" and not (after.startswith("-") and after != "-")
    ]
    assert sorted(taken + followed) == sorted(expected)


def test_a_bare_double_dash_ends_the_values() -> None:
    assert console.repeated(["--labels", "a", "b", "--", "c", "d"], {"--labels"}) == [
        "--labels", "a", "--labels", "b", "--", "c", "d",
    ]  # fmt: skip


def test_json_with_a_file_name_that_is_not_utf_8_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    value = {"path": "bad\udcff.jpg", "label": "кот"}
    console.print_json(value)
    assert json.loads(capsys.readouterr().out) == value


def test_json_keeps_letters_of_other_scripts_readable(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json(["кот"])
    assert "кот" in capsys.readouterr().out


@given(st.floats(0, 1), st.integers(1, 60))
def test_a_bar_is_as_long_as_its_share(share: float, width: int) -> None:
    assert abs(len(console.bar(share, width)) - share * width) <= 0.5


def test_an_unknown_precision_and_a_missing_device_say_what_there_is() -> None:
    with pytest.raises(ConfigError, match="fp32, bf16 or auto, not 'fp8'"):
        console.check_precision("fp8")
    with pytest.raises(ConfigError, match="--device 'abacus' cannot be used"):
        console.load_clip("seedling", "abacus")


def test_words_in_brackets_are_shown_as_they_are() -> None:
    import typer
    from rich.text import Text

    app = typer.Typer()

    @app.command()
    def show() -> None:
        table = console.make_table("label")
        table.add_row(Text("an [red]owl[/]"))
        console.show(table)

    assert "an [red]owl[/]" in CliRunner().invoke(app, []).stdout
