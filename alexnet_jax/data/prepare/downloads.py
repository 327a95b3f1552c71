"""Whether TFDS can download what it is about to: known in seconds, where TFDS takes minutes."""

import hashlib
import threading
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from alexnet_jax.errors import InputError

PROBE_SECONDS = 5.0


def check_downloads(builder: Any, downloads: Path) -> None:
    """Raises an InputError if a manually downloaded file is damaged, or a host is unreachable."""
    from tensorflow_datasets.core.download import resource

    manual = downloads / "manual"
    infos = builder.url_infos or {}
    missing = {}
    for url, info in infos.items():
        by_hand = manual / (info.filename or "")
        cached = resource.get_dl_fname(url, info.checksum)
        folders = (downloads / builder.name, downloads)
        if info.filename and by_hand.is_file():
            check_sha256(by_hand, info.checksum, f"download it again from {url}")
        elif not any((folder / cached).exists() for folder in folders):
            missing[url] = info
    # Of several configs each needs only some of the files, and only TFDS knows which.
    if not missing or (builder.builder_config is not None and len(missing) < len(infos)):
        return
    if not (failures := unreachable_hosts(list(missing))):
        return
    wanted = [f"{url} ({info.size})" for url, info in missing.items()]
    listed = ", ".join(wanted[:5]) + (f" and {len(wanted) - 5} more" if len(wanted) > 5 else "")
    causes = ", ".join(f"{host} cannot be reached ({cause})" for host, cause in failures.items())
    either = " (or run `alexnet-jax prepare FILE`, which takes the python archive, too)"
    raise InputError(
        f"{builder.name} cannot be downloaded: {causes}; download {listed} on another machine, "
        f"put it into {manual}{either if builder.name == 'cifar10' else ''}, and run the same "
        "command again."
    )


def check_sha256(path: Path, expected: str, remedy: str) -> None:
    """Raises an InputError, which ends in `remedy`, unless the file has the expected sha256."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise InputError(
            f"{path} is damaged or another file: its sha256 is {found}, expected {expected}; "
            f"{remedy}."
        )


def unreachable_hosts(urls: list[str]) -> dict[str, str]:
    """Tries one URL on each host, all at once; returns the reason for each host that fails."""
    hosts = {urllib.parse.urlsplit(url).netloc: url for url in urls if url.startswith("http")}
    failures = dict.fromkeys(hosts, f"no answer in {PROBE_SECONDS:.0f} s")

    def probe(host: str, url: str) -> None:
        try:
            request = urllib.request.Request(url, method="HEAD")
            # A new opener: the default one remembers the proxies of its first use.
            urllib.request.build_opener().open(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            pass  # It answers, if only to say that it knows no HEAD.
        except OSError as error:
            failures[host] = str(getattr(error, "reason", error))
            return
        del failures[host]

    # Daemons, as resolving a name can take longer than this, or an exit, may wait.
    threads = [threading.Thread(target=probe, args=item, daemon=True) for item in hosts.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PROBE_SECONDS)
    return dict(failures)
