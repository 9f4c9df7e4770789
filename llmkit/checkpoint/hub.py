"""From what a person types to a folder: a path, a hub id, or HUB_ID@REVISION. No torch.

Downloads are left to huggingface_hub (its cache, HF_HOME, HF_TOKEN, HF_HUB_OFFLINE, HF_ENDPOINT, its progress bars). What
it does not do is done here: a folder comes first, only needed files are fetched, and no network is an error within
3 seconds (it retries for about 50).
"""

from __future__ import annotations

import glob
import os
import re
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmkit.checkpoint.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONVERT, GGUF, INDEX, PICKLES, SINGLE, shard_names
from llmkit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from huggingface_hub.utils.tqdm import tqdm

CONNECT_SECONDS = 1.5  # for name look-up and TCP together
LOOK_UP_SECONDS = 10.0

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./+-]*", re.ASCII)
_SIDE_FILES = re.compile(  # 1_Pooling/config.json and its like: how an embedder pools
    r"[^/]*\.(json|jinja|tiktoken)|additional_chat_templates/[^/]*\.jinja|\d_[A-Za-z]+/config\.json|tokenizer\.model|merges\.txt|vocab\.txt"
)


@dataclass(frozen=True)
class Kind:
    """What is looked for: the files without which a repository is none of its kind, and the words of the errors."""

    name: str
    article: str  # with its name
    config: str
    weights: str


MODEL = Kind("model", "a model", "config.json", SINGLE)
ADAPTER = Kind("adapter", "an adapter", ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def resolve(model: str | Path, revision: str | None = None, kind: Kind = MODEL) -> Path:
    """The folder of a model: an existing folder, or a hub id (`org/name`, `name`, either with `@revision`), downloaded.

    kind: ADAPTER for that of an adapter.

    Raises UsageError for a name that can be neither, CheckpointError where the model cannot be had.
    """
    found = _read_name(model, revision, kind)
    return found if isinstance(found, Path) else _from_hub(*found, kind)


def locate(model: str | Path, revision: str | None = None) -> Path:
    """As `resolve`, but nothing is downloaded, and no network asked: a folder, or what the hub cache has of a hub id.

    Of a model whose download is not complete that may be config.json alone.
    """
    found = _read_name(model, revision, MODEL)
    return found if isinstance(found, Path) else _from_cache(*found, MODEL, "nothing is downloaded to look at it", "Download it")


def _read_name(model: str | Path, revision: str | None, kind: Kind) -> Path | tuple[str, str | None]:
    """A folder, or the name and revision of a hub id."""
    text = str(model)
    if not text.strip():
        raise UsageError(f"The {kind.name} has no name. Give the path of {kind.article} folder, or a hub id like org/name.")
    # os.path, because pathlib raises where a name is too long or ~USER has no home.
    folder = Path(os.path.expanduser(text))
    if os.path.isdir(folder):
        if revision is not None:
            raise UsageError(f"{text} is a folder, and a folder has no revision {revision!r}. Leave the revision out, or give a hub id.")
        return folder
    if os.path.isfile(folder):
        if text.endswith(".gguf"):
            raise CheckpointError(f"{text} cannot be loaded. {GGUF}")
        raise CheckpointError(f"{text} is a file, not {kind.article} folder. Give the folder that holds {kind.config} and {kind.weights}.")

    name, at, tail = text.partition("@")
    if at and revision is not None:
        raise UsageError(f"{text} already names a revision, and revision {revision!r} was given too. Give one of them.")
    revision = tail if at else revision
    if isinstance(model, Path) or _is_path(name):
        raise CheckpointError(f"The folder {text} does not exist. Check the path; a hub id looks like org/name.")
    if not _HUB_ID.fullmatch(name) or ".." in name or "--" in name:
        raise UsageError(f"{text!r} is neither a folder nor a hub id. Give the path of {kind.article} folder, or a hub id like org/name.")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageError(f"revision {revision!r} cannot be a branch, tag or commit. Give one as the hub shows it, such as main.")
    return name, revision


def needed_files(names: Iterable[str], shards: Iterable[str] = ()) -> list[str]:
    """Of a repository's files, those llmkit reads: configuration, tokenizer, templates, and one set of safetensors.

    Not fetched: pickles, other frameworks' weights, second copies (`consolidated.safetensors`), sub-folders such as onnx/.
    """
    names = set(names)
    wanted = {name for name in names if _SIDE_FILES.fullmatch(name)}
    if SINGLE in names:  # as transformers chooses where a repository has both
        return sorted(wanted - {INDEX} | {SINGLE})
    return sorted(wanted | names.intersection(shards))


def _is_path(name: str) -> bool:
    if "://" in name:
        return False
    outside = name.startswith(("/", "./", "../", "~", ".\\")) or name in (".", "..", "")
    return outside or name.count("/") > 1 or "\\" in name or name.endswith(("/", ".gguf", ".safetensors"))


def _from_hub(name: str, revision: str | None, kind: Kind) -> Path:
    import huggingface_hub as hub
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _from_cache(name, revision, kind, "HF_HUB_OFFLINE is set", "Unset HF_HUB_OFFLINE to download it")
    if (reason := _unreachable(constants.ENDPOINT)) is not None:
        return _from_cache(name, revision, kind, f"{constants.ENDPOINT} cannot be reached ({reason})", "Check the network")
    try:
        info = hub.HfApi().model_info(name, revision=revision, timeout=LOOK_UP_SECONDS)
        names = [sibling.rfilename for sibling in info.siblings or []]
        if kind.config not in names:
            raise CheckpointError(
                f"{name} on the hub has no {kind.config}, so it is no {kind.name} llmkit can load. {_formats(names, kind)}"
            )
        shards: set[str] = set()
        if kind is MODEL and SINGLE not in names and INDEX in names:
            shards = set(shard_names(Path(hub.hf_hub_download(name, INDEX, revision=info.sha))).values())
        elif kind.weights not in names:
            raise CheckpointError(f"{name} on the hub has no {kind.weights}. {_formats(names, kind)}")
        if absent := sorted(shards.difference(names)):
            raise CheckpointError(
                f"{name} on the hub lacks the shards {', '.join(absent)}. Its upload is incomplete; choose another revision."
            )
        wanted = needed_files(names, shards) if kind is MODEL else [file for file in names if _SIDE_FILES.fullmatch(file)] + [kind.weights]
        patterns = [glob.escape(file) for file in wanted]
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=_progress_bar()))
    except CheckpointError:
        raise
    except Exception as error:  # whatever the hub, its HTTP client or a full disk raised: one sentence about it
        raise _explain(name, revision, error) from error


def _progress_bar() -> type[tqdm] | None:
    """None: huggingface_hub's own, on a terminal and in a notebook. Into a file or a pipe it would print all the same."""
    from huggingface_hub.utils.tqdm import tqdm

    class Quiet(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})  # type: ignore[no-untyped-call]

    return None if sys.stderr.isatty() or "ipykernel" in sys.modules else Quiet


def _from_cache(name: str, revision: str | None, kind: Kind, reason: str, remedy: str) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # Only the configuration is asked for: whether the weights are complete is seen, and said better, on opening them.
        return Path(hub.snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[kind.config]))
    except (LocalEntryNotFoundError, OSError, ValueError) as error:
        at = "" if revision is None else f" at revision {revision}"
        raise CheckpointError(
            f"{name}{at} is no folder here and not in the hub cache, and {reason}. {remedy}, or give the path of {kind.article} folder."
        ) from error


def _unreachable(endpoint: str) -> str | None:
    """Why no connection to the hub can be made, or None. In a thread, because a name look-up has no time limit."""
    import socket
    from urllib.parse import urlsplit
    from urllib.request import getproxies, proxy_bypass  # with ssl and http.client, 15 ms that a folder on disk does not wait for

    url = urlsplit(endpoint)
    host, port = url.hostname or "", url.port or (443 if url.scheme == "https" else 80)
    proxy = getproxies().get(url.scheme) or getproxies().get("all")
    if proxy and not proxy_bypass(host):
        through = urlsplit(proxy if "//" in proxy else f"//{proxy}")
        host, port = through.hostname or "", through.port or 80
    reason: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
            reason.append(None)
        except OSError as error:
            reason.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    deadline = time.monotonic() + CONNECT_SECONDS
    from huggingface_hub import HfApi, snapshot_download  # noqa: F401  needed next; importing takes 0.3 s, as well spent waiting

    thread.join(max(0.0, deadline - time.monotonic()))
    return reason[0] if reason else f"no answer within {CONNECT_SECONDS:g} seconds"


def _formats(names: list[str], kind: Kind) -> str:
    pickles = ", ".join([name for name in names if name.endswith(PICKLES)][:3])
    if kind is not MODEL:
        which = f"Pickle files ({pickles}) can run code and are never opened. " if pickles else ""
        return f"{which}Choose a repository with {kind.config} and {kind.weights}."
    if pickles:
        return f"It has pickle files ({pickles}). {CONVERT}"
    if any(name.endswith(".gguf") for name in names):
        return f"It has GGUF files. {GGUF}"
    return "Choose a repository with config.json and safetensors."


def _explain(name: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return CheckpointError(f"{name} is gated. Accept its terms on its hub page, then set HF_TOKEN to a token of that account.")
    if isinstance(error, errors.RevisionNotFoundError):
        return CheckpointError(f"{name} has no revision {revision!r} on the hub. Check the branch, tag or commit.")
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403, 404):
        return CheckpointError(
            f"{name} is neither a folder here nor a hub model you may read (HTTP {status}). "
            "Check the spelling; for a private or gated model set HF_TOKEN to a token that may read it."
        )
    first = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return CheckpointError(f"{name} could not be downloaded: {first}. Try again; what has arrived is kept in the cache.")
