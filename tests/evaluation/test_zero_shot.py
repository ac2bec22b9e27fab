"""Zero-shot naming against open_clip's own encode_image, encode_text and classifier, with tiny random models."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import fdkit
from fdkit.data.sources import FolderSource
from fdkit.errors import ConfigError, DataError, WeightsError
from fdkit.evaluation import zero_shot
from fdkit.evaluation._joint_space import (
    HOSTED_BY_BOTH,
    centred,
    cosines,
    text_source,
    token_head,
    unwhitened,
)
from fdkit.evaluation._metrics import expected_calibration_error
from fdkit.evaluation.features import evaluation_crop
from fdkit.evaluation.zero_shot import ZeroShotConfig, described
from fdkit.methods.feature_distillation import whiten
from fdkit.models.libraries import build_open_clip, build_timm
from fdkit.teachers.catalog import CATALOG
from fdkit.teachers.loading import load_teacher
from fdkit.teachers.origin import Fetched

ARCH, TAG = "fdkit-zero-shot-test", "made"
MODEL = f"open_clip:{ARCH}/{TAG}"
OPTIONS: dict[str, Any] = {"loader": {"workers": 0}, "cache": "none"}
CLASSES = ("bee", "red_cat", "t-shirt")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole CLIP model's file; its architecture is made known to open_clip."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (folder / f"{ARCH}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    torch.manual_seed(4)
    model = open_clip.create_model(ARCH)
    with torch.no_grad():
        model.visual.ln_post.weight.uniform_(0.5, 2.0)
        model.visual.ln_post.bias.normal_(std=0.2)
        model.visual.proj.normal_()
        model.logit_scale.fill_(2.0)
        for text in model.transformer.parameters():
            text.normal_(std=0.3)
    path = folder / "open_clip_model.safetensors"
    safetensors.torch.save_file(model.state_dict(), path)
    return path


@pytest.fixture(autouse=True)
def _published(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip knows the weights, and they are in the cache."""
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, ARCH, {TAG: {"hf_hub": "nobody/nothing/"}})
    for module in ("fdkit.teachers.model", "fdkit.evaluation.zero_shot"):
        monkeypatch.setattr(f"{module}.fetch_open_clip", lambda *_, **__: Fetched(weights, "somewhere"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 4)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(256, size=(5, 4 + number, 3), dtype=np.uint8)
                image = Image.fromarray(pixels).resize((40, 36), Image.Resampling.BICUBIC)
                image.save(root / split / name / f"{number}.png")
    return root


def whole_model(weights: Path) -> Any:
    model = open_clip.create_model(ARCH)
    model.load_state_dict(safetensors.torch.load_file(weights))
    return model.eval()


def test_crops(photos: Path, preprocessing: Any) -> tuple[Tensor, Tensor]:
    """The evaluation crops (N, 3, S, S) in [0, 1] of all test images, and their labels."""
    source, crop = FolderSource(photos, "test"), evaluation_crop(preprocessing)
    views = [crop(source.read(index), np.random.default_rng(0)).crops[0] for index in range(len(source))]
    return crop.finish([torch.stack(views)], [])[0], torch.tensor(source.labels)


test_crops.__test__ = False  # type: ignore[attr-defined]


@torch.no_grad()
def naive(weights: Path, names: tuple[str, ...], templates: list[Callable[[str], str]]) -> Tensor:
    """(K, E): mean of the normalised embeddings of each class's texts, normalised."""
    model, tokenize = whole_model(weights), open_clip.get_tokenizer(ARCH)
    rows = []
    for name in names:
        texts = [
            F.normalize(model.encode_text(tokenize([template(name)])), dim=1)[0] for template in templates
        ]
        rows.append(F.normalize(torch.stack(texts).mean(dim=0), dim=0))
    return torch.stack(rows)


@torch.no_grad()
def image_embeddings(weights: Path, photos: Path) -> tuple[Tensor, Tensor]:
    preprocessing = build_open_clip(ARCH, tag=TAG).preprocessing
    images, labels = test_crops(photos, preprocessing)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
    return whole_model(weights).encode_image((images - mean) / std, normalize=True), labels


def test_equals_open_clips_own_towers_one_text_at_a_time(weights: Path, photos: Path) -> None:
    numbers = fdkit.evaluate("zero-shot", MODEL, photos, templates="simple", **OPTIONS)
    names = ("bee", "red cat", "t shirt")
    texts = naive(weights, names, list(open_clip.SIMPLE_IMAGENET_TEMPLATES))
    images, labels = image_embeddings(weights, photos)
    scores = np.exp(2.0) * images @ texts.T
    assert numbers["top1"] == float((scores.argmax(dim=1) == labels).double().mean())
    hits = (scores.argmax(dim=1) == labels).view(3, 4).double().mean(dim=1)
    assert numbers["per_class"] == hits.tolist()
    assert numbers["ece"] == pytest.approx(expected_calibration_error(scores.softmax(1), labels), abs=1e-4)
    assert (numbers["classes"], numbers["num_templates"]) == (list(names), 7)
    assert numbers["text"] == {"architecture": ARCH, "tag": TAG, "is_random": False}
    json.dumps(numbers, allow_nan=False)


def test_scores_and_not_only_answers_are_open_clips(
    weights: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def kept(images: Tensor, texts: Tensor, space: Any) -> Tensor:
        seen["scores"], seen["texts"] = similarity(images, texts, space), texts
        return seen["scores"]

    similarity = zero_shot.similarity
    monkeypatch.setattr(zero_shot, "similarity", kept)
    fdkit.evaluate("zero-shot", MODEL, photos, templates="openai", **OPTIONS)
    texts = naive(weights, ("bee", "red cat", "t shirt"), list(open_clip.OPENAI_IMAGENET_TEMPLATES))
    images, _ = image_embeddings(weights, photos)
    torch.testing.assert_close(seen["texts"], texts, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(seen["scores"].float(), images @ texts.T, atol=1e-5, rtol=1e-4)
    assert (seen["scores"].amax() - seen["scores"].amin()) > 0.01  # texts and images do differ


def test_a_template_and_class_names_of_ones_own(weights: Path, photos: Path, tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("honey bee\nginger {cat}\nshirt\n\n")
    numbers = fdkit.evaluate(
        "zero-shot", MODEL, photos, templates="this is {}, see?", class_names=file, **OPTIONS
    )
    texts = naive(weights, ("honey bee", "ginger {cat}", "shirt"), [lambda name: f"this is {name}, see?"])
    images, labels = image_embeddings(weights, photos)
    hits = (images @ texts.T).argmax(dim=1) == labels
    assert numbers["top1"] == float(hits.double().mean())
    assert numbers["num_templates"] == 1


def test_a_file_of_the_whole_model_has_its_own_text_tower(weights: Path, photos: Path) -> None:
    by_name = fdkit.evaluate("zero-shot", MODEL, photos, templates="simple", **OPTIONS)
    by_file = fdkit.evaluate(
        "zero-shot", weights, photos, architecture=f"open_clip:{ARCH}", templates="simple", **OPTIONS
    )
    assert (by_file["top1"], by_file["ece"]) == (by_name["top1"], pytest.approx(by_name["ece"]))


def test_random_weights_are_random_on_both_sides_and_said(
    photos: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(zero_shot, "fetch_open_clip", lambda *_: pytest.fail("weights were asked for"))
    before = torch.get_rng_state()
    with caplog.at_level("WARNING", "fdkit"):
        first, second = (
            fdkit.evaluate("zero-shot", MODEL, photos, pretrained=False, templates="simple", **OPTIONS)
            for _ in range(2)
        )
    assert f"RANDOM WEIGHTS: the text tower of {ARCH}" in caplog.text
    assert first == second
    assert first["text"]["is_random"]
    assert torch.equal(torch.get_rng_state(), before)


def test_names_of_classes_are_read_from_folders_or_imagenets_list() -> None:
    assert described(("red_cat", "t-shirt"), None) == ("red cat", "t shirt")
    assert described(("n01440764", "n15075141"), None) == ("tench", "toilet paper")
    assert described(("n01440764", "cat"), None) == ("n01440764", "cat")


# --- students -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def distilled(weights: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a run folder of a student taught by the tiny CLIP model, each kind once."""
    made: dict[str, Path] = {}

    def make(**distillation: Any) -> Path:
        key = json.dumps(distillation)
        if key not in made:
            made[key] = fdkit.distill(
                MODEL,
                photos,
                output=tmp_path_factory.mktemp("runs") / "run",
                image_size=32,
                views={"image_size": 32, "min_scale": 0.5},
                student={"depth": 1, "width": 24, "num_heads": 2},
                train={"batch_size": 3, "epochs": 1},
                optim={"warmup_epochs": 0.5},
                loader={"workers": 0},
                distillation=distillation,
            )
        return made[key]

    return make


@torch.no_grad()
def naive_student(run: Path, photos: Path, *, reads_class_token: bool) -> tuple[Tensor, Tensor]:
    """What the projector makes of the student's tokens, (N, C), and the labels."""
    student = load_teacher(str(run)).backbone
    images, labels = test_crops(photos, student.preprocessing)
    tokens = student(images)
    vectors = tokens.prefix[:, 0] if reads_class_token else tokens.patches.mean(dim=1)
    heads = safetensors.torch.load_file(run / "heads.safetensors")
    return vectors @ heads["projector.weight"].T + heads["projector.bias"], labels


def ece_and_top1(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    probabilities = (float(np.exp(2.0)) * scores).softmax(dim=1)
    return (
        expected_calibration_error(probabilities, labels),
        float((scores.argmax(dim=1) == labels).double().mean()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("whitening", ["none", "l2", "layernorm"])
def test_a_student_of_the_logits_is_named_by_its_teachers_texts(
    weights: Path, photos: Path, distilled: Callable[..., Path], whitening: str
) -> None:
    run = distilled(target="logits", whitening=whitening)
    numbers = fdkit.evaluate("zero-shot", run, photos, templates="simple", **OPTIONS)
    prediction, labels = naive_student(run, photos, reads_class_token=False)
    texts = naive(weights, ("bee", "red cat", "t shirt"), list(open_clip.SIMPLE_IMAGENET_TEMPLATES))
    if whitening == "layernorm":
        prediction = prediction - prediction.mean(dim=1, keepdim=True)
        texts = texts - texts.mean(dim=1, keepdim=True)
    scores = F.cosine_similarity(prediction[:, None], texts[None], dim=2)
    ece, top1 = ece_and_top1(scores, labels)
    assert (numbers["ece"], numbers["top1"]) == (pytest.approx(ece, abs=1e-4), top1)
    assert numbers["space"]["is_centred"] == (whitening == "layernorm")
    assert (numbers["space"]["teacher"], numbers["space"]["target"]) == (MODEL, "logits")


@pytest.mark.slow
@pytest.mark.parametrize("whitening", ["none", "layernorm"])
def test_a_student_of_the_tokens_goes_through_its_teachers_projection(
    weights: Path, photos: Path, distilled: Callable[..., Path], whitening: str
) -> None:
    run = distilled(target="feature_map", whitening=whitening)
    numbers = fdkit.evaluate("zero-shot", run, photos, templates="simple", **OPTIONS)
    prediction, labels = naive_student(run, photos, reads_class_token=True)
    visual = whole_model(weights).visual.requires_grad_(False)
    if whitening == "layernorm":
        prediction = unwhitened(
            prediction.double(), visual.ln_post.weight.double(), visual.ln_post.bias.double()
        ).float()
    texts = naive(weights, ("bee", "red cat", "t shirt"), list(open_clip.SIMPLE_IMAGENET_TEMPLATES))
    scores = F.cosine_similarity((prediction @ visual.proj)[:, None], texts[None], dim=2)
    ece, top1 = ece_and_top1(scores, labels)
    assert (numbers["ece"], numbers["top1"]) == (pytest.approx(ece, abs=1e-4), top1)
    assert not numbers["space"]["is_centred"]


@torch.no_grad()
@pytest.mark.parametrize("whitening", ["none", "l2", "layernorm"])
def test_a_perfect_student_scores_as_its_teacher(weights: Path, photos: Path, whitening: Any) -> None:
    """What the method whitens comes back to the teacher's own cosines, of tokens; of logits, without their mean."""
    teacher = load_teacher(MODEL)
    images, _ = test_crops(photos, teacher.backbone.preprocessing)
    texts = naive(weights, ("a", "b", "c", "d"), list(open_clip.SIMPLE_IMAGENET_TEMPLATES))
    embeddings = teacher.backbone.logits(images)
    tokens = whiten(teacher.encode(images).prefix[:, 0], whitening)
    head = token_head(teacher.backbone)
    if whitening == "layernorm":
        tokens = unwhitened(tokens.double(), head.norm.weight.double(), head.norm.bias.double())
    found = cosines(tokens.double() @ head.projection.double(), texts)
    torch.testing.assert_close(found, cosines(embeddings, texts), atol=1e-4, rtol=1e-4)
    answers = whiten(embeddings, whitening)
    if whitening == "layernorm":
        expected = cosines(centred(embeddings), centred(texts))
        assert not torch.allclose(cosines(answers, texts), cosines(embeddings, texts), atol=1e-3)
        torch.testing.assert_close(cosines(centred(answers), centred(texts)), expected, atol=1e-4, rtol=1e-4)
    else:
        torch.testing.assert_close(cosines(answers, texts), cosines(embeddings, texts), atol=1e-4, rtol=1e-4)


def test_a_norm_output_is_recovered_from_its_whitened_form() -> None:
    """Whatever the rows: only the norm's own weight and bias are known."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.rand(40, generator=generator, dtype=torch.float64) + 0.5
    bias = 0.4 * torch.randn(40, generator=generator, dtype=torch.float64)
    rows = 3 * torch.randn(9, 40, generator=generator, dtype=torch.float64) + 1
    normed = F.layer_norm(rows, (40,), weight, bias, eps=1e-12)
    whitened = F.layer_norm(normed, (40,), eps=1e-5)
    torch.testing.assert_close(unwhitened(whitened, weight, bias), normed, atol=1e-8, rtol=1e-8)
    # Without the norm's bias the scale could not be told: it is the bias that fixes it.
    assert not torch.allclose(unwhitened(whitened, weight, 0 * bias), normed, atol=1e-2)


def test_a_norm_that_hides_its_scale_is_refused() -> None:
    whitened = torch.randn(3, 6, dtype=torch.float64)
    ones = torch.ones(6, dtype=torch.float64)
    with pytest.raises(ConfigError, match="biases of the teacher's final norm outweigh its weights"):
        unwhitened(whitened, ones, torch.tensor([3.0, -3, 3, -3, 3, -3], dtype=torch.float64))
    with pytest.raises(ConfigError, match="final norm has weights of zero"):
        unwhitened(whitened, torch.tensor([1.0, 1, 0, 1, 1, 1], dtype=torch.float64), ones)


@torch.no_grad()
def test_timms_clip_towers_end_in_the_same_linear_map() -> None:
    network = build_timm(
        "vit_base_patch16_clip_quickgelu_224",
        {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 10},
    ).eval()
    head = token_head(network)
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(network(images).prefix[:, 0] @ head.projection, network.logits(images))
    network.network.head.bias.fill_(0.1)
    with pytest.raises(ConfigError, match="is no linear map of its normed class token"):
        token_head(network)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "other", "message"),
    [
        ("target: feature_map", "target: pooled", "mean of the teacher's patch tokens, which its projection"),
        ("layer: null", "layer: 0", "learned a layer that does not end the teacher"),
        ("norm: true", "norm: false", "learned a layer that does not end the teacher"),
        (
            "whitening: none",
            "whitening: batch",
            "whitened over batches, whose means and variances no run keeps",
        ),
    ],
)
def test_students_that_were_not_taught_the_way_are_refused(
    photos: Path, distilled: Callable[..., Path], tmp_path: Path, line: str, other: str, message: str
) -> None:
    run = shutil.copytree(distilled(target="feature_map", whitening="none"), tmp_path / "run")
    config = (run / "config.yaml").read_text()
    assert config.count(f"  {line}\n") == 1
    (run / "config.yaml").write_text(config.replace(line, other))
    with pytest.raises(ConfigError, match=message):
        fdkit.evaluate("zero-shot", run, photos, **OPTIONS)


@pytest.mark.slow
def test_a_student_of_several_teachers_is_refused(
    photos: Path, distilled: Callable[..., Path], tmp_path: Path
) -> None:
    run = shutil.copytree(distilled(target="feature_map", whitening="none"), tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())
    facts["teachers"] = [facts.pop("teacher")] * 2
    (run / "run.json").write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match="was distilled from 2 teachers: its texts could be of any of them"):
        fdkit.evaluate("zero-shot", run, photos, **OPTIONS)


@pytest.mark.slow
def test_a_student_of_no_clip_model_is_refused(photos: Path, tmp_path: Path) -> None:
    run = fdkit.distill(
        "demo",
        photos,
        output=tmp_path / "run",
        views={"image_size": 32},
        student={"depth": 1},
        train={"batch_size": 3, "epochs": 1},
        optim={"warmup_epochs": 0.5},
        loader={"workers": 0},
    )
    with pytest.raises(ConfigError, match="demo has no text tower that could name classes"):
        fdkit.evaluate("zero-shot", run, photos, **OPTIONS)


# --- which text tower, and what is refused ----------------------------------------------------------------------------


def test_openais_rows_have_the_open_clip_model_of_the_same_repository() -> None:
    """By the repository both libraries state for their weights; others state none in common."""
    expected = {
        "clip_vitb": ("ViT-B-16-quickgelu", "openai"),
        "clip_vitb32": ("ViT-B-32-quickgelu", "openai"),
        "clip_vitl": ("ViT-L-14-quickgelu", "openai"),
        "clip_vitl336": ("ViT-L-14-336-quickgelu", "openai"),
    }
    for name, (arch, tag) in expected.items():
        identity = {"recipe": {"library": "timm"}, "source": CATALOG[name].model, "name": name}
        found = text_source(identity)
        assert (found.arch, found.tag) == (arch, tag)
    for name in ("dinov2_vitb", "aimv2_vitl"):
        identity = {"recipe": {"library": "timm"}, "source": CATALOG[name].model, "name": name}
        with pytest.raises(ConfigError, match=rf"(?s){name} has no text tower.*open_clip:ARCH/TAG"):
            text_source(identity)


def test_towers_hosted_by_both_are_sent_to_the_whole_model() -> None:
    identity = {
        "recipe": {"library": "timm"},
        "source": CATALOG["siglip2_vitb"].model,
        "name": "siglip2_vitb",
    }
    with pytest.raises(
        ConfigError, match=r"(?s)siglip2_vitb is timm's image tower alone.*open_clip:ViT-B-16-SigLIP2/webli"
    ):
        text_source(identity)
    known = {f"{arch}/{tag}" for arch, tag in open_clip.list_pretrained()}
    assert set(HOSTED_BY_BOTH.values()) <= known
    hosted = {row.model.removeprefix("timm:") for row in CATALOG.values()}
    assert set(HOSTED_BY_BOTH) <= hosted
    families = {"openclip", "siglip2", "eva02clip"}
    assert {row.model.removeprefix("timm:") for row in CATALOG.values() if row.family in families} <= set(
        HOSTED_BY_BOTH
    )


def test_bad_input_is_one_sentence(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match="demo has no text tower that could name classes: it is no CLIP model"
    ):
        fdkit.evaluate("zero-shot", "demo", photos, **OPTIONS)
    (tmp_path / "flat" / "test").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "flat" / "test" / "1.png")
    with pytest.raises(DataError, match="has no labels"):
        fdkit.evaluate("zero-shot", MODEL, tmp_path / "flat", **OPTIONS)
    with pytest.raises(ConfigError, match=r"neither openai nor simple and has no \{\} for the class name"):
        ZeroShotConfig(templates="a photo")

    def missing(*_: object) -> Fetched:
        raise WeightsError("the weights cannot be reached")

    monkeypatch.setattr(zero_shot, "fetch_open_clip", missing)
    with pytest.raises(WeightsError, match="cannot be reached"):
        fdkit.evaluate("zero-shot", MODEL, photos, **OPTIONS)


def test_files_of_class_names_are_held_to_the_classes(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    file.write_text("one\ntwo\n")
    with pytest.raises(ConfigError, match=r"names\.txt has 2 class names, and the data has 3 classes"):
        described(CLASSES, file)
    file.write_text("one\n\nthree\n")
    with pytest.raises(ConfigError, match=r"names\.txt: line 2 has no class name"):
        described(CLASSES, file)
    with pytest.raises(ConfigError, match=r"class names: .*nothing\.txt cannot be read"):
        described(CLASSES, tmp_path / "nothing.txt")
