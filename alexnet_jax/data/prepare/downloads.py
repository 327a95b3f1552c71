"""Whether what TFDS is about to download can be had: known in seconds, where TFDS takes minutes."""

import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from alexnet_jax.errors import InputError

PROBE_SECONDS = 5.0


def check_downloads(builder: Any, downloads: Path) -> None:
    """Verifies files put there by hand, and finds out early whether the others can be fetched.

    Args:
        builder: A TFDS builder, whose registered addresses are looked at.
        downloads: TFDS's folder for downloads.

    Raises:
        InputError: A file is damaged, or one is missing and its host cannot be reached.
    """
    from alexnet_jax.data.prepare import builders

    manual = downloads / "manual"
    infos = builder.url_infos or {}
    missing = {}
    for url, info in infos.items():
        by_hand = manual / (info.filename or "")
        if info.filename and by_hand.is_file():
            builders.check_sha256(by_hand, info.checksum, f"get it again from {url}")
        elif not _is_cached(url, info.checksum, builder.name, downloads):
            missing[url] = info
    # Of several configs each needs only some of the files, and which, TFDS alone knows.
    if not missing or (builder.builder_config is not None and len(missing) < len(infos)):
        return
    failures = _unreachable(list(missing))
    if not failures:
        return
    wanted = [f"{url} ({info.size})" for url, info in missing.items()]
    listed = ", ".join(wanted[:5]) + (f" and {len(wanted) - 5} more" if len(wanted) > 5 else "")
    causes = ", ".join(f"{host} cannot be reached ({cause})" for host, cause in failures.items())
    own_way = (
        " (or run `python scripts/prepare_data.py FILE`, which takes the python archive too)"
        if builder.name == "cifar10"
        else ""
    )
    raise InputError(
        f"{builder.name} cannot be downloaded, for {causes}; fetch {listed} on another machine, "
        f"put it into {manual}{own_way}, and start the same command again."
    )


def _is_cached(url: str, checksum: str, name: str, downloads: Path) -> bool:
    from tensorflow_datasets.core.download import resource

    file = resource.get_dl_fname(url, checksum)
    return any((folder / file).exists() for folder in (downloads / name, downloads))


def _unreachable(urls: list[str]) -> dict[str, str]:
    """Tries one address on each host, all at once; returns why for each host that fails.

    The threads are daemons, as looking up a name can take longer than we, or an exit, will wait.
    """
    hosts = {urllib.parse.urlsplit(url).netloc: url for url in urls if url.startswith("http")}
    failures = dict.fromkeys(hosts, f"no answer in {PROBE_SECONDS:.0f} s")
    threads = [
        threading.Thread(target=_probe, args=(host, url, failures), daemon=True)
        for host, url in hosts.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_SECONDS)
    return dict(failures)


def _probe(host: str, url: str, failures: dict[str, str]) -> None:
    """Takes the host off `failures` if it answers, or notes there why it does not."""
    try:
        request = urllib.request.Request(url, method="HEAD")
        # A new opener: the default one remembers the proxies of its first use.
        urllib.request.build_opener().open(request, timeout=PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # It answers; TFDS will see how it likes a GET.
    except OSError as error:
        failures[host] = str(getattr(error, "reason", error))
        return
    del failures[host]
