"""What somebody who gets an exported network must know of it, from its run folder."""

from typing import Any

from alexnet_jax.config import default_config, flatten
from alexnet_jax.environment import package_versions
from alexnet_jax.inference.predictor import Network
from alexnet_jax.run import directory

_PACKAGES = ("alexnet_jax", "jax", "flax", "optax", "numpy")


def model_card(
    network: Network, *, artefact: str, runtime: str, difference: float, command: str
) -> str:
    """Writes a model card (Mitchell et al., 2019, "Model Cards for Model Reporting") in Markdown.

    Args:
        network: Of `alexnet_jax.load`.
        artefact: Name of the file or folder that is described.
        runtime: What runs it.
        difference: The largest one found between its probabilities and the network's.
        command: That made it.
    """
    info, config, size = network.info, network.config, network.image_size
    results = directory.read_json(network.folder / directory.RESULTS) or {}
    names = ", ".join(network.class_names[:20])
    more = f", ... (all {len(network.class_names)} are in class_names.json)"
    weights = "averaged over the steps of training" if network.averaged else "of the last step"
    imported = info.get("imported")  # name of a file of weights that were trained elsewhere
    lines = [
        f"# {config.model.name} " + (f"from {imported}" if imported else f"on {info['name']}"),
        "",
        f"`{artefact}` tells which of {len(network.class_names)} classes an image shows: "
        f"{names}{more if len(network.class_names) > 20 else ''}.",
        "",
        "## Input and output",
        "",
        f"- Input `images`: uint8[batch, {size}, {size}, 3], RGB with channels last, values 0 to "
        "255 as they are; normalising is part of the network. Any batch size.",
        "- It was trained on upright images, scaled by their short side and cropped to their "
        "centre, transparent pixels on white. Images that are prepared otherwise are recognised "
        "less well.",
        f"- Output `probabilities`: float32[batch, {len(network.class_names)}], in the order of "
        "`class_names.json`; each row adds up to 1.",
        f"- Run by {runtime} it gave the network's probabilities to within {difference:.1g} "
        "(batches of 1 and 7 made-up images, float32).",
        "",
        "## Data",
        "",
        f"Not known here: the weights are those of `{imported}`." if imported else _data(info),
        "",
        "## Training",
        "",
        (
            "Elsewhere. "
            if imported
            else f"{network.step:,} steps of {config.train.batch_size} images, of a run of "
            f"{config.train.epochs} epochs; the weights are those {weights}. "
        )
        + f"Parameters: {_parameters(network):,}. Options that are not the library's defaults:",
        "",
        *(f"- `{key} = {value!r}`" for key, value in _changed(network)),
        "",
        "## Accuracy",
        "",
        *_accuracy(network, results),
        "",
        *_other_arithmetic(network),
        "## Use and limits",
        "",
        "- Made to recognise the classes above in images like those it was trained on. It has not "
        "been tested on others, nor for differences between groups of people.",
        "- It always answers with one of its classes, also where an image shows none of them, and "
        "its probabilities have not been checked to be frequencies. Do not let decisions about "
        "people or safety rest on it.",
        "",
        "## Versions",
        "",
        f"Exported with {_listed(package_versions(_PACKAGES))}.",
        *([f"Trained with {_listed(results['versions'])}."] if "versions" in results else []),
        "",
        "```bash",
        command,
        "```",
        "",
    ]
    return "\n".join(lines)


def _data(info: dict[str, Any]) -> str:
    checksums = "; ".join(f"{split}: {sum_}" for split, sum_ in info.get("checksums", {}).items())
    return f"{info['name']}, {_of_images(info)}. Content of the files: {checksums}."


def _of_images(info: dict[str, Any]) -> str:
    counts = info.get("images", {})
    uses = {"train": "to train on", "validation": "to validate", "test": "to test"}
    return ", ".join(
        f"{counts[split]:,} images {use}" for split, use in uses.items() if split in counts
    )


def _parameters(network: Network) -> int:
    import jax

    return sum(leaf.size for leaf in jax.tree.leaves(network.state.params))


def _changed(network: Network) -> list[tuple[str, Any]]:
    defaults = dict(flatten(default_config(network.config.model.name)))
    return [(key, value) for key, value in flatten(network.config) if value != defaults[key]]


def _accuracy(network: Network, results: dict[str, Any]) -> list[str]:
    """Says what is known of these very weights, and on how many images."""
    counts = network.info.get("images", {})
    lines = []
    if results.get("step") == network.step:
        for split in ("validation", "test"):
            found = results.get(f"{split}_ema" if network.averaged else split)
            if found:
                accuracy, loss = (
                    found.get(f"{name}_each", [found[name]])[network.replica]
                    for name in ("accuracy", "loss")
                )
                # The confusion matrix is of all seeds of the run together.
                count = sum(map(sum, found["confusion"])) // network.config.num_seeds
                lines.append(
                    f"- {split}: {100 * accuracy:.2f}% of {count:,} images, cross-entropy "
                    f"{loss:.4f} nats"
                )
        lines.append(
            "- The test images were used once, at the end of the run."
            if "test" in results
            else "- The run did not look at the test images."
        )
    elif network.accuracy is not None and network.averaged == (network.config.train.ema_decay > 0):
        lines.append(
            f"- validation: {100 * network.accuracy:.2f}% of {counts.get('validation', 0):,} "
            "images, by which this checkpoint may have been chosen"
        )
    if results.get("step") != network.step:
        lines.append("- These weights have not been measured on the test images.")
    return lines


def _other_arithmetic(network: Network) -> list[str]:
    dtype = network.config.model.dtype
    if dtype == "float32":
        return []
    return [f"Measured in {dtype}; this export computes in float32, which differs in rounding.", ""]


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
