"""The roads that need a network: tensorflow-datasets' download and Debian's package."""

import functools
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any
from unittest import mock

from experiments.catalog import Entry
from experiments.prepared import quiet_tfds, workshop
from experiments.rawfiles import CIFAR10_BINARY, IDX_FILES

ANSWER_SECONDS = 5
STALL_SECONDS = 15
APT_SECONDS = 180
APT_OPTIONS = ("-q", "-o=Acquire::http::Timeout=10", "-o=Acquire::Retries=1")


class RoadClosed(Exception):
    """A road does not lead to the data set; its text says why."""


def download(entry: Entry, folder: Path) -> tuple[Path, ...]:
    """The published files, by tensorflow-datasets, which compares their checksums.

    Raises:
        RoadClosed: the host does not answer, or sends something else.
    """
    urls = registered_urls(entry)
    _look_whether_it_answers(urls[0])
    try:
        return _download(entry, urls, folder)
    except Exception as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise RoadClosed(f"{urls[0]}: {reason or type(error).__name__}") from error


def registered_urls(entry: Entry) -> tuple[str, ...]:
    """The addresses whose checksums tensorflow-datasets has on record."""
    zipped = tuple(f"{name}.gz" for name in IDX_FILES)
    wanted = (CIFAR10_BINARY,) if entry.name == "cifar10" else zipped
    by_name = {url.rsplit("/")[-1]: url for url in url_infos(entry)}
    return tuple(by_name[name] for name in wanted)


def url_infos(entry: Entry) -> dict[str, Any]:
    """What tensorflow-datasets has on record of each address: size and checksum."""
    with quiet_tfds():
        from tensorflow_datasets.core.download import checksums
        from tensorflow_datasets.core.utils import resource_utils

        folder = resource_utils.tfds_path("url_checksums")
        return checksums.load_url_infos(folder / f"{entry.name}.txt")


def _look_whether_it_answers(url: str) -> None:
    """One quick question, where tensorflow-datasets would ask for 3.5 minutes."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        with error:
            raise RoadClosed(f"{url} answers {error.code} {error.reason}") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RoadClosed(f"{url} does not answer ({reason})") from error


def _download(entry: Entry, urls: tuple[str, ...], folder: Path) -> tuple[Path, ...]:
    with quiet_tfds():
        import requests
        import tensorflow_datasets as tfds

        manager = tfds.download.DownloadManager(
            download_dir=folder,
            dataset_name=entry.name,
            url_infos=url_infos(entry),
            force_checksums_validation=True,
        )
        # tensorflow-datasets sets no time-out: a silent host would hold us for ever
        get = functools.partialmethod(requests.Session.get, timeout=STALL_SECONDS)
        with mock.patch.object(requests.Session, "get", get):
            paths: Any = manager.download(list(urls))
            return tuple(map(Path, paths))


def unpack_debian_package(package: str, folder: Path) -> None:
    """apt-get download and dpkg-deb -x, which need no root; whole or not at all.

    Raises:
        RoadClosed: no apt here, no such package, no network, no place to write.
    """
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise RoadClosed(f"this machine has no {tool}")
    try:
        with workshop(folder.parent) as made:
            _run(["apt-get", *APT_OPTIONS, "download", package], made)
            debs = [path.name for path in made.glob("*.deb")]
            _run(["dpkg-deb", "-x", *debs, "unpacked"], made)
            _put(made / "unpacked", folder)
    except OSError as error:
        raise RoadClosed(f"{folder} cannot be written ({error.strerror})") from error


def _put(finished: Path, folder: Path) -> None:
    try:
        os.rename(finished, folder)
    except OSError:
        another_was_faster = folder.is_dir()
        if not another_was_faster:
            raise


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=APT_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise RoadClosed(f"{command[0]} took over {APT_SECONDS} seconds") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("E:")]
        reason = (errors or done.stderr.splitlines() or ["no reason given"])[-1]
        raise RoadClosed(f"{command[0]} failed ({reason.removeprefix('E: ')})")
