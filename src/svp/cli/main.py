"""`svp`: the table of verbs, each loaded when it is used, and the one place that turns trouble into an exit code."""

from __future__ import annotations

import difflib
import errno
import importlib
import os
import re
import signal
import sys
import tempfile
import traceback
import warnings
from types import FrameType
from typing import Any, NoReturn

import click

from svp.cli.words import without_dashes
from svp.errors import SvpError
from svp.extras import version

VERBS = {
    "train": "Adapt a backbone to your pictures; ends in a table.",
    "eval": "Measure a trained run: accuracy per class, confusion, calibration.",
    "predict": "Label pictures with a trained run.",
    "list": "Show backbones, methods, tasks, protocols or recipes, and their options.",
    "doctor": "Show what this machine has: versions, kernels, their error and speed.",
    "bench": "Measure a training step here, beside its peers and what the machine can do at most.",
    "convert": "Turn checkpoints and other people's adapters into files of this package.",
}
HABITS = {  # what users of other programs type
    "val": "eval", "test": "eval", "evaluate": "eval", "classify": "predict", "infer": "predict", "fit": "train",
    "checks": "doctor", "check": "doctor", "env": "doctor", "models": "list backbones", "backbones": "list backbones",
    "methods": "list methods", "benchmark": "bench", "speed": "bench", "help": "--help",
}  # fmt: skip


class Verbs(click.Group):
    """Knows names and help lines from the table; imports a verb's file when that verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return importlib.import_module(f"svp.cli.{cmd_name}").command if cmd_name in VERBS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        word = args[0]
        if word not in VERBS:
            close = [HABITS[word]] if word in HABITS else difflib.get_close_matches(word, VERBS, 3)
            hint = f"svp {close[0]}" if close else f"verbs are {', '.join(VERBS)}"
            raise SvpError(f"there is no verb '{word}'", hint, "usage")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def show_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        found = version("svp-vision")
        click.echo(f"svp {found}" if found else "svp, from source")
        ctx.exit()


@click.group(
    cls=Verbs,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try: svp train digits --method svp,linear",
)
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=show_version, help="Show the version.")  # fmt: skip
@click.option("--debug", is_flag=True, help="Show the traceback of a problem.")
@click.pass_context
def svp(ctx: click.Context, debug: bool) -> None:
    """Adapt a pre-trained Vision Mamba to your own pictures with Selective Visual Prompting."""
    ctx.obj = {"debug": debug}


def main() -> NoReturn:
    """Run a command line and end the process with its exit code."""
    warnings.showwarning = one_line_warning
    signal.signal(signal.SIGTERM, on_terminate)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # LANG=C, old Windows consoles: a sign they lack is no reason to stop
            stream.reconfigure(errors="backslashreplace")
    is_debug = "--debug" in sys.argv
    argv = [word for word in sys.argv[1:] if word != "--debug"]  # may stand anywhere
    sys.exit(run(["--debug", *argv] if is_debug else argv, is_debug))


def run(argv: list[str], is_debug: bool = False) -> int:
    """The exit code of a command line; what is wrong is said on stderr, in two lines, without a traceback."""
    try:
        code = svp.main(argv, prog_name="svp", standalone_mode=False)
        if sys.stdout is not None:  # closed by the shell: >&-
            sys.stdout.flush()
        return code if isinstance(code, int) else 0  # ctx.exit(1) comes back as a value
    except SvpError as err:
        return said(err.problem, err.hint, err.exit_code, is_debug)
    except click.exceptions.Exit as err:
        return err.exit_code
    except click.exceptions.NoArgsIsHelpError as err:  # its message is the whole page
        click.echo(err.format_message(), err=True)
        return 2
    except click.UsageError as err:
        return usage(err, argv, is_debug)
    except click.ClickException as err:
        return said(err.format_message(), "", err.exit_code, is_debug)
    except (KeyboardInterrupt, click.Abort):
        click.echo("stopped", err=True)
        return 130
    except BrokenPipeError:
        return unread()
    except SystemExit as err:
        if isinstance(err.__context__, BrokenPipeError) or "PacifyFlush" in type(sys.stdout).__name__:
            return unread()  # click has caught it, and wants to exit with 1
        raise
    except OSError as err:
        if err.errno == errno.ENOSPC and err.filename is None:  # no file of ours: those are told with their name
            return said(
                "there is no space left for what is written", "free some space, or write elsewhere", 1, is_debug
            )
        return broken_install(err, is_debug) or bug(err, is_debug)
    except Exception as err:
        return out_of_memory(err, is_debug) or broken_install(err, is_debug) or bug(err, is_debug)


def unread() -> int:
    """`svp list … | head`: nobody reads on, which is no error."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return 0


def said(problem: str, hint: str, code: int, is_debug: bool) -> int:
    if is_debug:
        traceback.print_exc()
    for word, text in (("error", problem), ("hint", hint)):
        if text:
            click.echo(f"{word}: {' '.join(text.splitlines())}", err=True)
    return code


def usage(err: click.UsageError, argv: list[str], is_debug: bool) -> int:
    """Click's message with our hint: the nearest flag, or the form that was meant."""
    problem = err.format_message().rstrip(".")
    verb = next((word for word in argv if word in VERBS), "")
    where = err.ctx.command_path if err.ctx else f"svp {verb}".rstrip()
    hint = f"{where} --help"
    if isinstance(err, click.NoSuchOption):
        problem = f"there is no option {err.option_name} of {where}"
        close = difflib.get_close_matches(err.option_name, err.possibilities or (), 3, 0.75)
        if close:
            hint = f"did you mean {' or '.join(close)}?"
        elif where == "svp train":
            hint = f"an option of a method is set with -s {err.option_name.lstrip('-').replace('-', '_')}=VALUE; {hint}"
    else:
        extra = re.search(r"extra arguments? \((.*)\)", problem)
        words = extra[1].split() if extra else ()
        meant = [wrong for word in words if err.ctx and (wrong := without_dashes(word, err.ctx)) is not None]
        if meant:
            problem, hint = meant[0].problem, meant[0].hint
    return said(problem[:1].lower() + problem[1:], hint, 2, is_debug)


def out_of_memory(err: Exception, is_debug: bool) -> int:
    """The exit code where a verb asked for more memory than there is, outside of a run that can save itself; else 0."""
    if "torch" not in sys.modules:
        return 0
    from svp.training.machine import is_out_of_memory

    if not is_out_of_memory(err):
        return 0
    asked = re.search(r"allocate ([\d.]+ \w+)", str(err))
    return said(
        f"memory ran out{f': {asked[1]} were asked for' if asked else ''}",
        "try smaller batches, pictures or options",
        1,
        is_debug,
    )


def broken_install(err: Exception, is_debug: bool) -> int:
    """The exit code where packages are missing or do not belong together, which is no mistake of ours; else 0."""
    if isinstance(err, ModuleNotFoundError) and err.name and not err.name.startswith("svp"):
        problem = f"the package {err.name} is not installed"
    elif "torchvision::" in str(err):  # an operator that the other version does not have
        problem = f"torch {version('torch')} and torchvision {version('torchvision')} do not belong together"
        return said(problem, "pip install -U torch torchvision; svp doctor tells more", 1, is_debug)
    else:
        return 0
    return said(problem, "svp doctor tells versions and the cure", 1, is_debug)


def bug(err: Exception, is_debug: bool) -> int:
    """Something we did not foresee: one line, and the traceback in a file."""
    if is_debug:
        traceback.print_exc()
    text = "".join(traceback.format_exception(err))
    try:
        with tempfile.NamedTemporaryFile("w", prefix="svp-", suffix=".txt", delete=False, encoding="utf-8") as f:
            f.write(f"{sys.argv}\n{text}")
        where = f"please report it with {f.name}"
    except OSError:
        where = "run it again with --debug and please report what it prints"
    click.echo(
        f"error: {type(err).__name__} in svp itself: {str(err).splitlines()[0] if str(err) else 'no message'}", err=True
    )
    click.echo(f"hint: this is our mistake; {where}", err=True)
    return 1


def on_terminate(kind: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(143)


seen: set[str] = set()


def one_line_warning(message: Any, category: type[Warning], *_: Any, **__: Any) -> None:
    """Each warning once, on one line."""
    text = " ".join(str(message).split())
    if text not in seen:
        seen.add(text)
        click.echo(f"warning: {text}", err=True)
