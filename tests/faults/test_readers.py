"""Damaged files of every kind that is read: read or refused in words, never read as what they are not."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from faults.readers import all_readers, fuzz_readers
from faults.sound_files import CONTENTS, FEATURES, make_feature_cache, make_store, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fdkit.data.decode import BadImage
from fdkit.data.json_file import parse_json, read_object
from fdkit.data.tar_source import open_tars
from fdkit.errors import ConfigError, FdkitError, WeightsError

OWN = settings(
    max_examples=200,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
QUICK = (
    "tar archives", "kept index of an archive", "manifest of packed images", "manifest, packed again",
    "records of packing", "teacher cache: records", "evaluation store", "checkpoints", "checkpoints of another hand",
    "hub folder of timm", "weights", "names of classes, recipes, notes",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FDKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    result = fuzz_readers(tmp_path, amount=150, seed=0, names=QUICK)
    assert result["failures"] == []
    assert set(result["executions"]) == set(QUICK)
    assert result["tried"] >= 145
    assert result["refused"] > 30


@pytest.mark.long
def test_many_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    """Those of a run folder, too: run.json, metrics, results, what builds the student, and the page of a report."""
    result = fuzz_readers(tmp_path, amount=1200, seed=1)
    assert result["failures"] == []
    assert result["executions"].keys() == {reader.name for reader in all_readers(tmp_path)}
    assert result["refused"] > 300


def test_the_trial_sees_what_is_read_wrongly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that believes every record, one that raises anything, and one that never ends are failures."""
    from fdkit.teachers import feature_cache

    monkeypatch.setattr(feature_cache, "_checksum", lambda crop, content: 0)
    result = fuzz_readers(tmp_path / "a", amount=30, seed=0, names=("teacher cache: records",))
    assert any("other features than were stored" in words for words in result["failures"])
    monkeypatch.undo()
    monkeypatch.setattr(
        "fdkit.data.packed.read_object",
        lambda path: value if isinstance((value := read_object(path)).get("classes"), list) else 1 / 0,
    )
    result = fuzz_readers(tmp_path / "b", amount=60, seed=0, names=("manifest of packed images",))
    assert any("ZeroDivisionError" in words for words in result["failures"])


# -- our own binary readers, by hypothesis, which shrinks what it finds


@given(
    flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(1, 255)), min_size=1, max_size=8),
    cut=st.none() | st.integers(0, 600),
    name=st.sampled_from(["records-00000.bin", "journal-host-1"]),
)
@settings(OWN, max_examples=60)
def test_a_damaged_record_is_never_given_as_features(
    flips: list[tuple[int, int]], cut: int | None, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from fdkit.teachers.feature_cache import FeatureCache

    folder = tmp_path_factory.mktemp("records")
    make_feature_cache(folder)
    data = bytearray((folder / name).read_bytes())
    for place, flip in flips:
        data[place % len(data)] ^= flip
    (folder / name).write_bytes(data[:cut])
    layout, crops = FEATURES
    cache = FeatureCache(folder, layout)
    cache.recover()
    for crop, content in zip(crops, CONTENTS, strict=True):
        found, state = cache.read(crop)
        assert (found == content) == (state == "sound")
    assert cache.fill(crops, CONTENTS) == CONTENTS
    assert [cache.read(crop) for crop in crops] == [(content, "sound") for content in CONTENTS]


TAR_NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=130
) | st.sampled_from(
    [
        "../../up.jpg",
        "/abs.jpg",
        "a/b.png",
        "train/c/1.png",
        "1.cls",
        "1.json",
        "1.jpg",
        ".hidden.jpg",
        "..",
        "a\nb.gif",
    ]
)
MEMBERS = st.tuples(
    TAR_NAMES,
    st.sampled_from(["0", "1", "2", "3", "4", "5", "6", "7", "L", "K", "S", "x", "g", "\0", "Z"]),
    st.sampled_from([b"", b"3", b"{}", b'{"label": 1}', b"x" * 700, picture(1)]),
    st.none() | st.sampled_from([0, 1, 511, 513, 1 << 20, 1 << 33]),
)


@given(
    members=st.lists(MEMBERS, max_size=4),
    form=st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    end=st.sampled_from([0, 512, 1024, 10240]),
    flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), max_size=2),
)
@OWN
def test_any_headers_of_a_tar_are_read_or_refused(
    members: list[tuple[str, str, bytes, int | None]],
    form: int,
    end: int,
    flips: list[tuple[int, int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Names, kinds and sizes of any sort, sizes that lie, and a byte or two changed."""
    data = bytearray()
    for name, kind, content, stated in members:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = (
            kind.encode(),
            len(content) if stated is None else stated,
            "../../x",
        )
        try:
            data += info.tobuf(form)
        except ValueError:  # a name that this form cannot hold
            continue
        data += content + bytes(-len(content) % 512)
    data += bytes(end)
    for place, flip in flips:
        if data:
            data[place % len(data)] ^= flip
    path = tmp_path_factory.mktemp("tar") / "shard.tar"
    path.write_bytes(data)
    refusals: list[str] = []
    try:
        source = open_tars(str(path))
        for index in range(len(source)):
            assert source.describe(index).isprintable()
            try:
                assert source.read(index).mode == "RGB"
            except BadImage as bad:
                refusals.append(str(bad))
    except FdkitError as refused:
        refusals.append(str(refused).replace("\n  ", " "))
    assert all(words.isprintable() for words in refusals)
    assert [entry.name for entry in path.parent.iterdir()] == ["shard.tar"]


# -- what the trials found, one by one


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 6000, "{", "", "\ufeff{}"])
def test_text_that_is_no_json_is_refused_in_one_way(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


@pytest.mark.parametrize("content", [b"[]", b"3", b"\xff", b"null"])
def test_what_is_no_object_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"holds a|decode"):
        read_object(tmp_path / "a.json")


def test_a_damaged_mark_of_an_image_gives_it_no_features_of_another(tmp_path: Path) -> None:
    """One image's mark moved to the next: as many rows as before, of other images."""
    make_store(tmp_path)
    (marks,) = tmp_path.glob("cache/*/done.u8")
    data = bytearray(marks.read_bytes())
    assert data == bytes([1, 1, 2, 1, 1, 1])
    data[2], data[3] = 1, 2
    marks.write_bytes(data)
    values, indices = make_store(tmp_path)
    assert indices.tolist() == [0, 1, 3, 4, 5]
    assert torch.equal(values, torch.arange(24.0).reshape(6, 4)[indices])


def test_a_run_whose_last_loss_was_not_finite_can_be_reported(tmp_path: Path) -> None:
    from fdkit.report.run_sections import read_run, run_sections

    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None, "lr": "x"}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run_sections([read_run("it", tmp_path)])[1].paragraphs[0]
    assert "step 1, with a loss of 2" in said


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("preprocessing", "mean"), [0.5], "preprocessing.mean"),
        (("preprocessing", "std"), [0.0, 1, 1], "preprocessing.std"),
        (("preprocessing", "image_size"), "32", "preprocessing.image_size"),
        (("preprocessing", "crop_ratio"), 1e999, "preprocessing.crop_ratio"),
        (("preprocessing", "interpolation"), "none", "preprocessing.interpolation"),
        (("preprocessing",), [], "preprocessing"),
        (("model_args",), [1], "model_args"),
        (("architecture",), None, "architecture"),
        (("library",), "other", "library"),
        (("classes",), "cat", "classes"),
        (("model_args", "depth"), 10**9, "too deep"),
        (("model_args", "embed_dim"), "wide", "refuses"),
        (("model_args", "num_heads"), 0, "refuses"),
        (("model_args", "layer_norm_eps"), "x", "refuses"),
    ],
)
def test_a_recipe_of_a_model_that_cannot_be_is_refused(
    place: tuple[str, ...], value: object, said: str, tmp_path: Path
) -> None:
    from fdkit.models.libraries import build_timm, load_backbone, save_backbone

    save_backbone(build_timm("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 12, "img_size": 32}), tmp_path)
    recipe = json.loads((tmp_path / "student.json").read_text())
    holder = recipe
    for name in place[:-1]:
        holder = holder[name]
    holder[place[-1]] = value
    (tmp_path / "student.json").write_text(json.dumps(recipe))
    with pytest.raises((WeightsError, ConfigError), match=said):
        load_backbone(tmp_path)


def test_no_array_is_read_with_its_pickled_objects() -> None:
    """numpy runs what is pickled in an array if it may; it may nowhere."""
    root = Path(__file__).parents[2] / "fdkit"
    lines = [line for path in root.rglob("*.py") for line in path.read_text().splitlines()]
    loading = [line for line in lines if "np.load(" in line or "numpy.load(" in line]
    assert len(loading) == 1
    assert all("allow_pickle=False" in line for line in loading)
    assert not [line for line in lines if "allow_pickle=True" in line or "weights_only=False" in line]


def test_objects_in_a_kept_array_are_not_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fdkit.data import cache

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "owned",)  # type: ignore[return-value]

    cache.write_arrays("tars", "name", "key", {"a": np.arange(3)})
    (path,) = cache.cache_folder("tars").iterdir()
    buffer = io.BytesIO()
    np.savez(buffer, key=np.frombuffer(b"key", np.uint8), a=np.array([Evil()], dtype=object))
    path.write_bytes(buffer.getvalue())
    assert cache.read_arrays("tars", "name", "key") is None
    assert not (tmp_path / "owned").exists()
    with np.load(path, allow_pickle=True) as arrays:  # the trap works
        arrays["a"]
    assert (tmp_path / "owned").exists()
