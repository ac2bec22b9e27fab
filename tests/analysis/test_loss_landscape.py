import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from fdkit.analysis._directions import random_direction
from fdkit.analysis._figure import NARROW, WIDE, legend_columns
from fdkit.analysis._objective import labelled_images, make_objective
from fdkit.analysis.loss_landscape import LossLandscapeConfig, analyze, draw, scalars, summary
from fdkit.analysis.observe import Images, Observed
from fdkit.errors import ConfigError, DataError, NumericsError
from fdkit.models.backbone import Backbone
from fdkit.models.libraries import build_timm, save_backbone
from fdkit.teachers.loading import load_teacher
from fdkit.training.checkpoint import Checkpoint, save_checkpoint

CLASSES = ("bag", "cap", "shoe")
SIZE = 16
ARGS = {"depth": 2, "img_size": SIZE, "patch_size": 8, "embed_dim": 24, "num_heads": 3}


def tiny(*, classes: tuple[str, ...] | None = CLASSES, **args: Any) -> Backbone:
    backbone = build_timm("vit_tiny_patch16_224", {**ARGS, "num_classes": len(classes or ()), **args}).eval()
    if classes:
        torch.nn.init.normal_(backbone.network.head.weight, std=1.0)
        backbone.recipe["classes"] = list(classes)
    return backbone


def data(count: int = 30, *, seed: int = 0, sizes: int = 4) -> list[Images]:
    """Images whose mean brightness tells their class, in the order of classes as folders give them."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count).div(count / len(CLASSES), rounding_mode="floor").long()
    pixels = 0.3 * torch.rand(count, 3, SIZE, SIZE, generator=generator) + 0.3 * labels.view(-1, 1, 1, 1)
    return [Images(*part) for part in zip(pixels.split(sizes), labels.split(sizes), strict=True)]


def seen(model: Any, name: str = "vit", images: list[Images] | None = None) -> Observed:
    return Observed(name, model, data() if images is None else images, CLASSES)


def config(**fields: Any) -> LossLandscapeConfig:
    return LossLandscapeConfig(**{"num_images": 12, "batch_size": 5, "resolution": 5, **fields})


def loss_by_hand(backbone: Backbone, pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """One image at a time."""
    losses, hits = [], 0
    for image, label in zip(pixels, labels.tolist(), strict=True):
        with torch.no_grad():
            scores = backbone.logits(image[None])[0].double()
        losses.append(math.log(sum(math.exp(score) for score in scores.tolist())) - scores[label].item())
        hits += scores.argmax().item() == label
    return sum(losses) / len(losses), hits / len(losses)


def test_the_line_is_the_loss_at_weights_moved_by_hand() -> None:
    backbone = tiny()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    numbers = analyze([seen(backbone)], config(seed=4, extent=0.5)).numbers
    model = numbers["models"][0]
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert model["x"] == [-0.5, -0.25, 0.0, 0.25, 0.5]
    measured, _ = labelled_images(seen(backbone), 12)
    assert measured.labels.tolist() == [0, 1, 2] * 4
    weights = dict(backbone.network.named_parameters())
    direction = random_direction(weights, seed=4, number=0)
    for step, loss, accuracy in zip(model["x"], model["loss"], model["accuracy"], strict=True):
        with torch.no_grad():
            for name, moved in direction.items():
                weights[name].copy_(before[f"network.{name}"] + step * moved)
        expected = loss_by_hand(backbone, *measured)
        assert (loss, accuracy) == pytest.approx(expected, rel=1e-4)
    middle = model["loss"][2], model["accuracy"][2]
    assert (model["centre"]["loss"], model["centre"]["accuracy"]) == middle
    assert model["num_moved"] == sum(moved.numel() for moved in direction.values()) < model["num_parameters"]
    assert model["num_parameters"] == sum(value.numel() for value in weights.values())
    # Wrong directions give another line: biases moved too, or whole layers scaled.
    assert len({round(loss, 4) for loss in model["loss"]}) == 5


def test_the_plane_holds_the_line_and_has_x_within_y() -> None:
    backbone = tiny()
    line = analyze([seen(backbone)], config(extent=0.5)).numbers["models"][0]
    plane = analyze([seen(backbone)], config(extent=0.5, dimensions=2)).numbers["models"][0]
    assert np.array(plane["loss"]).shape == (5, 5)
    assert plane["loss"][2] == line["loss"]
    assert [row[2] for row in plane["loss"]] != line["loss"]
    assert plane["accuracy"][2] == line["accuracy"]


def test_models_of_one_architecture_are_moved_alike_and_it_is_said() -> None:
    models = [seen(tiny(), "a"), seen(tiny(), "b")]
    numbers = analyze(models, config(resolution=3)).numbers
    assert numbers["same_directions"]
    assert "same random directions" in summary(numbers)[0]
    other = analyze([models[0], seen(tiny(depth=3), "deep")], config(resolution=3)).numbers
    assert not other["same_directions"]
    assert "different networks: directions of one seed" in summary(other)[0]
    assert other["models"][0] == numbers["models"][0]


def test_the_numbers_are_plain_and_the_scalars_are_theirs() -> None:
    numbers = analyze([seen(tiny())], config(sharpness=True, max_products=4, tolerance=1e-9)).numbers
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    model = numbers["models"][0]
    assert numbers["analysis"] == "loss-landscape"
    assert (model["readout"], model["num_images"], model["num_classes"]) == ("head", 12, 3)
    found = scalars(model)
    rise = sum(model["loss"]) / 5 - model["centre"]["loss"]
    assert found["mean rise of loss (nats)"] == pytest.approx(rise)
    assert found["accuracy (%)"] == 100 * model["centre"]["accuracy"]
    assert found["largest Hessian eigenvalue"] == model["sharpness"]["value"]
    assert model["sharpness"]["products"] == 4
    assert not model["sharpness"]["converged"]
    title, (header, row) = summary(numbers)
    assert "loss in nats" in title
    assert len(header) == len(row)
    assert row[-1].startswith("at least ")


def test_the_eigenvalue_is_that_of_the_whole_hessian() -> None:
    backbone = tiny(depth=1, embed_dim=4, num_heads=2, mlp_ratio=1.0).double()
    images = data()
    fields = {"sharpness": True, "tolerance": 1e-7, "max_products": 60, "resolution": 3}
    model = analyze([seen(backbone, images=images)], config(**fields)).numbers["models"][0]
    measured, _ = labelled_images(seen(backbone, images=images), 12)
    for module in backbone.network.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    weights = dict(backbone.network.named_parameters())

    def loss(vector: Tensor) -> Tensor:
        parts = vector.split([value.numel() for value in weights.values()])
        named = {name: part.view_as(weights[name]) for name, part in zip(weights, parts, strict=True)}
        pixels = (measured.pixels.double() - backbone.mean) / backbone.std
        return F.cross_entropy(
            torch.func.functional_call(backbone.network, named, (pixels,)), measured.labels
        )

    start = torch.cat([value.detach().flatten() for value in weights.values()])
    whole = torch.autograd.functional.hessian(loss, start)
    assert model["sharpness"]["converged"]
    assert model["sharpness"]["value"] == pytest.approx(torch.linalg.eigvalsh(whole)[-1].item(), rel=1e-5)


def test_a_probe_is_fitted_on_other_images_and_stays_as_it_is() -> None:
    backbone, images = tiny(classes=None), data(60)
    observed = seen(backbone, images=images)
    options = {"readout": "probe", "num_images": 12, "num_fit_images": 24, "pooling": "cls"}
    model = analyze([observed], config(**options)).numbers["models"][0]
    assert (model["readout"], model["num_fit_images"], model["pooling"]) == ("probe", 24, "cls")
    measured, fit = labelled_images(observed, 12, num_fit=24)
    with torch.no_grad():
        of_fit, of_measured = (
            backbone(part.pixels).prefix[:, 0].double().numpy() for part in (fit, measured)
        )
    mean, std = of_fit.mean(0), of_fit.std(0)
    probe = LogisticRegression(max_iter=5000).fit((of_fit - mean) / std, fit.labels.numpy())
    chances = probe.predict_proba((of_measured - mean) / std)
    expected = -np.log(chances[np.arange(12), measured.labels.numpy()]).mean()
    assert model["centre"]["loss"] == pytest.approx(expected, rel=1e-3)
    assert model["centre"]["accuracy"] == (chances.argmax(1) == measured.labels.numpy()).mean()
    overlap = (measured.pixels[:, None] == fit.pixels[None]).flatten(2).all(-1)
    assert not overlap.any()


def test_a_probe_of_two_classes_is_the_sigmoid() -> None:
    two = [Images(batch.pixels, batch.labels.clamp_max(1)) for batch in data(60)]
    observed = Observed("vit", tiny(classes=None), two, CLASSES[:2])
    objective = make_objective(
        observed, readout="probe", pooling="patches", num_images=10, num_fit_images=20, batch_size=8
    )
    measured, fit = labelled_images(observed, 10, num_fit=20)
    with torch.no_grad():
        features = [observed.model(part.pixels).patches.mean(1).double().numpy() for part in (fit, measured)]
    mean, std = features[0].mean(0), features[0].std(0)
    probe = LogisticRegression(max_iter=5000).fit((features[0] - mean) / std, fit.labels.numpy())
    chances = probe.predict_proba((features[1] - mean) / std)[np.arange(10), measured.labels.numpy()]
    assert objective.measure()[0] == pytest.approx(-np.log(chances).mean(), rel=1e-3)


def test_classes_are_matched_by_name_in_any_order_and_all_outputs_compete() -> None:
    backbone = tiny(classes=("shoe", "hat", "bag", "cap"))
    model = analyze([seen(backbone)], config(resolution=3)).numbers["models"][0]
    measured, _ = labelled_images(seen(backbone), 12)
    places = torch.tensor([2, 3, 0])
    expected = loss_by_hand(backbone, measured.pixels, places[measured.labels])
    assert (model["centre"]["loss"], model["centre"]["accuracy"]) == pytest.approx(expected, rel=1e-4)


def test_parameters_the_loss_does_not_hang_on_do_not_count() -> None:
    options = {"readout": "probe", "pooling": "patches", "num_images": 12, "num_fit_images": 12}
    with_head, without = tiny(), tiny(classes=None)
    without.network.load_state_dict(with_head.network.state_dict(), strict=False)
    tables = [
        analyze([seen(backbone)], config(**options, batch_size=6)).numbers["models"][0]
        for backbone in (with_head, without)
    ]
    assert tables[0] == tables[1]


@pytest.mark.parametrize("size", [1, 4, 30])
def test_images_are_the_first_of_each_class_in_turn(size: int) -> None:
    images = data(31, sizes=size)
    measured, fit = labelled_images(seen(tiny(), images=images), 7, num_fit=5)
    pixels = torch.cat([batch.pixels for batch in images])
    labels = torch.cat([batch.labels for batch in images])
    firsts = [pixels[labels == label] for label in range(3)]
    # Of 12 images 4 a class, of which 5/12: one each, and the two that are missing of the first two classes.
    assert fit.labels.tolist() == [0, 1, 2, 0, 1]
    assert measured.labels.tolist() == [2, 0, 1, 2, 0, 1, 2]
    in_turn = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]
    assert torch.equal(fit.pixels, torch.stack([firsts[label][turn] for label, turn in in_turn]))
    in_turn = [(2, 1), (0, 2), (1, 2), (2, 2), (0, 3), (1, 3), (2, 3)]
    assert torch.equal(measured.pixels, torch.stack([firsts[label][turn] for label, turn in in_turn]))


def test_a_small_class_is_measured_too() -> None:
    labels = torch.tensor([0] * 20 + [1] * 20 + [2] * 3)
    batch = Images(torch.rand(len(labels), 3, SIZE, SIZE), labels)
    measured, fit = labelled_images(seen(tiny(), images=[batch]), 10, num_fit=20)
    # To fit on all that come first, the easy mistake, leaves none of the last class to measure.
    assert fit.labels.bincount().tolist() == [7, 6, 2]
    assert measured.labels.bincount().tolist() == [3, 4, 1]


def test_reading_stops_once_every_class_has_its_share() -> None:
    def batches():
        yield Images(torch.rand(6, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 0, 1, 2]))
        raise AssertionError("read on")

    measured, fit = labelled_images(Observed("vit", tiny(), batches(), CLASSES), 6)
    assert (len(measured.labels), len(fit.labels)) == (6, 0)


def test_fewer_images_than_asked_for_are_divided_in_proportion() -> None:
    measured, fit = labelled_images(seen(tiny(), images=data(9)), 200, num_fit=100)
    assert (len(measured.labels), len(fit.labels)) == (6, 3)


def unlabelled() -> list[Images]:
    return [Images(torch.rand(4, 3, SIZE, SIZE), torch.full((4,), -1)), Images(torch.rand(2, 3, SIZE, SIZE))]


def one_class() -> list[Images]:
    return [Images(torch.rand(9, 3, SIZE, SIZE), torch.ones(9, dtype=torch.int64))]


@pytest.mark.parametrize(
    ("observed", "fields", "error", "message"),
    [
        (
            lambda: Observed("clip", tiny(), unlabelled(), CLASSES),
            {},
            DataError,
            "no labelled images .* of clip",
        ),
        (lambda: Observed("clip", tiny(), data(), ()), {}, DataError, "no labelled images .* of clip"),
        (lambda: seen(tiny(), images=[]), {}, DataError, "no labelled images"),
        (lambda: seen(tiny(classes=None)), {}, ConfigError, "vit has no classifier of its own"),
        (
            lambda: seen(tiny(classes=("bag", "tie", "hat"))),
            {},
            ConfigError,
            "3 classes, and not cap, shoe of",
        ),
        (lambda: seen(_nameless()), {}, ConfigError, "classes without names, and not bag, cap, shoe"),
        (lambda: seen(tiny(), images=one_class()), {"readout": "probe"}, DataError, "all are of one class"),
        (
            lambda: seen(tiny(), images=data(30)),
            {"readout": "probe", "num_fit_images": 2},
            DataError,
            "2 images are too few .* none is of shoe",
        ),
        (lambda: seen(_damaged()), {}, NumericsError, "the loss of vit is nan before"),
        (lambda: seen(_damaged()), {"readout": "probe"}, NumericsError, "the features of vit are not finite"),
        (
            lambda: seen(tiny()),
            {"directions": "trajectory", "dimensions": 2},
            DataError,
            "vit is no run folder with checkpoints",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(observed, fields, error, message) -> None:
    with pytest.raises(error, match=message):
        analyze([observed()], config(**fields))


def _nameless() -> Backbone:
    backbone = tiny()
    del backbone.recipe["classes"]
    return backbone


def _damaged() -> Backbone:
    backbone = tiny()
    with torch.no_grad():
        backbone.network.blocks[0].mlp.fc1.weight[0, 0] = math.nan
    return backbone


def test_no_model_and_two_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="needs a model"):
        analyze([], config())
    with pytest.raises(ConfigError, match="two models are called vit"):
        analyze([seen(tiny()), seen(tiny())], config())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"directions": "trajectory"}, "spans a plane"),
        (
            {"directions": "trajectory", "dimensions": 2, "extent": 0.5},
            "extent 0.5 has no effect with directions",
        ),
        ({"directions": "trajectory", "dimensions": 2, "tables": True}, "tables True has no effect"),
        ({"pooling": "cls"}, "pooling cls has no effect with readout head"),
        ({"num_fit_images": 4}, "num_fit_images 4 has no effect with readout head"),
        ({"max_products": 4}, "max_products 4 has no effect with sharpness false"),
    ],
)
def test_options_without_effect_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LossLandscapeConfig(**fields)


def test_losses_that_are_not_finite_are_null_and_the_figure_lives_with_them() -> None:
    backbone = tiny()
    with torch.no_grad():
        backbone.network.head.weight *= 1e35
    numbers = analyze([seen(backbone)], config(extent=50.0)).numbers
    model = numbers["models"][0]
    assert None in model["loss"]
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    assert "mean rise of loss (nats)" not in scalars(model)
    assert "not finite" in summary(numbers)[1][1]
    numbers["analysis"] = "loss-landscape"
    line = draw(numbers).axes[0].lines[0].get_ydata()
    assert np.isnan(line).tolist() == [loss is None for loss in model["loss"]]


def test_the_model_is_left_in_the_mode_it_was_in() -> None:
    backbone = tiny(drop_path_rate=0.5)
    first = analyze([seen(backbone)], config(resolution=3)).numbers
    backbone.train()
    backbone.network.blocks[0].eval()
    assert analyze([seen(backbone)], config(resolution=3)).numbers == first
    assert backbone.training
    assert not backbone.network.blocks[0].training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in backbone.parameters())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier's run with four checkpoints, the last of which it ends at."""
    folder = tmp_path_factory.mktemp("runs") / "path"
    torch.manual_seed(5)
    backbone = tiny()
    end = {name: value.clone() for name, value in backbone.network.state_dict().items()}
    ways = [
        {name: torch.randn_like(value) * value.std(correction=0) for name, value in end.items()}
        for _ in range(2)
    ]
    for step, (first, second) in {10: (1.0, 0.1), 20: (0.6, 0.6), 30: (0.2, 0.4), 40: (0.0, 0.0)}.items():
        state = {
            f"student.network.{name}": value + first * ways[0][name] + second * ways[1][name]
            for name, value in end.items()
        }
        save_checkpoint(folder / "checkpoints", step, Checkpoint({"model": state}, {}), keep=9)
    save_backbone(backbone, folder)
    return folder


def on_path(model: Any, **fields: Any) -> dict[str, Any]:
    options = {"directions": "trajectory", "dimensions": 2, "resolution": 4, **fields}
    return analyze([seen(model)], config(**options)).numbers


def test_the_trajectory_lies_in_its_plane_with_the_losses_of_its_checkpoints(run: Path) -> None:
    teacher = load_teacher(str(run))
    before = {name: value.clone() for name, value in teacher.backbone.state_dict().items()}
    numbers = on_path(teacher)
    assert all(torch.equal(value, before[name]) for name, value in teacher.backbone.state_dict().items())
    assert json.loads(json.dumps(numbers, allow_nan=False)) == numbers
    model, path = numbers["models"][0], numbers["models"][0]["path"]
    assert path["steps"] == [10, 20, 30, 40]
    assert sum(path["explained"]) == pytest.approx(1, abs=1e-5)
    assert (path["x"][3], path["y"][3], path["distance"][3]) == pytest.approx((0, 0, 0), abs=1e-5)
    assert np.hypot(path["x"], path["y"]).tolist() == pytest.approx(path["distance"], rel=1e-4, abs=1e-4)
    assert model["x"][0] < min(path["x"])
    assert model["x"][-1] > max(path["x"])
    measured, _ = labelled_images(seen(teacher), 12)
    for number, step in enumerate(path["steps"]):
        there = load_teacher(str(run / "checkpoints" / f"step-{step:08d}")).backbone
        expected = loss_by_hand(there, *measured)
        assert (path["loss"][number], path["accuracy"][number]) == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert path["loss"][3] == pytest.approx(model["centre"]["loss"], rel=1e-5)
    assert "path" not in scalars(model)
    assert summary(numbers)[1][1][-1] == "100 %"


def test_the_plane_of_a_path_has_the_loss_that_the_path_has_there(run: Path) -> None:
    # The path lies in its plane, so a surface drawn through its points must have their losses.
    teacher = load_teacher(str(run))
    model = on_path(teacher, resolution=25)["models"][0]
    path, surface = model["path"], np.array(model["loss"])
    for x, y, loss in zip(path["x"], path["y"], path["loss"], strict=True):
        column, row = (np.searchsorted(model[key], value) - 1 for key, value in (("x", x), ("y", y)))
        across, up = (
            (value - model[key][at]) / (model[key][at + 1] - model[key][at])
            for key, value, at in (("x", x, column), ("y", y, row))
        )
        corners = surface[row : row + 2, column : column + 2]
        between = np.array([1 - up, up]) @ corners @ np.array([1 - across, across])
        assert between == pytest.approx(loss, rel=0.05, abs=0.02)


def test_damaged_checkpoints_are_left_out_and_named(run: Path, tmp_path: Path, caplog) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    path = on_path(load_teacher(str(copy)))["models"][0]["path"]
    assert path["steps"] == [10, 30, 40]
    assert path["left_out"] == ["step-00000020"]
    assert "step-00000020 is left out: manifest.json" in caplog.text
    (copy / "checkpoints" / "step-00000010" / "model.safetensors").unlink()
    with pytest.raises(DataError, match="the 2 checkpoints lie on one line"):
        on_path(load_teacher(str(copy)))
    with pytest.raises(ConfigError, match="has no pos_embed of"):
        on_path(load_teacher(str(run), image_size=32))


def test_the_centre_may_be_a_checkpoint(run: Path) -> None:
    path = on_path(load_teacher(str(run / "checkpoints" / "step-00000020")))["models"][0]["path"]
    assert path["distance"][1] == 0
    assert path["distance"][3] > 0


def test_the_figures(run: Path) -> None:
    lines = analyze([seen(tiny(), "a"), seen(tiny(), "b")], config(resolution=3))
    figure = lines.figure()
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss (nats)", "accuracy (%)"]
    for axes, key, factor in zip(figure.axes, ("loss", "accuracy"), (1, 100), strict=True):
        for line, model in zip(axes.lines, lines.numbers["models"], strict=True):
            assert list(line.get_xdata()) == model["x"]
            assert list(line.get_ydata()) == pytest.approx([factor * value for value in model[key]])
    assert legend_columns(["a" * 30] * 4, WIDE) == 2
    assert legend_columns(["a" * 30] * 4, NARROW) == legend_columns(["a" * 300], NARROW) == 1
    assert legend_columns(["a", "b"], WIDE) == 2
    maps = analyze([seen(tiny(), "a"), seen(tiny(depth=3), "b")], config(resolution=3, dimensions=2))
    figure = maps.figure()
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["a", "b"]
    levels = [axes.collections[0].levels.tolist() for axes in figure.axes[:2]]
    assert levels[0] == levels[1]
    narrow = draw(maps.numbers, width=3.7)
    bottoms = [axes.get_position().y0 for axes in narrow.axes[:2]]
    assert bottoms[0] > bottoms[1]
    numbers = on_path(load_teacher(str(run)))
    (axes, _) = draw(numbers).axes
    path = numbers["models"][0]["path"]
    assert axes.collections[-1].get_offsets()[:, 0].tolist() == pytest.approx(path["x"])
    assert "% of variance" in axes.get_xlabel()
