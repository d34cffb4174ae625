#!/usr/bin/env python3
"""Makes the demo's out-of-domain text, code.txt, of this project's own sources and docs.

Files are taken in an order that mixes folders and stays the same (by a hash of their paths), each cut to a few
thousand bytes at a line's end, until the text is long enough. The same tree gives the same text.
"""

import argparse
import hashlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lexico_cli import ToolError, bounded_int, check_output, complete_file, run  # noqa: E402

FOLDERS = ("apps", "bench", "cmake", "docs", "kernels", "lib", "scripts", "tests", "tools")
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".py", ".md", ".cmake", ".txt", ".yaml", ""}
HEADING = "==== {} ====\n"


def source_files(root: Path) -> list[Path]:
    """The project's own text files, relative to root, in the order in which they are taken."""
    files = [
        path.relative_to(root)
        for folder in FOLDERS
        for path in sorted((root / folder).rglob("*"))
        if path.is_file() and not path.is_symlink() and path.suffix in SUFFIXES and "__pycache__" not in path.parts
    ]
    return sorted(files, key=lambda path: hashlib.sha256(path.as_posix().encode()).hexdigest())


def excerpt(text: str, limit: int) -> str:
    """The first lines of text, at most limit bytes of them."""
    kept, size = [], 0
    for line in text.splitlines(keepends=True):
        size += len(line.encode())
        if size > limit:
            break
        kept.append(line)
    return "".join(kept)


def make_text(root: Path, total: int, per_file: int) -> tuple[str, int]:
    parts: list[str] = []
    size = 0
    for path in source_files(root):
        try:
            text = (root / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        heading = HEADING.format(path.as_posix())
        part = excerpt(text, min(per_file, total - size - len(heading.encode()) - 1))
        if not part.strip():
            continue
        part = heading + part + "\n"
        parts.append(part)
        size += len(part.encode())
        if size >= 0.99 * total:
            break
    return "".join(parts), len(parts)


def parse(arguments: list[str]) -> argparse.Namespace:
    root = Path(__file__).resolve().parents[1]
    parser = argparse.ArgumentParser(prog="make_demo_texts.py", description=__doc__)
    parser.add_argument("--root", type=Path, default=root, help="the project's folder (default: the one of this script)")
    parser.add_argument("--output", type=Path, help="the file to write (default: ROOT/data/demo/code.txt)")
    parser.add_argument("--bytes", type=bounded_int(1), default=80_000, help="of the text, about (default: 80000)")
    parser.add_argument("--per-file", type=bounded_int(1), default=3_000, help="most bytes from one file (default: 3000)")
    options = parser.parse_args(arguments)
    options.output = options.output or options.root / "data/demo/code.txt"
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    check_output(options.output, overwrite=True)
    text, files = make_text(options.root, options.bytes, options.per_file)
    if not text:
        raise ToolError(f"{options.root}: no source files in {', '.join(FOLDERS)}")
    with complete_file(options.output) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")
    print(f"{options.output}: {len(text.encode())} bytes from {files} files")


if __name__ == "__main__":
    sys.exit(run("make_demo_texts.py", main))
