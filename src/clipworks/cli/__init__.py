"""The command line: one file a command, and no logic of its own.

A command NAME lives in `cli/NAME.py`, as a function of that name or, where it has commands of its own, as
a Typer called `app`. `COMMANDS` says where the help shows it; it is there when its file is. The file is
imported when its command is asked for, so no command pays for another's imports; `clipworks --help` asks
for all of them, which is why they import heavy things inside functions.

What is the input's fault ends as one line on stderr and exit code 2; a bug keeps its traceback.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from clipworks.errors import ClipworksError, nearest

COMMANDS = {
    "Use": (
        "classify",
        "index",
        "embed",
        "segment",
        "anomaly",
        "predict",
        "serve",
        "export",
        "models",
        "demo",
    ),
    "Train": ("fit", "pretrain", "finetune", "soup"),
    "Research": ("papers", "prove", "audit", "bench", "curate", "world"),
}
BAD_INPUT, INTERRUPTED = 2, 130

# Typer brings click inside itself or beside it, depending on its version; both ways these are its errors.
_UsageError: Any = typer.BadParameter.__base__
_ClickError: Any = _UsageError.__base__


class Commands(TyperGroup):
    """The group of all commands, which imports a command's file when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Names in the order of `COMMANDS`."""
        there = {module.name for module in pkgutil.iter_modules(__path__)}
        return [name for names in COMMANDS.values() for name in names if name in there]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        if cmd_name not in self.commands:
            if cmd_name not in self.list_commands(ctx):
                return None
            panel = next(panel for panel, names in COMMANDS.items() if cmd_name in names)
            self.commands[cmd_name] = _command(cmd_name, panel)
        return self.commands[cmd_name]

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the arguments name; for an unknown one the error says the nearest names."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            close = nearest(name, self.list_commands(ctx)) or "; `clipworks --help` lists them"
            raise _UsageError(f"there is no command {name!r}{close}")
        return super().resolve_command(ctx, args)

    def main(self, args: Any = None, prog_name: str | None = None, *_: Any, **extra: Any) -> Any:
        """Run a command line and end the process with its exit code; see the head of this module."""
        extra["standalone_mode"] = False
        try:
            code = super().main(args, prog_name="clipworks", **extra)
            sys.stdout.flush()
        except ClipworksError as error:
            _say(f"error: {error}")
            code = BAD_INPUT
        except (typer.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        except _ClickError as error:
            code = _usage(error)
        except BrokenPipeError:
            # The reader has what it wanted; the flush at the end of the process must not complain either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 1
        except OSError as error:
            if error.filename is None:
                raise
            _say(f"error: {error.filename}: {error.strerror}")
            code = BAD_INPUT
        if code == INTERRUPTED:
            _say("interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def _command(name: str, panel: str) -> Any:
    from clipworks.cli.console import Command

    module = importlib.import_module(f"clipworks.cli.{name}")
    target = getattr(module, "app", None)
    if target is None:
        target = typer.Typer(add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)
        target.command(name, cls=Command)(getattr(module, name))
        command: Any = typer.main.get_command(target)
    else:
        command = typer.main.get_group(target)
        command.name = name
    command.rich_help_panel = panel
    return command


def _usage(error: Any) -> int:
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return BAD_INPUT
    context = getattr(error, "ctx", None)
    where = f" (see {context.command_path} --help)" if context is not None else ""
    _say(f"error: {error.format_message().rstrip('.')}{where}")
    return BAD_INPUT


def _say(line: str) -> None:
    typer.echo(" ".join(line.splitlines()), err=True)


def _version(asked: bool) -> None:
    if asked:
        from clipworks import __version__

        typer.echo(f"clipworks {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog='Example: clipworks classify photo.jpg --labels "a cat" "a dog"',
)


@app.callback()
def front(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Use, train and study CLIP models: classify and search pictures, run the papers built on CLIP."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """The entry point `clipworks`."""
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        # A file name that is not UTF-8 goes out as it came in.
        reconfigure(errors="surrogateescape")
    typer.main.get_command(app)()
