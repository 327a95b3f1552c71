"""A model card: what users of an exported network must know about it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from alexnet_jax.config import default_config, flatten
from alexnet_jax.environment import package_versions
from alexnet_jax.inference.predictor import Network
from alexnet_jax.run import directory, files

_PACKAGES = ("alexnet_jax", "jax", "flax", "optax", "numpy")


def model_card(
    network: Network, *, artifact: str, runtime: str, difference: float, command: str
) -> str:
    """Writes a model card (Mitchell et al., 2019, "Model Cards for Model Reporting") in Markdown.

    Args:
        network: The exported network.
        artifact: Name of the exported file or folder.
        runtime: What runs it.
        difference: The largest one found between its probabilities and the network's.
        command: The command that made it.
    """
    import jinja2

    results = files.read_json(network.folder / directory.RESULTS) or {}
    defaults = dict(flatten(default_config(network.config.model.name)))
    template = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    ).get_template("model_card.md.jinja")
    return template.render(
        network=network,
        info=network.info | {"imported": network.info.get("imported")},
        names=network.class_names,
        artifact=artifact,
        runtime=runtime,
        difference=difference,
        images=[f"{n:,} {split} images" for split, n in _image_counts(network).items()],
        parameters=sum(leaf.size for leaf in jax.tree.leaves(network.state.params)),
        changed=[f"{k} = {v!r}" for k, v in flatten(network.config) if v != defaults[k]],
        accuracy=list(_accuracy(network, results)),
        versions=_listed(package_versions(_PACKAGES)),
        trained_with=_listed(results.get("versions", {})),
        command=command,
    )


def _image_counts(network: Network) -> dict[str, int]:
    names = {"train": "training", "validation": "validation", "test": "test"}
    counts = network.info.get("images", {})
    return {name: counts[split] for split, name in names.items() if split in counts}


def _accuracy(network: Network, results: dict[str, Any]) -> Iterator[str]:
    """Yields what is known of the accuracy of these very weights."""
    if results.get("step") == network.step:
        for split in ("validation", "test"):
            found = results.get(f"{split}_ema" if network.ema else split)
            if found:
                accuracy, loss = (
                    found.get(f"{name}_each", [found[name]])[network.replica]
                    for name in ("accuracy", "loss")
                )
                # The confusion matrix is of all seeds of the run together.
                count = sum(map(sum, found["confusion"])) // network.config.num_seeds
                yield (
                    f"{split}: {100 * accuracy:.2f}% of {count:,} images, cross-entropy "
                    f"{loss:.4f} nats"
                )
        if "test" in results:
            yield "The run evaluated on the test images once, at its end."
        else:
            yield "The run did not evaluate on the test images."
        return
    if network.accuracy is not None and network.ema == (network.config.train.ema_decay > 0):
        count = _image_counts(network).get("validation", 0)
        yield (
            f"validation: {100 * network.accuracy:.2f}% of {count:,} images, by which this "
            "checkpoint may have been chosen"
        )
    yield "These weights have not been evaluated on the test images."


def _listed(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
