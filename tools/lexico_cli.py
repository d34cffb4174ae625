"""What the Python tools share: one-line errors with the project's exit codes, and files that appear only when complete."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

USAGE, BAD_INPUT, NO_SPACE, INTERRUPTED = 2, 3, 4, 75


class ToolError(Exception):
    """A message for the user, and the exit code that goes with it."""

    def __init__(self, message: str, code: int = BAD_INPUT) -> None:
        super().__init__(message)
        self.code = code


def one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def run(program: str, main: Callable[[list[str]], None], arguments: list[str] | None = None) -> int:
    """Runs main; errors meant for the user become one line on stderr and an exit code. Bugs keep their traceback."""

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    with contextlib.suppress(ValueError):  # only the main thread may set handlers
        signal.signal(signal.SIGTERM, interrupt)
    try:
        main(sys.argv[1:] if arguments is None else arguments)
    except ToolError as error:
        print(f"{program}: {error}", file=sys.stderr)
        return error.code
    except KeyboardInterrupt:
        print(f"{program}: interrupted; no unfinished file is left under its final name", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def quiet_libraries() -> None:
    """No progress bars, retry notes and advice from the Hugging Face packages: errors reach the user as one line."""
    import huggingface_hub
    import transformers

    for library in (transformers.logging, huggingface_hub.logging):
        library.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def check_output(path: Path, overwrite: bool) -> None:
    """Refuses an output that could not be written, before the work that makes it."""
    if not path.parent.is_dir():
        raise ToolError(f"{path}: folder {path.parent} does not exist", USAGE)
    if path.is_dir():
        raise ToolError(f"{path}: is a folder, want a file name", USAGE)
    if path.exists() and not path.is_file():
        raise ToolError(f"{path}: is not a regular file", USAGE)
    if path.exists() and not overwrite:
        raise ToolError(f"{path}: exists; choose another name or pass --overwrite", USAGE)
    if not os.access(path.parent, os.W_OK):
        raise ToolError(f"{path}: no permission to write in {path.parent}", USAGE)


@contextlib.contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Yields a name beside `path` to write to; it takes the final name only if the block succeeds."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise ToolError(f"{path}: cannot write: {error.strerror or one_line(error)}", NO_SPACE) from error
    finally:
        partial.unlink(missing_ok=True)


def bounded_int(low: int, high: int | None = None) -> Callable[[str], int]:
    """An argparse type: an integer in [low, high]."""
    bound = f"must be at least {low}" if high is None else f"must be in [{low}, {high}]"

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}, want an integer") from None
        if value < low or (high is not None and value > high):
            raise argparse.ArgumentTypeError(f"is {value}, {bound}")
        return value

    return parse


def bounded_float(low: float, high: float, low_open: bool = False) -> Callable[[str], float]:
    """An argparse type: a number in [low, high], or in (low, high] when low_open."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}, want a number") from None
        if not (low < value <= high if low_open else low <= value <= high):
            raise argparse.ArgumentTypeError(f"is {text}, must be in {'(' if low_open else '['}{low:g}, {high:g}]")
        return value

    return parse
