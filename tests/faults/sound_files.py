"""Small sound files of every kind that fdkit reads, as fdkit, its peers and the hub write them; to be damaged."""

import hashlib
import io
import json
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from faults.broken_images import saved
from PIL import Image
from torch import Tensor

HUB_SIZES: dict[str, dict[str, Any]] = {
    "timm": {
        "architecture": "vit_tiny_patch16_224",
        "num_classes": 3,
        "model_args": {"depth": 1, "embed_dim": 12, "num_heads": 3, "img_size": 32},
        "pretrained_cfg": {
            "input_size": [3, 32, 32],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.2, 0.1],
            "license": "apache-2.0",
        },
    },
    "open_clip": {},
    "transformers": {
        "model_type": "vit",
        "hidden_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "intermediate_size": 768,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "image_size": 32,
        "patch_size": 16,
    },
}
"""What the config.json of a folder from the hub says, by whose it is."""


def picture(seed: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 11, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), kind)


def write_tar(path: Path, members: dict[str, bytes], form: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def make_archives(folder: Path) -> None:
    """Archives of class folders, of WebDataset's samples with .cls and with .json, and one of long names."""
    write_tar(folder / "folders.tar", {f"{'cat' if n % 2 else 'dog'}/{n}.png": picture(n) for n in range(5)})
    samples: dict[str, bytes] = {}
    for number in range(4):
        samples |= {f"{number:03d}.jpg": picture(number, "JPEG"), f"{number:03d}.cls": b"%d" % (number % 2)}
    write_tar(folder / "samples.tar", samples)
    labels: dict[str, bytes] = {}
    for number in range(4):
        content = {"label": number % 3, "width": 11, "caption": "a thing", "more": [1, {"x": None}]}
        labels |= {f"s/{number}.png": picture(number), f"s/{number}.json": json.dumps(content).encode()}
    write_tar(folder / "json.tar", labels, tarfile.PAX_FORMAT)
    long = "l" * 120
    write_tar(
        folder / "long.tar", {f"{long}/{long}{n}.png": picture(n) for n in range(3)}, tarfile.GNU_FORMAT
    )


def make_index(folder: Path) -> None:
    """An archive whose index is kept in cache/."""
    from fdkit.data.tar_source import open_tars

    write_tar(folder / "folders.tar", {f"{'cat' if n % 2 else 'dog'}/{n}.png": picture(n) for n in range(5)})
    open_tars(str(folder / "folders.tar"))


def make_pack(folder: Path) -> None:
    """Packed images, and beside them the shard and the records of a packing that is not done."""
    from fdkit.data.pack import Job, Settings, write_json, write_shard
    from fdkit.data.sources import FolderSource

    for number in range(4):
        path = folder / "images" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number))
    source, packed, packing = FolderSource(folder / "images"), folder / "packed", folder / "packing"
    (packing / ".packing").mkdir(parents=True)
    record = write_shard(source, Job("shard-00000.tar", "all", np.arange(4)), Settings(20, 90, 4, 3), packing)
    plan = {"seed": 3, "short_side": 20}
    write_json(packing / ".packing" / "plan.json", plan)
    packed.mkdir()
    shutil.copy(packing / "shard-00000.tar", packed)
    write_json(
        packed / "fdkit-pack.json", {"classes": list(source.classes), "shards": [record], "plan": plan}
    )


def _features() -> tuple[Any, Any]:
    from fdkit.teachers.feature_cache import Crop, Layout

    return Layout(4, 2, 3, "fp16"), [Crop(view, image, 7 * image) for view in range(2) for image in range(4)]


FEATURES = _features()
CONTENTS = [bytes([number]) * (FEATURES[0].record_bytes - 16) for number in range(8)]


def make_feature_cache(folder: Path) -> None:
    """All records of a small cache, and the journal of a batch that was not put in place."""
    import struct

    from fdkit.teachers.feature_cache import MARK, FeatureCache

    layout, crops = FEATURES
    FeatureCache(folder, layout).fill(crops, CONTENTS)
    entry = struct.pack("<Q4sIII", crops[5].view << 40 | crops[5].image, MARK, 1, 2, 0)
    (folder / "journal-host-1").write_bytes(struct.pack("<I", zlib.crc32(entry)) + entry)


def make_store(folder: Path) -> tuple[Tensor, Tensor]:
    """Features (6, 4) of six images, one of them unreadable, from the store or made anew."""
    from fdkit.evaluation._store import FeatureStore
    from fdkit.evaluation.features import Rows

    def make(indices: np.ndarray) -> Iterator[Rows]:
        there = torch.from_numpy(indices[indices != 2])
        yield Rows(indices=there, values=torch.arange(24.0).reshape(6, 4)[there])

    return FeatureStore(folder / "cache", {"model": "x"}, num_images=6, width=4).fill(make)


def make_checkpoint(folder: Path) -> None:
    """Three checkpoints of a student, of which the last is in two parts."""
    from fdkit.teachers.shards import SHARDS_FILE, part_name
    from fdkit.training.checkpoint import Checkpoint, save_checkpoint

    for step in (1, 2, 3):
        model = {"student.network.a": torch.full((2, 3), float(step)), "student.network.b": torch.ones(2)}
        tensors = {"model": model, "optimizer": {"state.0.exp_avg": torch.ones(2, 3)}}
        content = Checkpoint(tensors, {"step": step, "seed": 0})
        path = save_checkpoint(folder / "checkpoints", step, content, keep=3)
    whole = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for number in range(2):
        part = {"student.network.a": whole["student.network.a"][number : number + 1].clone()}
        part |= {"student.network.b": whole["student.network.b"]} if number == 0 else {}
        safetensors.torch.save_file(part, path / part_name("model", number, 2))
    (path / SHARDS_FILE).write_text(json.dumps({"model": {"student.network.a": [0, 1, 2]}, "optimizer": {}}))
    sign(path)


def sign(path: Path) -> None:
    """Give a checkpoint the manifest of what its files are now."""
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    files = {name: (path / name).read_bytes() for name in sorted(names)}
    facts = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()
    }
    manifest = {"step": int(path.name.removeprefix("step-")), "files": facts}
    (path / "manifest.json").write_text(json.dumps(manifest))


def make_run(folder: Path, command: Callable[[list[str]], object]) -> Path:
    """A small distillation, with a result of kNN and an analysis of its student."""
    from faults.jobs import distill

    command([*distill("--train.epochs", "0.5", "--student.width", "12"), "--output", str(folder)])
    kept = ["--cache", "none", "--device", "cpu"]
    result = ["--output", str(folder / "results" / "knn-test.json")]
    command(["evaluate", "knn", str(folder), "--data", "digits", *kept, *result])
    made = ["--num-images", "8", "--output", str(folder / "results"), "--device", "cpu"]
    for analysis in ("cka", "attention-distance"):
        command(["analyze", analysis, str(folder), "--data", "digits", *made])
    for path in (folder / "checkpoints").rglob("*.safetensors"):  # which no reader of the rest asks for
        path.unlink()
    numbers = {"verdict": "It helped.", "candidates": [], "comparisons": [{"sentence": "Better."}]}
    (folder / "compare.json").write_text(json.dumps(numbers))
    segmented = {
        "miou": 0.5,
        "evaluator": "segmentation",
        "command": {"model": "m"},
        "per_class": [0.1, None],
    }
    (folder / "results" / "segmentation-test.json").write_text(json.dumps(segmented))
    return folder


def make_hub_folder(folder: Path, *, kind: str) -> None:
    """A model as it lies on the hub: config.json, a file of weights, a card."""
    import timm

    config = HUB_SIZES[kind]
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: some-licence\n---\n# A model\n")
    if kind == "open_clip":
        import open_clip

        description = {
            "model_cfg": open_clip.get_model_config("ViT-B-32"),
            "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.2] * 3},
        }
        (folder / "open_clip_config.json").write_text(json.dumps(description))
        (folder / "open_clip_model.safetensors").write_bytes(b"")
        return
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    if kind == "timm":
        args = {**config["model_args"], "num_classes": 3}
        state = timm.create_model("vit_tiny_patch16_224", **args).state_dict()
    else:
        sizes = {"depth": 1, "embed_dim": 192, "img_size": 32, "num_classes": 0}
        state = _renamed(timm.create_model("vit_tiny_patch16_224", **sizes).state_dict())
        stated = {"do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3}
        (folder / "preprocessor_config.json").write_text(json.dumps(stated))
    safetensors.torch.save_file(state, folder / "model.safetensors")


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A plain ViT's tensors under the names of transformers."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
        "norm.": "layernorm.",
        "blocks.0.norm1.": "encoder.layer.0.layernorm_before.",
        "blocks.0.norm2.": "encoder.layer.0.layernorm_after.",
        "blocks.0.attn.proj.": "encoder.layer.0.attention.output.dense.",
        "blocks.0.mlp.fc1.": "encoder.layer.0.intermediate.dense.",
        "blocks.0.mlp.fc2.": "encoder.layer.0.output.dense.",
    }
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        start = next((name for name in names if key.startswith(name)), None)
        if start is not None:
            found[names[start] + key.removeprefix(start)] = value
            continue
        leaf = key.rpartition(".")[2]
        for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
            found[f"encoder.layer.0.attention.attention.{name}.{leaf}"] = part.clone()
    return found


def make_weights(folder: Path) -> None:
    """A file of weights of every container that is read."""
    from faults.weight_files import whole_weights

    endings = {
        "PyTorch zip": "pth",
        "PyTorch pickle": "pkl",
        "TorchScript": "pt",
        "safetensors": "safetensors",
    }
    for name, data in whole_weights().items():
        (folder / f"weights-{name.replace(' ', '-')}.{endings[name]}").write_bytes(data)


def make_text_files(folder: Path) -> None:
    """Names of classes in each form, a recipe, notes of a download, stored features, the manifest of a cache."""
    (folder / "classes.txt").write_text("cat\ndog\nhorse\n")
    (folder / "listed").mkdir()
    names = {"0": "cat", "1": "dog", "2": "horse"}
    (folder / "listed" / "classes.json").write_text(json.dumps(names))
    (folder / "ade").mkdir()
    table = "Idx\tRatio\tName\n1\t0.1\twall\n2\t0.1\tbuilding, edifice\n"
    (folder / "ade" / "objectInfo150.txt").write_text(table)
    recipe = "teacher: demo\ndata: digits\ntrain:\n  batch_size: 8\n  epochs: 2\noptim:\n  lr: 1e-3\n"
    (folder / "recipe.yaml").write_text(recipe)
    note = {"url": "https://x/y", "validator": '"abc"', "total": 12}
    (folder / "file.json").write_text(json.dumps(note))
    tensors = {"mean": torch.ones(4), "components": torch.ones(2, 4)}
    safetensors.torch.save_file(tensors, folder / "pca.safetensors")
    manifest = {
        "key": {"format": 1, "pca": 2, "dtype": "fp16"},
        "names": {"teacher.weights": "demo"},
        "form": {"num_tokens": 5, "width": 4, "has_class_token": True, "grid": [2, 2]},
        "stored": {"cosine": 0.99, "relative": 0.01},
        "components_sha256": hashlib.sha256((folder / "pca.safetensors").read_bytes()).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    from fdkit.teachers.diagnosis import golden_feature
    from fdkit.teachers.loading import load_teacher

    golden = {"known": golden_feature(load_teacher("demo"), torch.device("cpu"))}
    (folder / "golden.json").write_text(json.dumps(golden))
