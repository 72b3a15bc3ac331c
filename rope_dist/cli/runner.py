"""What every command shares: one-line errors with exit code 2, and options that take several values."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from ..messages import did_you_mean, one_line, unknown

LONGEST = 1000
SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
# click's; since 0.26 typer has a copy of its own.
UsageError: Any = typer.BadParameter.__base__


class Command(TyperCommand):
    """A command whose options with a metavar in ``...`` take several values: ``--target 8192 16384``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        params: Any = self.get_params(ctx)
        options = {name: param for param in params for name in param.opts if name.startswith("-")}
        rest, parsed = deque(args), []
        while rest:
            argument = rest.popleft()
            parsed.append(argument)
            if argument == "--":
                parsed += rest
                break
            option = options.get(argument)
            if option is None or option.is_flag:
                continue
            if not rest or rest[0] in options:
                raise typer.BadParameter("a value is missing", ctx, option)
            parsed.append(rest.popleft())
            # As click wants them: --target 8192 --target 16384.
            while option.metavar.endswith("...") and rest and re.match(r"[^-]|-\.?\d|$", rest[0]):
                parsed += [argument, rest.popleft()]
        return super().parse_args(ctx, parsed)


class _Group(TyperGroup):
    """A command with sub-commands: a misspelt one is told the nearest."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[0] not in self.commands and not args[0].startswith("-"):
            ctx.fail(unknown("command", args[0], self.commands))
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args:
            ctx.fail(f"give a command: {', '.join(self.commands)}")
        return super().parse_args(ctx, args)


def make_app() -> typer.Typer:
    """A group of commands, with plain help; the docstring of its callback is the help."""
    return typer.Typer(
        cls=_Group,
        add_completion=False,
        context_settings=SETTINGS,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )


def run_script(function: Callable[..., int | None]) -> int:
    """Run a script: the function's parameters are its options, its module's docstring is its help."""
    app = make_app()
    # click keeps the lines of a paragraph that begins with \\b.
    help = re.sub(r"\n\n(?= |python )", "\n\n\b\n", function.__globals__["__doc__"])
    app.command(cls=Command, context_settings=SETTINGS, help=help)(function)
    return run(app, sys.argv[1:], Path(sys.argv[0]).name)


def quieten() -> None:
    """Silence transformers' notes about loading and lengths; bars are for terminals."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def run(app: typer.Typer, arguments: Sequence[str], name: str) -> Any:
    """Run the command line ``arguments``; returns the exit code: 0, 2 for bad input, 130 when interrupted.

    What a command returns instead of an exit code is returned as it is.
    """
    try:
        return _run(app, list(arguments), name)
    finally:
        _flush()


def _run(app: typer.Typer, arguments: list[str], name: str) -> Any:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the terminal cannot print is printed in escapes, as Python does for errors.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            # Not app(): that exits, draws boxes around errors and hides that the disk is full.
            click_command = typer.main.get_command(app)
            with warnings_of_one_line(name), click_command.make_context(name, arguments) as context:
                return click_command.invoke(context) or 0
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except typer.Exit as ended:
        return ended.exit_code
    except UsageError as error:
        path = error.ctx.command_path if error.ctx else name
        _complain(f"{path}: error: {_usage(error)} (see {path} --help)")
        return 2
    except BrokenPipeError:
        # The reader (head, less) has seen enough.
        return 0
    except KeyboardInterrupt:
        _complain(f"{name}: interrupted")
        return 130
    except (ValueError, OSError, ImportError) as error:
        about = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
        _complain(f"{name}: error: {about}{one_line(error, LONGEST)}")
        return 2


@contextlib.contextmanager
def warnings_of_one_line(name: str) -> Iterator[None]:
    """``rope-dist: warning: what is wrong``: without the line of Python that Python adds."""
    usual = warnings.formatwarning

    def line(message: Warning | str, category: type[Warning], *place: Any, **source: Any) -> str:
        if category is not UserWarning:
            return usual(message, category, *place, **source)
        return f"{name}: warning: {one_line(UserWarning(str(message)), LONGEST)}\n"

    warnings.formatwarning = line
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _usage(error: Any) -> str:
    """``--factor: must be at least 1, got 0``"""
    text, param = error.message, getattr(error, "param", None)
    if hasattr(error, "possibilities"):
        known = [name for option in error.ctx.command.get_params(error.ctx) for name in option.opts]
        text = f"unknown option {error.option_name!r}{did_you_mean(error.option_name, known, 0.7)}"
    elif param is not None:
        name = param.opts[-1] if param.param_type_name == "option" else param.metavar
        text = f"{name}: {text}" if text else f"give {name}: {param.help}"
    return one_line(ValueError(text), LONGEST)


def _complain(message: str) -> None:
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(message, file=sys.stderr)


def _flush() -> None:
    """Write what is left; a stream that takes no more (a closed pipe, a full disk) is sent nowhere.

    Otherwise Python tries again when it exits, prints a traceback and changes the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
