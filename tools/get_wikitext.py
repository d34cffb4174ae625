#!/usr/bin/env python3
"""Fetches WikiText from the Hugging Face hub into plain text files, one per split: wikitext-103-raw-train.txt, ...

The text is that of the original .raw files, byte for byte: a line per paragraph or heading, " \\n" for an empty one.
Downloads resume where they stopped and stay in the hub's cache; a file that is already there is kept as it is.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lexico_cli import USAGE, ToolError, complete_file, one_line, run  # noqa: E402

REPOSITORY = "Salesforce/wikitext"
DATASETS = ("wikitext-103-raw-v1", "wikitext-2-raw-v1")
SPLITS = ("train", "validation", "test")


def output_name(dataset: str, split: str) -> str:
    return f"{dataset.removesuffix('-v1')}-{split}.txt"


def download(dataset: str, split: str) -> list[Path]:
    """The parquet files of a split, in order, fetched unless they are in the hub's cache."""
    from huggingface_hub import HfApi, hf_hub_download, logging

    logging.set_verbosity_error()
    try:
        every = HfApi().list_repo_files(REPOSITORY, repo_type="dataset")
        names = sorted(name for name in every if name.startswith(f"{dataset}/{split}-") and name.endswith(".parquet"))
        if not names:
            raise ToolError(f"{REPOSITORY}: no file {dataset}/{split}-*.parquet on the hub; its layout has changed")
        return [Path(hf_hub_download(REPOSITORY, name, repo_type="dataset")) for name in names]
    except ToolError:
        raise
    except Exception as error:  # the hub client raises a dozen types, from several packages
        raise ToolError(
            f"{REPOSITORY}: cannot be fetched from the Hugging Face hub: {type(error).__name__}: {one_line(error, 160)}"
        ) from error


def read_lines(path: Path) -> Iterator[str]:
    """The column "text" of a parquet file, as lines of the original file."""
    import pyarrow
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=65536, columns=["text"]):
            for text in batch.column("text").to_pylist():
                yield text if text.endswith("\n") else text + "\n" if text else " \n"
    except (pyarrow.ArrowException, OSError, KeyError, AttributeError) as error:
        raise ToolError(f"{path}: not a parquet file with a string column 'text': {one_line(error)}") from error


def fetch(dataset: str, split: str, path: Path) -> None:
    files = download(dataset, split)
    lines = 0
    with complete_file(path) as partial, partial.open("w", encoding="utf-8", newline="\n") as output:
        for file in files:
            for line in read_lines(file):
                output.write(line)
                lines += 1
    print(f"{path}: {lines} lines, {path.stat().st_size} bytes")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="get_wikitext.py",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=__doc__,
        epilog="Example:\n  tools/get_wikitext.py corpora --split train --split test\n\n"
        "wikitext-103-raw: 540 MB of training text; wikitext-2-raw: 11 MB. Both share validation and test.",
    )
    parser.add_argument("folder", metavar="OUT_DIR", type=Path, help="where the text files go; made if it is not there")
    parser.add_argument("--dataset", choices=DATASETS, default=DATASETS[0], help=f"(default: {DATASETS[0]})")
    parser.add_argument("--split", choices=SPLITS, action="append", help="repeatable (default: all three)")
    parser.add_argument("--overwrite", action="store_true", help="write files anew that are already there")
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    try:
        import pyarrow.parquet  # noqa: F401  (before any download)
    except ImportError as error:
        raise ToolError(
            "the hub keeps WikiText as parquet, and pyarrow is not installed; "
            "run: .venv/bin/pip install -r scripts/requirements.txt"
        ) from error
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolError(f"{options.folder}: cannot be made: {error.strerror}", USAGE) from error
    for split in options.split or SPLITS:
        path = options.folder / output_name(options.dataset, split)
        if path.exists() and not options.overwrite:
            print(f"{path}: already there, kept")
        else:
            fetch(options.dataset, split, path)


if __name__ == "__main__":
    sys.exit(run("get_wikitext.py", main))
