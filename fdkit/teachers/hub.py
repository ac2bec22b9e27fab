"""Finds the weight files that timm and open_clip publish: in the local cache first, then over the network."""

import logging
from pathlib import Path

from fdkit.errors import WeightsError

logger = logging.getLogger("fdkit")

_CONNECT_SECONDS = 5.0


def fetch_timm(name: str) -> Path:
    """The weight file of a timm model such as `vit_small_patch16_224.dino`.

    Raises WeightsError if timm knows no weights of that name, or they are neither cached nor reachable.
    """
    import timm

    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise WeightsError(
            f"timm has no pretrained weights of {name}",
            hint="give a file of weights with --teacher FILE --architecture " + name,
        )
    if cfg.hf_hub_id:
        files = [cfg.hf_hub_filename] if cfg.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
        return _from_hub(cfg.hf_hub_id, files, model=f"timm:{name}", architecture=name)
    return _from_url(cfg.url, model=f"timm:{name}", architecture=name)


def fetch_open_clip(arch: str, tag: str) -> Path:
    """The weight file of an open_clip model; WeightsError as for `fetch_timm`."""
    import open_clip

    stated = open_clip.get_pretrained_cfg(arch, tag)
    model, architecture = f"open_clip:{arch}/{tag}", f"open_clip:{arch}"
    if not stated.get("hf_hub"):
        if not stated.get("url"):
            raise WeightsError(f"open_clip has no weights {model}")
        return _from_url(stated["url"], model=model, architecture=architecture)
    repo, _, filename = stated["hf_hub"].rpartition("/")
    filename = filename or "open_clip_pytorch_model.bin"
    safe = "open_clip_model.safetensors"
    if filename != "open_clip_pytorch_model.bin":
        safe = str(Path(filename).with_suffix(".safetensors"))
    return _from_hub(repo, list(dict.fromkeys([safe, filename])), model=model, architecture=architecture)


def _from_hub(repo: str, files: list[str], *, model: str, architecture: str) -> Path:
    """The first of `files` that the repository has; a cached one is taken without asking the network."""
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    for file in files:
        if isinstance(cached := try_to_load_from_cache(repo, file), str):
            return Path(cached)
    address = f"{constants.ENDPOINT}/{repo}/resolve/main/{files[0]}"
    missing = _Missing(model, architecture, address, cache=constants.HF_HUB_CACHE)
    if reason := _why_unreachable():
        raise missing.error(reason)
    for file in files:
        try:
            logger.info("downloading %s of %s", file, repo)
            return Path(hf_hub_download(repo, file, etag_timeout=_CONNECT_SECONDS))
        except LocalEntryNotFoundError as error:
            raise missing.error("the hub does not answer") from error
        except EntryNotFoundError:
            continue
        except (OSError, HfHubHTTPError) as error:
            raise missing.error(_first_line(error)) from error
    raise missing.error(f"{repo} has neither {' nor '.join(files)}")


def _from_url(url: str, *, model: str, architecture: str) -> Path:
    """A file at a plain address, kept where `torch.hub` keeps its checkpoints."""
    import torch.hub
    from huggingface_hub import constants

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    if path.is_file():
        return path
    missing = _Missing(model, architecture, url, cache=str(folder))
    if constants.HF_HUB_OFFLINE:
        raise missing.error("HF_HUB_OFFLINE is set")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except OSError as error:
        raise missing.error(_first_line(error)) from error
    return path


class _Missing:
    """What to say about weights that cannot be had."""

    def __init__(self, model: str, architecture: str, address: str, *, cache: str) -> None:
        self.model, self.architecture, self.address, self.cache = model, architecture, address, cache

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
    try:
        get_session().head(constants.ENDPOINT, timeout=_CONNECT_SECONDS)
    except Exception as error:  # the hub's HTTP client depends on its version, and so do its errors
        return _first_line(error)
    return ""


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
