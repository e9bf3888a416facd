"""Removal of small or separate objects and filling of holes against loops over voxels, and as a verb."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk  # noqa: N813
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from PIL import Image

from nnunet_ssl.cli import main
from nnunet_ssl.evaluation.postprocessing import Cleaning, clean, read_cleaning

LABELS = {"background": 0, "heart": 1, "lung": 2, "ignore": 3}


def neighbors(place, shape, corners):
    for step in itertools.product((-1, 0, 1), repeat=len(shape)):
        if any(step) and (corners or sum(map(abs, step)) == 1):
            other = tuple(p + s for p, s in zip(place, step))
            if all(0 <= o < side for o, side in zip(other, shape)):
                yield other


def flood(mask, start, corners):
    found, todo = {start}, [start]
    while todo:
        for other in neighbors(todo.pop(), mask.shape, corners):
            if mask[other] and other not in found:
                found.add(other)
                todo.append(other)
    return found


def clean_by_hand(labels, voxel, smallest, filled, single=()):
    result = labels.copy()
    for value in single:
        reach = {p: len(flood(labels == value, p, corners=True)) for p in map(tuple, np.argwhere(labels == value))}
        for place, size in reach.items():
            if size < max(reach.values()):
                result[place] = 0
    for value, size in smallest.items():
        for place in map(tuple, np.argwhere(labels == value)):
            if len(flood(labels == value, place, corners=True)) * voxel < size:
                result[place] = 0
    for value in filled:
        outside = result != value
        reached = set()
        for place in map(tuple, np.argwhere(outside)):
            if any(p in (0, side - 1) for p, side in zip(place, labels.shape)) and place not in reached:
                reached |= flood(outside, place, corners=False)
        for place in map(tuple, np.argwhere(result == 0)):
            if place not in reached:
                result[place] = value
    return result


@pytest.mark.parametrize(("shape", "spacing"), [((14, 15), (1.0, 0.5)), ((7, 8, 9), (3.0, 1.0, 1.0))])
@pytest.mark.parametrize("seed", range(4))
def test_equals_loops_over_voxels(shape, spacing, seed):
    generator = np.random.default_rng(seed)
    labels = generator.choice(3, size=shape, p=[0.55, 0.35, 0.1]).astype(np.uint8)
    ring = tuple(slice(1, 6) for _ in shape)
    labels[ring] = 1
    labels[tuple(slice(2, 5) for _ in shape)] = 0
    labels[tuple(3 for _ in shape)] = 2
    before = labels.copy()
    smallest = {1: 4 * float(np.prod(spacing)), 2: 2.5 * float(np.prod(spacing))}
    asked = {(value,): size for value, size in smallest.items()}
    ours = clean(labels, spacing, Cleaning(asked, ((1,),), {}))
    expected = clean_by_hand(labels, float(np.prod(spacing)), smallest, [1])
    np.testing.assert_array_equal(ours, expected)
    assert (ours != labels).any()
    np.testing.assert_array_equal(labels, before)


@pytest.mark.parametrize("shape", [(14, 15), (7, 8, 9)])
@pytest.mark.parametrize("seed", range(3))
def test_the_largest_object_alone_stays(shape, seed):
    labels = np.random.default_rng(seed).choice(3, size=shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
    ours = clean(labels, (1,) * len(shape), Cleaning({}, (), {}, ((1,),)))
    np.testing.assert_array_equal(ours, clean_by_hand(labels, 1, {}, [], [1]))
    assert 0 < (ours == 1).sum() < (labels == 1).sum()
    np.testing.assert_array_equal(ours == 2, labels == 2)


def test_of_objects_of_equal_size_all_stay_and_an_empty_map_stays_empty():
    labels = np.zeros((8, 8), np.uint8)
    labels[0, 0:3] = labels[5, 2:5] = labels[7, 7] = 1
    only_largest = Cleaning({}, (), {}, ((1,), (2,)))
    cleaned = clean(labels, (1, 1), only_largest)
    assert cleaned[7, 7] == 0
    assert cleaned.sum() == 6
    assert not clean(np.zeros_like(labels), (1, 1), only_largest).any()


@pytest.mark.parametrize("names", [{"whole": [1, 2], "core": 2}, {"core": 2, "whole": [1, 2]}], ids=" ".join)
def test_of_nested_regions_the_inner_one_stays_where_the_outer_does(names):
    labels = np.zeros((12, 12), np.uint8)
    labels[0:6, 0:6] = 1
    labels[2, 2] = 2
    labels[9:12, 9:12] = 2
    regions = read_cleaning({"background": 0, **names}, None, None, [])
    cleaned = clean(labels, (1, 1), regions)
    assert cleaned[2, 2] == 2
    assert (cleaned > 0).sum() == 36


def test_each_step_alone():
    labels = np.zeros((9, 9), np.uint8)
    labels[1:6, 1:6] = 1
    labels[3, 3] = 0
    labels[7, 7] = 1
    labels[4, 4] = 2
    removed = clean(labels, (1, 1), Cleaning({(1,): 2.0}, (), {}))
    assert removed[7, 7] == 0
    assert (removed == labels).sum() == labels.size - 1
    filled = clean(labels, (1, 1), Cleaning({}, ((1,),), {}))
    assert filled[3, 3] == 1
    # Another structure in the hole stays, and an object of just the size too.
    assert filled[4, 4] == 2
    assert clean(labels, (1, 1), Cleaning({(1,): 1.0}, (), {}))[7, 7] == 1


def test_a_region_is_one_structure():
    labels = np.zeros((12, 12), np.uint8)
    labels[1:9, 1:9] = 1
    labels[3:5, 3:5] = 2
    labels[6, 6] = 0
    labels[10, 10] = 2
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    cleaned = clean(labels, (1, 1), read_cleaning(regions, ["whole=5"], ["whole"]))
    assert cleaned[3, 3] == 2
    assert cleaned[6, 6] == 1
    assert cleaned[10, 10] == 0
    assert (cleaned != labels).sum() == 2


def test_what_the_command_line_asks_for():
    names = {(1,): "heart", (2,): "lung"}
    assert read_cleaning(LABELS, ["50"], None) == Cleaning({(1,): 50, (2,): 50}, (), names)
    asked = read_cleaning(LABELS, ["50", "lung=20"], [])
    assert asked == Cleaning({(1,): 50, (2,): 20}, ((1,), (2,)), names)
    assert asked.describe() == "objects removed below heart 50, lung 20; holes filled in heart, lung"
    assert not read_cleaning(LABELS, None, None)
    single = read_cleaning(LABELS, None, None, ["lung"])
    assert single == Cleaning({}, (), names, ((2,),))
    assert single.describe() == "the largest object kept of lung"


def write_dataset_json(folder: Path, ending: str) -> None:
    content = {"channel_names": {"0": "x"}, "labels": LABELS, "numTraining": 1, "file_ending": ending}
    (folder / "dataset.json").write_text(json.dumps(content))


def test_the_verb_writes_cleaned_copies_and_lists_what_failed(tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    write_dataset_json(source, ".png")
    labels = np.zeros((20, 20), np.uint8)
    labels[2:9, 2:9] = 2
    labels[5, 5], labels[15, 15], labels[12, 2] = 0, 1, 2
    Image.fromarray(labels).save(source / "a.png")
    Image.fromarray(labels * (labels == 9)).save(source / "b.png")
    words = ["postprocess", "-i", str(source), "-o", str(target)]
    assert main([*words, "--remove-below", "heart=3", "--fill-holes"]) == 0
    cleaned = np.array(Image.open(target / "a.png"))
    assert cleaned[5, 5] == 2
    assert cleaned[15, 15] == 0
    assert main([*words, "--keep-largest", "lung"]) == 0
    kept = np.array(Image.open(target / "a.png"))
    assert (kept[12, 2], kept[15, 15]) == (0, 1)
    assert "2 label maps" in capsys.readouterr().out
    assert sorted(p.name for p in target.iterdir()) == ["a.png", "b.png"]

    (source / "a.png").write_bytes(b"broken")
    (target / "a.png").unlink()
    # The reader is chosen by the first file that can be read.
    (source / "a.png").rename(source / "c.png")
    assert main([*words, "--fill-holes"]) == 1
    assert "failed: " in capsys.readouterr().out
    assert not (target / "c.png").exists()


def test_tiff_files_keep_the_spacing_beside_them(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_dataset_json(source, ".tif")
    labels = np.zeros((6, 9, 9), np.uint8)
    labels[1:3, 1:4, 1:4] = 1
    labels[3, 8, 8] = 1
    Tiff3DIO().write_seg(labels, str(source / "t.tif"), {"spacing": [5.0, 1.0, 1.0]})
    # The lone voxel has 5 mm^3.
    assert main(["postprocess", "-i", str(source), "-o", str(tmp_path / "out"), "--remove-below", "6"]) == 0
    cleaned, properties = Tiff3DIO().read_seg(str(tmp_path / "out" / "t.tif"))
    assert properties["spacing"] == [5.0, 1.0, 1.0]
    assert cleaned[0, 3, 8, 8] == 0
    assert cleaned.sum() == 18
    assert main(["postprocess", "-i", str(source), "-o", str(tmp_path / "out"), "--remove-below", "5"]) == 0
    assert Tiff3DIO().read_seg(str(tmp_path / "out" / "t.tif"))[0].sum() == 19


def test_volumes_keep_their_geometry(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    write_dataset_json(source, ".nii.gz")
    labels = np.zeros((6, 12, 10), np.uint8)
    labels[1:4, 2:8, 2:8] = 1
    labels[5, 11, 9] = 1
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing((0.5, 1.0, 2.0))
    image.SetOrigin((3.0, -2.0, 7.0))
    sitk.WriteImage(image, str(source / "v.nii.gz"))
    # A voxel has 1 mm^3: the lone one goes below 2, the box of 108 stays.
    assert main(["postprocess", "-i", str(source), "-o", str(tmp_path / "out"), "--remove-below", "2"]) == 0
    written = sitk.ReadImage(str(tmp_path / "out" / "v.nii.gz"))
    assert written.GetSpacing() == image.GetSpacing()
    assert written.GetOrigin() == image.GetOrigin()
    values = sitk.GetArrayFromImage(written)
    assert values[5, 11, 9] == 0
    assert values.sum() == 108


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "Nothing to do"),
        (["--keep-largest", "liver"], "There is no structure 'liver'"),
        (["--fill-holes", "liver"], "There is no structure 'liver'; there are heart, lung"),
        (["--remove-below", "heart=big"], "expected SIZE or NAME=SIZE"),
        (["--remove-below", "-3"], "expected SIZE or NAME=SIZE"),
        (["--fill-holes", "--dataset-json", "nowhere.json"], "nowhere.json is missing"),
    ],
)
def test_bad_requests(tmp_path, capsys, words, message):
    source = tmp_path / "in"
    source.mkdir()
    write_dataset_json(source, ".png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(source / "a.png")
    assert main(["postprocess", "-i", str(source), "-o", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_input_folder_is_not_overwritten(tmp_path, capsys):
    write_dataset_json(tmp_path, ".png")
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "a.png")
    assert main(["postprocess", "-i", str(tmp_path), "-o", str(tmp_path), "--fill-holes"]) == 2
    assert "choose another" in capsys.readouterr().err
