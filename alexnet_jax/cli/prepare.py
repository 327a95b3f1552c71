"""Prepares a data set from an archive or a folder, for training with `config.data.name`.

Run `python scripts/prepare_data.py --help` for what it takes.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

from alexnet_jax.cli import common
from alexnet_jax.data.prepare import prepare

_EPILOG = f"""\
PATH is one of
  cifar-10-binary.tar.gz or cifar-10-python.tar.gz, the official archives;
  a folder or an archive (tar, tar.gz, tar.xz, tar.bz2, zip) of images in class folders:
  train/CLASS/IMAGE and test/CLASS/IMAGE (or val/), or just CLASS/IMAGE, which is then split.

examples:
  python scripts/prepare_data.py ~/Downloads/cifar-10-python.tar.gz
  python scripts/prepare_data.py flowers.zip --test_fraction=0.1
  python scripts/prepare_data.py photos/ --name=my_photos --data_dir=/data/tfds

Exit codes: 0 the data set lies ready, {common.EXIT_CODES}.
"""


@common.entry_point(interrupted="Interrupted; nothing half-made is left behind.")
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        arguments: The command line after the program's name; None takes the process's own.

    Returns:
        The exit code, as --help lists them.
    """
    options = _parser().parse_args(arguments)
    prepared = prepare.prepare_path(
        options.path,
        name=options.name,
        data_dir=options.data_dir,
        test_fraction=options.test_fraction,
        overwrite=options.overwrite,
    )
    print(_report(prepared, options.data_dir))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Prepares a data set from an archive or a folder.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("path", metavar="PATH", help="an archive or a folder")
    parser.add_argument("--name", default="", help="the data set's name (default: from PATH)")
    parser.add_argument(
        "--data_dir",
        default="",
        metavar="DIR",
        help="where data sets lie (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    parser.add_argument(
        "--test_fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="share of each class for testing, where PATH has no test folder (default: 0.2)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="prepare again what is there already"
    )
    return parser


def _report(prepared: prepare.Prepared, data_dir: str) -> str:
    names = prepared.class_names
    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    lines = [
        f"{prepared.name} lies ready in {prepared.folder}"
        if prepared.is_new
        else f"{prepared.name} was prepared already, in {prepared.folder} (--overwrite redoes it)",
        *(f"  {split}: {count:,} images" for split, count in prepared.splits.items()),
        f"  {len(names)} classes: {shown}",
    ]
    if prepared.ignored:
        lines.append(
            f"  {prepared.ignored:,} files ignored: no images, links, or outside the classes"
        )
    train = ["python", "-m", "alexnet_jax.main", "--config=configs/cifar10.py"]
    if prepared.name != "cifar10":  # whose run folder is that config's by default
        train += [f"--config.data.name={prepared.name}", f"--workdir=runs/{prepared.name}"]
    train += [f"--config.data.data_dir={data_dir}"] if data_dir else []
    lines.append(f"Next: {shlex.join(train)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
