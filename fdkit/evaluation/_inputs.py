"""What features have to be before a classifier is fitted to them; everything else is refused in one sentence."""

import torch

from fdkit.errors import DataError, NumericsError
from fdkit.evaluation.features import Features, paired


def comparable(train: Features, test: Features) -> tuple[Features, Features]:
    """Both features as `paired` returns them, fit to learn classes from one and to be tested on the other.

    Raises what `paired` raises; DataError if images have no labels, if train has images of one class alone, or test
    of a class of which train has none; NumericsError if all training features are the same.
    """
    refuse_unlabelled(train, "training")
    refuse_unlabelled(test, "test")
    train, test = paired(train, test)
    num_images = torch.bincount(train.labels, minlength=len(train.classes))
    held = [name for name, count in zip(train.classes, num_images.tolist(), strict=True) if count]
    if len(held) < 2:
        raise DataError(
            f"all {len(train.labels)} training images are of class {held[0]}: there is nothing to tell apart",
            "give a folder with two classes or more",
        )
    missing = (num_images[test.labels.unique()] == 0).nonzero()[:, 0]
    if len(missing):
        names = ", ".join(train.classes[label] for label in test.labels.unique()[missing].tolist())
        raise DataError(
            f"{test.info.get('source', 'test')} has images of classes of which train has none: {names}",
            "add training images of them, or leave them out of test",
        )
    refuse_constant(train, "training")
    return train, test


def refuse_unlabelled(features: Features, name: str) -> None:
    """Raises DataError unless each of the `name` features has a label that is a position in its classes."""
    labels = features.labels
    source = features.info.get("source", name)
    if len(labels) != len(features.values):
        raise DataError(
            f"{source} has {len(features.values)} {name} images and {len(labels)} labels",
            "put the images of each class in a folder of its own",
        )
    wrong = int(((labels < 0) | (labels >= len(features.classes))).sum())
    if wrong:
        raise DataError(
            f"{wrong} of {len(labels)} {name} labels of {source} stand for none of its {len(features.classes)} classes"
        )


def refuse_constant(features: Features, name: str) -> None:
    """Raises NumericsError if two or more `name` features are all the same: a collapsed network."""
    values = features.values
    if len(values) > 1 and bool((values.amax(dim=0) == values.amin(dim=0)).all()):
        raise NumericsError(
            f"the {len(values)} {name} features are all the same: the network has collapsed, or was not loaded",
            "look at the training log, or at `fdkit doctor` for a teacher",
        )
