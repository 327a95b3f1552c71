"""Make docs/options.md, the table of all options, from their declarations.

Examples:
  python scripts/options.py
"""

from collections.abc import Mapping
from pathlib import Path

from alexnet_jax.config import SECTIONS, declared_options
from alexnet_jax.models import MODELS
from alexnet_jax.options import Option

PAGE = Path(__file__).parents[1] / "docs" / "options.md"
_HEAD = """\
# Options

All options of a run: those in a config file (`config.train.epochs = 5`), on the command line
(`--config.train.epochs=5`) and in the `config.json` of a run folder. `alexnet-jax train
--config=cifar10 --help` lists them with the values of a config. A run resumes with the same values,
but for options marked with *. This page is made by `python scripts/options.py`.
"""


def page() -> str:
    """Returns the page, in Markdown."""
    parts = [_HEAD]
    for name, cls in SECTIONS.items():
        known = declared_options()
        options = {key: known[key] for key in known if key.rpartition(".")[0] == name}
        summary = (cls.__doc__ or "").partition("\n")[0]
        parts.append(f"## `config{'.' * bool(name)}{name}`\n\n{summary}\n\n{table(options)}")
        if name == "model":
            parts += networks()
    return "\n".join(parts)


def networks() -> list[str]:
    """Returns a table for each network, or how it differs from one with the same options."""
    parts = []
    seen: dict[tuple[str, ...], tuple[str, dict[str, Option]]] = {}
    for network in MODELS:
        options = declared_options(network)
        options = {key: options[key] for key in options if key.startswith("model.")}
        del options["model.name"]
        first, others = seen.setdefault(tuple(options), (network, options))
        parts.append(f"### Network `{network}`\n")
        if first == network:
            parts.append(table(options))
        else:
            differ = [
                f"`{key}` is `{declared.default!r}`"
                for key, declared in options.items()
                if declared.default != others[key].default
            ]
            parts.append(f"The options of `{first}` with other defaults: {', '.join(differ)}.\n")
    return parts


def table(options: Mapping[str, Option]) -> str:
    """Returns the table of some options, in Markdown."""
    lines = ["| option | default | values | meaning |", "|---|---|---|---|"]
    for key, declared in options.items():
        cells = [
            f"`{key}`{'*' * declared.resumable}",
            f"`{declared.default!r}`",
            declared.allowed,
            declared.help,
        ]
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
