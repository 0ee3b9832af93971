"""Pictures from files: every mode that files come in, and which prompt belongs to which picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from harness.errors import UserError
from harness.pictures import load_picture, read_pictures

RAMP = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3) * 2


def saved(path: Path, pixels: NDArray, mode: str | None = None, **options: object) -> Path:
    """The pixels as a file."""
    Image.fromarray(pixels, mode).save(path, **options)
    return path


def touch(folder: Path, *names: str) -> list[Path]:
    """Small pictures."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        saved(folder / name, RAMP)
    return [folder / name for name in names]


def test_rgb_is_read_as_it_is(tmp_path: Path) -> None:
    """A PNG of 8 bits gives its own pixels, rows first."""
    loaded = load_picture(saved(tmp_path / "a.png", RAMP))
    assert loaded.dtype == np.uint8
    np.testing.assert_array_equal(loaded, RAMP)


def test_greyscale_becomes_three_equal_channels(tmp_path: Path) -> None:
    """8 bits, 1 bit, and 16 bits, of which the nearest 8 are taken: 65535 is white, not everything above 255."""
    grey = RAMP[:, :, 0]
    for path in (saved(tmp_path / "a.png", grey), saved(tmp_path / "b.bmp", grey)):
        np.testing.assert_array_equal(load_picture(path), np.stack([grey] * 3, 2))
    bits = grey > 100
    np.testing.assert_array_equal(load_picture(saved(tmp_path / "c.png", bits)), np.stack([bits * 255] * 3, 2))
    deep = np.linspace(0, 65535, 35).reshape(5, 7).round().astype(np.uint16)
    for name in ("d.png", "e.tiff"):
        loaded = load_picture(saved(tmp_path / name, deep))
        np.testing.assert_array_equal(loaded, np.stack([np.rint(deep / 65535 * 255)] * 3, 2))


def test_transparency_is_shown_on_white(tmp_path: Path) -> None:
    """Colour c at opacity a is a c + (1 - a) 255; what lies under a transparent pixel does not matter."""
    alpha = np.tile(np.array([0, 1, 64, 128, 200, 254, 255], np.uint8), (5, 1))[:, :, None]
    expected = RAMP * (alpha / 255) + 255 * (1 - alpha / 255)
    loaded = load_picture(saved(tmp_path / "a.png", np.concatenate([RAMP, alpha], 2)))
    assert np.abs(loaded - expected).max() <= 1
    np.testing.assert_array_equal(loaded[:, 0], np.full((5, 3), 255))
    np.testing.assert_array_equal(loaded[:, 6], RAMP[:, 6])

    grey = load_picture(saved(tmp_path / "b.png", np.concatenate([RAMP[:, :, :1], alpha], 2), "LA"))
    assert np.abs(grey - expected[:, :, :1]).max() <= 1


def test_palettes_are_looked_up(tmp_path: Path) -> None:
    """An index becomes its colour; the index that is declared transparent becomes white."""
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    picture.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    picture.save(tmp_path / "a.png")
    picture.save(tmp_path / "b.png", transparency=1)
    np.testing.assert_array_equal(load_picture(tmp_path / "a.png")[0], [[10, 20, 30], [40, 50, 60]])
    np.testing.assert_array_equal(load_picture(tmp_path / "b.png")[0], [[10, 20, 30], [255, 255, 255]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_exif_says(tmp_path: Path, orientation: int) -> None:
    """The eight orientations of EXIF: after turning, the mark is at the top left and the picture stands upright."""
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255
    stored = {
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: upright.transpose(1, 0, 2), 6: np.rot90(upright), 7: np.rot90(upright.transpose(1, 0, 2), 2),
        8: np.rot90(upright, -1),
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", np.ascontiguousarray(stored), exif=exif)
    np.testing.assert_array_equal(load_picture(path), upright)


def test_jpeg_of_print_colours_becomes_rgb(tmp_path: Path) -> None:
    """White in cyan, magenta, yellow and black is no ink at all."""
    Image.new("CMYK", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.jpg")
    assert load_picture(tmp_path / "a.jpg").min() >= 254


def test_the_first_picture_of_a_camera_file(tmp_path: Path) -> None:
    """JPEGs that hold a preview behind the picture (MPO) are pictures, not animations."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=frames[1:])
    assert Image.open(tmp_path / "phone.jpg").format == "MPO"
    assert (load_picture(tmp_path / "phone.jpg") == 255).all()


def test_files_that_are_no_single_picture_are_explained(tmp_path: Path) -> None:
    """Text, an empty file, half a file, an animation, values without a range, and a missing file."""
    (tmp_path / "a.png").write_text("no picture")
    (tmp_path / "b.png").touch()
    noise = (np.arange(64 * 64 * 3) * 7919 % 256).astype(np.uint8).reshape(64, 64, 3)
    whole = saved(tmp_path / "whole.png", noise).read_bytes()
    (tmp_path / "c.png").write_bytes(whole[: len(whole) // 2])
    for name in ("a.png", "b.png", "c.png", "missing.png"):
        with pytest.raises(UserError, match=rf"{name} cannot be read as a picture: .*; leave it out"):
            load_picture(tmp_path / name)
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "d.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="has 2 frames"):
        load_picture(tmp_path / "d.gif")
    with pytest.raises(UserError, match=r"32-bit values \(F\)"):
        load_picture(saved(tmp_path / "e.tiff", np.ones((2, 2), np.float32)))


def test_folders_are_read_in_the_order_of_numbers(tmp_path: Path) -> None:
    """Nested folders too, other files not; what is named twice comes once."""
    touch(tmp_path, "10.png", "9.PNG", "b/1.jpg")
    (tmp_path / "notes.txt").write_text("no picture")
    found = read_pictures([tmp_path / "10.png", tmp_path], "a fox")
    assert [picture.path.relative_to(tmp_path).as_posix() for picture in found] == ["10.png", "9.PNG", "b/1.jpg"]
    assert {picture.prompt.text for picture in found} == {"a fox"}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_prompts_are_found_by_the_end_of_the_path(tmp_path: Path, suffix: str) -> None:
    """The longest fit counts; quotation marks, commas and other alphabets stay; other keys are labels."""
    paths = touch(tmp_path, "a/1.png", "b/1.png", "c/2.png")
    rows = [
        {"file": "1.png", "prompt": 'a "fox", red', "object": "fox"},
        {"file": "./b/1.png", "prompt": "ein Fuchs im Schnee ❄", "object": "狐"},
        {"file": str(tmp_path / "c" / "2.png"), "prompt": "", "object": "owl"},
        {"file": "elsewhere.png", "prompt": "a crab", "object": "crab"},
    ]
    file = tmp_path / f"prompts{suffix}"
    if suffix == ".csv":
        quoted = [",".join('"' + row[key].replace('"', '""') + '"' for key in row) for row in rows]
        file.write_bytes(("\ufeff" + "\r\n".join(["file,prompt,object", *quoted]) + "\r\n").encode())
    else:
        file.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    found = [picture.prompt for picture in read_pictures(paths, file)]
    assert [prompt.text for prompt in found] == ['a "fox", red', "ein Fuchs im Schnee ❄", ""]
    assert [prompt.metadata for prompt in found] == [{"object": "fox"}, {"object": "狐"}, {"object": "owl"}]
    assert len({prompt.id for prompt in found}) == 3


def test_relative_paths_meet_absolute_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file named in two ways."""
    touch(tmp_path, "a/1.png")
    (tmp_path / "p.jsonl").write_text(json.dumps({"file": str(tmp_path / "a" / "1.png"), "prompt": "a fox"}))
    monkeypatch.chdir(tmp_path)
    assert read_pictures([Path("a")], tmp_path / "p.jsonl")[0].prompt.text == "a fox"


def test_lines_of_text_belong_to_pictures_in_turn(tmp_path: Path) -> None:
    """As many lines as pictures; an empty line is an empty prompt."""
    paths = touch(tmp_path, "2.png", "10.png", "11.png")
    (tmp_path / "p.txt").write_text("a fox\n\na crab\n")
    assert [p.prompt.text for p in read_pictures([tmp_path], tmp_path / "p.txt")] == ["a fox", "", "a crab"]
    with pytest.raises(UserError, match="has 3 lines for 2 pictures"):
        read_pictures(paths[:2], tmp_path / "p.txt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.csv", b"file,prompt\nb.png,a fox\n", "has no prompt for .*a.png; add a line"),
        ("p.csv", b"name,text\na.png,a fox\n", "line 2: needs a file and a prompt"),
        ("p.csv", b"file,prompt\na.png,a fox, red\n", "line 2: other columns than the first line"),
        ("p.csv", b"file,prompt\na.png\n", "line 2: other columns than the first line"),
        ("p.csv", b'file,prompt\na.png,"a fox\n', "no CSV"),
        ("p.csv", b"file,prompt\na.png,x\n./a.png,y\n", "line 3: ./a.png comes twice"),
        ("p.csv", b"\xff", "is not UTF-8"),
        ("p.jsonl", b'{"file": "a.png", "prompt": "x"}\n{"file"', "line 2: not JSON"),
        ("p.jsonl", b"[]", "line 1: needs an object"),
        ("p.jsonl", b'{"file": "a.png", "prompt": 3}', "line 1: needs a file and a prompt"),
        ("p.yaml", b"", "come in a .csv file .* not .yaml"),
        ("missing.csv", None, "cannot read the prompts .*missing.csv: No such file"),
    ],
)
def test_prompts_that_cannot_be_used_are_explained(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    """Which line, and what to do."""
    (picture,) = touch(tmp_path, "a.png")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pictures([picture], tmp_path / name)


def test_missing_pictures_are_explained(tmp_path: Path) -> None:
    """No such path, a folder without pictures, nothing at all, and no word about prompts."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"there is no picture or folder .*missing"):
        read_pictures([tmp_path / "missing"], "a fox")
    with pytest.raises(UserError, match="empty holds no pictures"):
        read_pictures([tmp_path / "empty"], "a fox")
    with pytest.raises(UserError, match="no pictures are given"):
        read_pictures([], "a fox")
    with pytest.raises(UserError, match="what are the pictures of"):
        read_pictures(touch(tmp_path, "a.png"), None)
