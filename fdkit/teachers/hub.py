"""Finds the weight files that are published somewhere: in the local cache first, then over the network.

Files of the Hugging Face hub lie in its own cache (HF_HOME, HF_HUB_CACHE), files at plain addresses where `torch.hub`
keeps its checkpoints (TORCH_HOME). HF_HUB_OFFLINE=1 keeps every one of these functions off the network. What comes of
a repository is of one commit, to which its branch is resolved when it comes, and is held to the checksums that the hub
states.
"""

import errno
import hashlib
import logging
import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from fdkit.errors import ConfigError, ResourceError, WeightsError
from fdkit.teachers.files import verify
from fdkit.teachers.huggingface_folder import (
    CARD,
    CONFIG,
    OPEN_CLIP_CONFIG,
    PREPROCESSOR,
    WEIGHTS,
    library_of,
)
from fdkit.teachers.origin import (
    BRANCH,
    Fetched,
    commit_of,
    hub_address,
    pinned_revision,
    require_undamaged,
)

logger = logging.getLogger("fdkit")

_CONNECT_SECONDS = 5.0
_ANY_FILE = re.compile(
    r"(checkpoint|ckpt|model|pytorch|weights|best|last|latest|final|teacher|student|[-_.\d])+"
)
"""File names that say nothing: at two addresses they are two files."""


def fetch_timm(name: str, revision: str | None = None) -> Fetched:
    """The weight file of a timm model such as `vit_small_patch16_224.dino`.

    revision: a branch, tag or commit of its repository; None is its main branch, or the run's own commit.
    Raises ConfigError for a revision of what lies in no repository, WeightsError if timm knows no weights of that
    name, or they are neither cached nor reachable.
    """
    import timm

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise WeightsError(
            f"timm has no pretrained weights of {name}",
            hint="give a file of weights with --teacher FILE --architecture " + name,
        )
    missing = _Missing(f"timm:{name}", name)
    if cfg.hf_hub_id:
        files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        return _of_repo(cfg.hf_hub_id, files, missing, revision)
    _refuse_revision(revision, missing, cfg.url)
    return _from_url(cfg.url, None, missing)


def fetch_open_clip(arch: str, tag: str, revision: str | None = None) -> Fetched:
    """The weight file of an open_clip model; revision and errors as for `fetch_timm`."""
    import open_clip

    stated = open_clip.get_pretrained_cfg(arch, tag)
    missing = _Missing(f"open_clip:{arch}/{tag}", f"open_clip:{arch}")
    if not stated.get("hf_hub"):
        if not stated.get("url"):
            raise WeightsError(
                f"open_clip has no weights {missing.model}",
                hint=f"give a file of weights with --teacher FILE --architecture open_clip:{arch}",
            )
        _refuse_revision(revision, missing, stated["url"])
        return _from_url(stated["url"], None, missing)
    repo, _, filename = stated["hf_hub"].rpartition("/")
    filename = filename or "open_clip_pytorch_model.bin"
    safe = "open_clip_model.safetensors"
    if filename != "open_clip_pytorch_model.bin":
        safe = str(Path(filename).with_suffix(".safetensors"))
    return _of_repo(repo, list(dict.fromkeys([safe, filename])), missing, revision)


def _of_repo(repo: str, files: list[str], missing: "_Missing", revision: str | None) -> Fetched:
    path = _from_hub(repo, files, missing, pinned_revision(repo, revision or BRANCH))
    return Fetched(path, hub_address(repo, revision or BRANCH), commit_of(path))


def _refuse_revision(revision: str | None, missing: "_Missing", url: str) -> None:
    if revision is not None:
        raise ConfigError(
            f"{missing.model}@{revision}: its weights lie at {url}, which has no revisions",
            "leave @REVISION out",
        )


def fetch_official(url: str, *, sha256: str | None, name: str) -> Fetched:
    """The file its authors publish at a plain address.

    sha256: as published, in full or its first digits; checked on a file in the cache too. OpenAI's addresses state it.
    name: the teacher, for messages and `--arch`.
    Raises WeightsError if it is neither cached nor reachable, or is not the published file; ResourceError for a full
    disk.
    """
    return _from_url(url, sha256, _Missing(name, name))


def fetch_repo(repo: str, revision: str = BRANCH) -> Fetched:
    """The folder of a hub repository's model: its config, its cards, and one file of weights, all of one commit.

    repo: ORG/REPO. revision: a branch, tag or commit; what is cached of it is taken without asking the network.
    Raises ConfigError for what is no repository's name, WeightsError if it has no model, or is neither cached nor
    reachable.
    """
    _check_repo_name(repo)
    missing = _Missing(f"hf:{repo}@{revision}", "ARCH")
    asked = pinned_revision(repo, revision)
    folder = _from_hub(repo, [CONFIG, OPEN_CLIP_CONFIG], missing, asked).parent
    for file in (OPEN_CLIP_CONFIG, CARD):
        if unknown := _bring_if_there(repo, file, missing, folder.name):
            logger.info("whether hf:%s has a %s is not known: %s", repo, file, unknown)
    library = library_of(folder)
    if library == "transformers" and (unknown := _bring_if_there(repo, PREPROCESSOR, missing, folder.name)):
        raise missing._replace(address=f"all of hf:{repo}").error(f"whether it has {PREPROCESSOR}: {unknown}")
    _from_hub(repo, list(WEIGHTS[library]), missing, folder.name)
    return Fetched(folder, hub_address(repo, revision), folder.name)


def _check_repo_name(repo: str) -> None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    hint = "write hf:ORG/REPO or hf:ORG/REPO@REVISION"
    if repo.count("/") != 1:
        raise ConfigError(f"hf:{repo} is not the name of a repository", hint=hint)
    try:
        try_to_load_from_cache(repo, CONFIG)
    except HFValidationError as error:
        raise ConfigError(
            f"hf:{repo} is not the name of a repository: {_first_line(error)}", hint=hint
        ) from error


def _from_hub(repo: str, files: list[str], missing: "_Missing", revision: str) -> Path:
    """The first of `files` that the repository has; a cached one is taken without asking the network.

    Raises WeightsError if it is neither cached nor reachable, or not what the hub described when it came.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for file in files:
        if isinstance(cached := try_to_load_from_cache(repo, file, revision=revision), str):
            require_undamaged(Path(cached))
            return Path(cached)
    missing = missing._replace(
        address=f"{constants.ENDPOINT}/{repo}/resolve/{revision}/{files[0]}", cache=constants.HF_HUB_CACHE
    )
    if reason := _why_unreachable():
        raise missing.error(reason)
    for file in files:
        logger.info("downloading %s of %s", file, repo)
        try:
            path = Path(hf_hub_download(repo, file, revision=revision, etag_timeout=_CONNECT_SECONDS))
        except LocalEntryNotFoundError as error:
            raise missing.error("the hub does not answer") from error
        except EntryNotFoundError:
            continue
        except Exception as error:  # the client's own, or its HTTP library's: that depends on its version
            raise _hub_refusal(repo, error, missing) from error
        require_undamaged(path)
        return path
    raise missing.error(f"{repo} has neither {' nor '.join(files)}")


def _bring_if_there(repo: str, file: str, missing: "_Missing", commit: str) -> str:
    """Brings a file that a repository may not have, as the cache may know; why that cannot be asked, or nothing."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(repo, file, revision=commit)
    if cached is not None:
        if isinstance(cached, str):
            require_undamaged(Path(cached))
        return ""
    if reason := _why_unreachable():
        return reason
    try:
        path = Path(hf_hub_download(repo, file, revision=commit, etag_timeout=_CONNECT_SECONDS))
    except LocalEntryNotFoundError as error:  # which is an EntryNotFoundError, too
        return _first_line(error)
    except EntryNotFoundError:
        return ""
    except Exception as error:  # as in _from_hub
        raise _hub_refusal(repo, error, missing) from error
    require_undamaged(path)
    return ""


def _hub_refusal(repo: str, error: Exception, missing: "_Missing") -> Exception:
    """What the hub's refusal means, in plain words."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResourceError(
            f"no room for the files of {repo} in {constants.HF_HUB_CACHE}: {error.strerror}",
            hint="free some space there, or set HF_HOME to a folder on a larger disk; what is received is kept",
        )
    if isinstance(error, GatedRepoError):
        return WeightsError(
            f"weights of {missing.model}: {repo} is gated, and this account has no access to it",
            hint=f"accept its terms at {constants.ENDPOINT}/{repo}, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return missing.error(f"{repo} has no such revision")
    if isinstance(error, RepositoryNotFoundError):
        return missing.error(f"there is no repository {repo}, or it is private (set HF_TOKEN)")
    return missing.error(_first_line(error))


def _from_url(url: str, sha256: str | None, missing: "_Missing") -> Fetched:
    """A file at a plain address, kept where `torch.hub` keeps its checkpoints."""
    import torch.hub
    from huggingface_hub import constants

    from fdkit.teachers.download import UnreachableError, download

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / file_name(url)
    stated = next(
        (part for part in urlsplit(url).path.split("/") if re.fullmatch(r"[0-9a-f]{64}", part)), None
    )
    sha256 = sha256 or stated
    if path.is_file():
        if sha256:
            verify(path, sha256)
        return Fetched(path, url)
    missing = missing._replace(address=url, cache=str(folder))
    if constants.HF_HUB_OFFLINE:
        raise missing.error("HF_HUB_OFFLINE is set")
    try:
        download(url, path, sha256=sha256)
    except UnreachableError as error:
        raise missing.error(str(error)) from error
    except OSError as error:
        raise missing.error(_first_line(error)) from error
    return Fetched(path, url)


def file_name(url: str) -> str:
    """The name under which the file at an address is kept: its own, or one with a mark of the address where its own
    says nothing, as checkpoint_best.pth does. WeightsError if the address names no file.
    """
    address = urlsplit(url)
    name = unquote(address.path).rpartition("/")[2]
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", name):
        raise WeightsError(f"the address {url or '(none)'} names no file of weights")
    stem, dot, suffix = name.partition(".")
    if not _ANY_FILE.fullmatch(stem):
        return name
    mark = hashlib.sha256(f"{address.hostname}{address.path}".encode()).hexdigest()[:8]
    return f"{stem}-{mark}{dot}{suffix}"


class _Missing(NamedTuple):
    """What to say about weights that cannot be had."""

    model: str
    architecture: str
    address: str = ""
    cache: str = ""

    def error(self, reason: str) -> WeightsError:
        return WeightsError(
            f"weights of {self.model} are not in the cache ({self.cache}) and could not be downloaded: {reason}",
            hint=f"download {self.address} on another machine, copy it here, then give "
            f"--teacher FILE --architecture {self.architecture}",
        )


def _why_unreachable() -> str:
    """Why the hub cannot be asked, within seconds; empty if it answers. The hub's own retries take minutes."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    constants.HF_HUB_DISABLE_TELEMETRY = True  # else a download tells torch's version and what program asks
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception as error:  # the hub's HTTP client depends on its version, and so do its errors
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
