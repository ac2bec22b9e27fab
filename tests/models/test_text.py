"""Text towers against open_clip's whole models."""

import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.text import build_text, text_state

ARCH = "fdkit-text-test"


@pytest.fixture(autouse=True)
def _architectures(tmp_path: Path) -> None:
    """A tiny CLIP model of the plain kind, and one of the kind with towers of their own names."""
    config = {
        "embed_dim": 20,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 40, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
    }
    (tmp_path / f"{ARCH}.json").write_text(json.dumps(config))
    (tmp_path / f"{ARCH}-custom.json").write_text(
        json.dumps({**config, "custom_text": True, "quick_gelu": True})
    )
    (tmp_path / f"{ARCH}-coca.json").write_text(json.dumps({**config, "multimodal_cfg": {}}))
    open_clip.add_model_config(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("arch", [ARCH, f"{ARCH}-custom"])
def test_texts_are_those_of_the_whole_model(arch: str) -> None:
    whole = open_clip.create_model(arch).eval()
    whole.logit_scale.fill_(3.5)
    tower = build_text(arch).eval()
    state = text_state(whole.state_dict(), source="whole")
    tower.load_state_dict(state, strict=True)
    texts = ["a photo of a cat.", "two dogs", "a"]
    tokens = open_clip.get_tokenizer(arch)(texts)
    assert torch.equal(tower.tokenize(texts), tokens)
    for normalize in (False, True):
        ours, theirs = (model.encode_text(tokens, normalize=normalize) for model in (tower, whole))
        torch.testing.assert_close(ours, theirs)
    assert ours.shape == (3, tower.width) == (3, 20)
    assert float(tower.logit_scale) == 3.5


@torch.no_grad()
def test_the_activation_is_that_of_the_weights() -> None:
    plain, quick = (build_text(ARCH, quick_gelu=value).eval() for value in (False, True))
    quick.load_state_dict(plain.state_dict())
    tokens = plain.tokenize(["a cat"])
    assert not torch.allclose(plain.encode_text(tokens), quick.encode_text(tokens), atol=1e-4)


def test_a_scale_of_one_number_in_a_list_is_read() -> None:
    state = open_clip.create_model(ARCH).state_dict()
    state["logit_scale"] = state["logit_scale"].reshape(1)
    assert text_state(state, source="x")["logit_scale"].shape == ()


def test_what_has_no_text_tower_is_refused() -> None:
    state = {
        key: value for key, value in open_clip.create_model(ARCH).state_dict().items() if "visual" in key
    }
    with pytest.raises(WeightsError, match=r"here\.pt holds no text tower: it is an image tower alone"):
        text_state(state, source="here.pt")
    with pytest.raises(ConfigError, match="unknown open_clip architecture fdkit-text-tes"):
        build_text("fdkit-text-tes")
    with pytest.raises(ConfigError, match="writes captions"):
        build_text(f"{ARCH}-coca")


def test_a_tower_whose_files_are_not_here_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object) -> None:
        raise OSError("no tokenizer in the cache\nand more")

    monkeypatch.setattr(open_clip, "get_tokenizer", unreachable)
    with pytest.raises(
        ConfigError, match=r"cannot be made: no tokenizer in the cache\n  it needs the package"
    ):
        build_text(ARCH)


def test_open_clips_own_lines_are_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    level = logging.getLogger().level
    with caplog.at_level(logging.INFO):
        build_text(ARCH)
        assert logging.getLogger().level == logging.INFO
    assert not caplog.records
    assert logging.getLogger().level == level
