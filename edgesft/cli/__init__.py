"""The command line: parse, call one stage, print. No logic; nothing heavy is imported before it is needed.

`app` holds what the commands share; `build` has those that make something, `measure` and `reports`
those that judge, `look` the rest.
"""

import os
import signal
import sys
import tempfile
import traceback
from typing import Annotated

import typer

from edgesft import __version__
from edgesft.cli import build, look, measure, reports
from edgesft.cli.app import app
from edgesft.core import console
from edgesft.core.errors import EdgeSFTError

__all__ = ["app", "build", "look", "main", "measure", "reports"]


def _version(wanted: bool) -> None:
    if wanted:
        console.data(f"edgesft {__version__}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log more; show traces of bugs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """From a pretrained model to a verified, profiled and gated edge artefact."""
    if verbose:
        import logging

        os.environ["EDGESFT_VERBOSE"] = "1"
        logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")


def main() -> None:
    """Entry point: maps every outcome to its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except EdgeSFTError as error:
        console.error(error.message, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.error("interrupted", "the same command goes on where it stopped")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)
    except Exception as error:
        sys.exit(_unexpected(error))


def _terminate(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


def _unexpected(error: Exception) -> int:
    """Click's own errors keep their code 2; anything else is a bug: short message, full trace in a file."""
    show = getattr(error, "format_message", None)
    if show is not None:  # click.ClickException and its kin
        console.error(show(), "edgesft --help")
        return int(getattr(error, "exit_code", 2))
    if type(error).__name__ == "Abort":
        console.error("interrupted")
        return 130
    trace = "".join(traceback.format_exception(error))
    if os.environ.get("EDGESFT_VERBOSE"):
        console.say(trace)
    with tempfile.NamedTemporaryFile("w", prefix="edgesft-bug-", suffix=".txt", delete=False) as file:
        file.write(trace)
    console.error(
        f"this is a bug in EdgeSFT: {type(error).__name__}: {error}", f"the full trace is in `{file.name}`"
    )
    return 70
