"""Prepare a data set from an archive or a folder of images.

PATH is one of
  cifar-10-binary.tar.gz or cifar-10-python.tar.gz, the official archives;
  a folder or an archive (tar, tar.gz, tar.xz, tar.bz2, zip) of images in class folders:
  train/CLASS/IMAGE and test/CLASS/IMAGE (or val/), or just CLASS/IMAGE, which is then split.

Examples:
  alexnet-jax prepare ~/Downloads/cifar-10-python.tar.gz
  alexnet-jax prepare flowers.zip --test_fraction=0.1
  alexnet-jax prepare photos/ --name=my_photos --data_dir=/data/tfds
"""

import shlex
from collections.abc import Sequence

from alexnet_jax.cli import common


@common.entry_point
def main(arguments: Sequence[str]) -> None:
    """Runs the command."""
    parser = common.create_parser("alexnet-jax prepare", __doc__, success="the data set is ready")
    parser.add_argument("path", metavar="PATH", help="an archive or a folder")
    parser.add_argument("--name", default="", help="of the data set (default: from PATH)")
    help = "folder of all data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
    parser.add_argument("--data_dir", default="", metavar="DIR", help=help)
    help = "share of each class for testing, if PATH has no test folder (default: 0.2)"
    parser.add_argument("--test_fraction", type=float, default=0.2, metavar="F", help=help)
    parser.add_argument("--overwrite", action="store_true", help="replace a prepared data set")
    options = parser.parse_args(arguments)
    from alexnet_jax.data.prepare import prepare

    prepared = prepare.prepare_path(
        options.path,
        name=options.name,
        data_dir=options.data_dir,
        test_fraction=options.test_fraction,
        overwrite=options.overwrite,
    )
    if prepared.is_new:
        print(f"{prepared.name} is ready in {prepared.folder}")
    else:
        print(f"{prepared.name} was prepared already, in {prepared.folder}; --overwrite redoes it")
    for split, count in prepared.splits.items():
        print(f"  {split}: {count:,} images")
    names = prepared.class_names
    print(f"  {len(names)} classes: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}")
    if prepared.ignored:
        print(f"  {prepared.ignored:,} files ignored: no images, links, or outside the classes")
    train = ["alexnet-jax", "train", "--config=cifar10"]
    if prepared.name != "cifar10":  # which is in the run folder of that config
        train += [f"--config.data.name={prepared.name}", f"--workdir=runs/{prepared.name}"]
    if options.data_dir:
        train.append(f"--config.data.data_dir={options.data_dir}")
    print(f"Next: {shlex.join(train)}")
