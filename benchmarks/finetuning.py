"""Measures what fine-tuning gains: five classes of CIFAR-10 with 50 images each.

python benchmarks/finetuning.py --name=cifar10_jpeg

A network is trained on the other five classes (22,500 images), and is then what runs on these begin
with, beside runs from scratch. The same command goes on where it was stopped. The table goes to
WORKDIR/table.md, too.
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from alexnet_jax.config import default_config  # noqa: E402
from alexnet_jax.errors import InputError  # noqa: E402
from alexnet_jax.experiments import aggregate  # noqa: E402
from alexnet_jax.run import files  # noqa: E402  (the path comes first)

IMAGES_A_CLASS = 50
# The learning rates are usual ones of their kind; none was chosen on these images.
WAYS = {
    "from scratch": ("--config.init.from_run=", "--config.optimizer.learning_rate=2e-3"),
    "all layers": (),
    "convolutions at a tenth of the rate": (
        "--config.optimizer.learning_rate=2e-3",
        "--config.optimizer.lr_multipliers=(('conv*',0.1),('norm*',0.1))",
    ),
    "convolutions frozen": (
        "--config.optimizer.learning_rate=2e-3",
        "--config.optimizer.frozen=('conv*','norm*')",
    ),
}


def call(*arguments: str | Path) -> None:
    """Runs a program of the project in a process of its own, and ends with it if it fails."""
    process = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, check=False)
    if process.returncode:
        raise SystemExit(process.returncode)


def prepare(options: argparse.Namespace, workdir: Path) -> Path:
    """Makes the sets `first5` and `last5` of a prepared CIFAR-10; returns their folder."""
    from PIL import Image

    from alexnet_jax.data.source import load_source

    data = workdir / "data"
    if any(data.glob("last5/*/dataset_info.json")):  # which is written last
        return data
    config = default_config().data
    config.name, config.data_dir = options.name, options.data_dir
    for split, most in (("train", IMAGES_A_CLASS), ("test", None)):
        source = load_source(config, split)
        images, labels = source.read_all()
        for label, name in enumerate(source.class_names):
            rows = (labels == label).nonzero()[0]
            tree, rows = ("first5", rows) if label < 5 else ("last5", rows[:most])
            folder = workdir / "trees" / tree / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for row in rows:
                Image.fromarray(images[row]).save(folder / f"{row:05}.png")
    for tree in ("first5", "last5"):
        source_tree = workdir / "trees" / tree
        call(
            "-m", "alexnet_jax.cli", "prepare", source_tree, f"--name={tree}", f"--data_dir={data}"
        )
    return data


def run() -> None:
    """Prepares, pretrains, trains each way with each seed, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="cifar10", help="the prepared data set")
    parser.add_argument("--data_dir", default="", help="where it lies, if not in TFDS's folder")
    parser.add_argument("--workdir", type=Path, help="by default runs/finetuning-NAME")
    parser.add_argument("--seeds", type=int, default=3, help="of each way (default: 3)")
    parser.add_argument("--pretrain_epochs", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=60, help="of 7 steps of 32 images")
    options = parser.parse_args()
    workdir = (options.workdir or Path(f"runs/finetuning-{options.name}")).absolute()
    try:
        data = prepare(options, workdir)
    except InputError as error:
        parser.error(str(error))
    common = [f"--config.data.data_dir={data}", "--noconfig.writers.tensorboard"]

    def train(config: str, folder: Path, *flags: str) -> None:
        call("-m", "alexnet_jax.main", f"--config={config}", f"--workdir={folder}", *common, *flags)

    pretrained = workdir / "first5"
    epochs = f"--config.train.epochs={options.pretrain_epochs}"
    train("configs/cifar10.py", pretrained, "--config.data.name=first5", epochs)
    groups = []
    for way, flags in WAYS.items():
        folders = [workdir / f"{way.replace(' ', '_')}-{seed}" for seed in range(options.seeds)]
        for seed, folder in enumerate(folders):
            train(
                f"configs/finetune.py:{pretrained}",
                folder,
                "--config.data.name=last5",
                "--config.data.validation_fraction=0.0",
                f"--config.train.epochs={options.epochs}",
                f"--config.seed={seed}",
                *flags,
            )
        groups.append([aggregate.read_run(folder) for folder in folders])
    table = aggregate.table(groups, list(WAYS))
    files.write_text(workdir / "table.md", f"{table}\n")
    print(table)


if __name__ == "__main__":
    run()
