import pytest
import timm

from fdkit.teachers.catalog import CATALOG, Entry, list_teachers

ROWS = [pytest.param(entry, id=entry.name) for entry in list_teachers()]


@pytest.mark.parametrize("entry", ROWS)
def test_every_row_is_a_published_timm_model(entry: Entry) -> None:
    name = entry.model.removeprefix("timm:")
    cfg = timm.get_pretrained_cfg(name)
    assert cfg.hf_hub_id or cfg.url
    # timm's cards say apache-2.0 of OpenAI's weights, whose repository is under the MIT licence.
    assert entry.license == ("MIT" if name.endswith(".openai") else cfg.license)
    assert entry.image_size in (None, 224)
    assert entry.image_size is None or cfg.fixed_input_size


def test_names_scripts_rely_on_are_there() -> None:
    wanted = "clip_vitb clip_vitl dino_vits dino_vitb mae_vitb mae_vitl deit_vitb siglip2_vitb"
    wanted += " dinov2_vits dinov2_vitb dinov2_vitl dinov3_vits dinov3_vitb dinov3_vitl"
    assert set(wanted.split()) <= CATALOG.keys()
    assert len(CATALOG) == len(list_teachers())


def test_clip_rows_are_the_quickgelu_ones_and_dinov2_is_fed_224() -> None:
    assert all("quickgelu" in e.model for e in list_teachers() if e.model.endswith(".openai"))
    assert all(e.image_size == 224 for e in list_teachers() if e.name.startswith("dinov2"))
