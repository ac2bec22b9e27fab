import argparse
import math
from pathlib import Path

import pytest
import safetensors.torch
import torch

from fdkit.errors import ConfigError, WeightsError
from fdkit.models.libraries import save_backbone
from fdkit.teachers.decoder import load_decoder
from fdkit.teachers.loading import load_teacher
from tests.saved_mae import method, official_file, saved_run


def test_the_decoder_of_a_run_is_the_one_it_trained(tmp_path: Path) -> None:
    made = saved_run(tmp_path, norm_pixels=False, mask_ratio=0.5, sampling="block")
    trained = load_decoder(load_teacher(str(tmp_path)))
    assert trained[1:] == (False, 0.5, "block")
    assert not trained.decoder.training
    assert trained.decoder.blocks[0].attn.num_heads == 2  # which no tensor shows
    for key, value in made.decoder.state_dict().items():
        assert torch.equal(trained.decoder.state_dict()[key], value), key
    assert not any(parameter.requires_grad for parameter in trained.decoder.parameters())


def test_the_decoder_of_an_official_file_has_its_own_names_and_tells_what_its_training_was(
    tmp_path: Path,
) -> None:
    made = method()
    args = argparse.Namespace(norm_pix_loss=True, mask_ratio=0.6)
    training = official_file(tmp_path / "checkpoint-799.pth", made, args=args, epoch=799)
    published = official_file(tmp_path / "mae_visualize.pth", made)
    for path, stated in ((training, (True, 0.6, "random")), (published, (None, None, "random"))):
        trained = load_decoder(load_teacher(str(path)))
        assert trained[1:] == stated
        assert trained.decoder.blocks[0].attn.num_heads == 2  # 64 wide, 32 channels a head
        for key, value in made.decoder.state_dict().items():
            assert torch.equal(trained.decoder.state_dict()[key], value), key


def test_a_model_without_a_decoder_is_refused(tmp_path: Path) -> None:
    save_backbone(method().student, tmp_path)
    alone = dict(method().student.network.state_dict())
    torch.save({"model": alone}, tmp_path / "mae_pretrain_vit_tiny.pth")
    for name in (str(tmp_path), str(tmp_path / "mae_pretrain_vit_tiny.pth"), "demo"):
        with pytest.raises(ConfigError, match="has no decoder of pixels") as refusal:
            load_decoder(load_teacher(name))
        assert "fdkit pretrain mae" in refusal.value.hint


def test_heads_of_another_method_are_no_decoder(tmp_path: Path) -> None:
    save_backbone(method().student, tmp_path)
    safetensors.torch.save_file({"projector.0.weight": torch.ones(2, 2)}, tmp_path / "heads.safetensors")
    with pytest.raises(ConfigError, match="has no decoder of pixels"):
        load_decoder(load_teacher(str(tmp_path)))


def test_a_decoder_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path)
    heads = safetensors.torch.load_file(tmp_path / "heads.safetensors")
    teacher = load_teacher(str(tmp_path))
    safetensors.torch.save_file(
        {key: value for key, value in heads.items() if key != "decoder.norm.bias"},
        tmp_path / "heads.safetensors",
    )
    with pytest.raises(WeightsError, match=r"missing 1: norm\.bias"):
        load_decoder(teacher)
    heads["decoder.pred.bias"][3] = math.nan
    safetensors.torch.save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(WeightsError, match=r"pred\.bias holds 1 values that are not finite"):
        load_decoder(teacher)
    (tmp_path / "config.yaml").write_text("mae:\n  norm_pixels: true\n")
    with pytest.raises(WeightsError, match="section mae is not whole"):
        load_decoder(teacher)


def test_another_image_size_than_the_decoders_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path)
    with pytest.raises(ConfigError, match="made for 16 patches, and an image of 96 pixels has 36"):
        load_decoder(load_teacher(str(tmp_path), image_size=96))
