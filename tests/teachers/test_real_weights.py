"""A real pretrained network on real photos: everything between the file and the class has to be right at once."""

from pathlib import Path

import pytest
import torch

from fdkit.commands._command import EvaluationImages
from fdkit.data.loader import LoaderConfig
from fdkit.data.sources import open_source
from fdkit.teachers.loading import load_teacher

WEIGHTS = "weights/vit_tiny_patch16_224/vit_tiny_patch16_224.safetensors"


def top1(shared: Path) -> float:
    """Share of the sample's 1,000 photos, one a class in ImageNet's order, that the classifier names right."""
    teacher = load_teacher(str(shared / WEIGHTS), keep_head=True)
    source = open_source(str(shared / "data/imagenet_sample_1k"), "val")
    batches = EvaluationImages(teacher, source, LoaderConfig(workers=0), batch_size=50)
    with torch.inference_mode():
        guessed = torch.cat([teacher.backbone.logits(images.pixels).argmax(dim=1) for images in batches])
    return float((guessed == torch.tensor(source.labels)).float().mean())


@pytest.mark.slow
def test_vit_tiny_names_81_percent_of_the_imagenet_sample(shared: Path) -> None:
    assert top1(shared) == pytest.approx(0.81, abs=0.002)
