"""Images that are decoded when they are asked for: the same pixels, whoever decodes them and when."""

import copy
import gc
import logging
import multiprocessing
import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fedamm_pl.data.client import BatchLoader
from fedamm_pl.data.sources import ReadOptions, decoded, decoding
from fedamm_pl.data.sources.image_files import ImageFiles, open_images, read_images
from fedamm_pl.data.sources.listing import PassedOver
from fedamm_pl.data.sources.source import Source, content

NUMBER = 40
LAZY, HELD = ReadOptions(in_memory=False), ReadOptions(in_memory=True)


def picture(seed: int, height: int = 12, width: int = 10) -> Image.Image:
    """A smooth picture with much of what tells one from another."""
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """40 files of 12 x 10 pixels, PNG and JPEG."""
    root = tmp_path_factory.mktemp("pictures")
    found = [root / f"{i % 3}" / f"{i}.{'png' if i % 2 else 'jpg'}" for i in range(NUMBER)]
    for i, path in enumerate(found):
        path.parent.mkdir(exist_ok=True)
        picture(i).save(path)
    return found


def lazy(paths: list[Path], **options: object) -> ImageFiles:
    (source,) = read_images(
        [paths],
        root=paths[0].parents[1],
        options=ReadOptions(in_memory=False, **options),  # type: ignore[arg-type]
    )
    assert isinstance(source, ImageFiles)
    assert isinstance(source, Source)
    return source


def held(paths: list[Path], **options: object) -> Tensor:
    (source,) = read_images(
        [paths],
        root=paths[0].parents[1],
        options=ReadOptions(in_memory=True, **options),  # type: ignore[arg-type]
    )
    assert isinstance(source, Tensor)
    return source


@pytest.fixture
def threads() -> Iterator[None]:
    """Leaves torch with as many threads as before."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# The same pixels


@pytest.mark.parametrize("image_size", [None, 7, (16, 5)])
def test_pixels_are_those_of_images_in_memory(paths: list[Path], image_size: object) -> None:
    files, images = lazy(paths, image_size=image_size), held(paths, image_size=image_size)
    assert (files.shape, files.dtype, files.device, len(files)) == (images.shape, images.dtype, images.device, NUMBER)
    assert torch.equal(files[:], images)
    some = torch.tensor([3, 3, 39, 0])
    for taken in (some, some.tolist(), slice(5, 9), slice(0, 0), 7, -1, torch.arange(NUMBER) % 2 == 0):
        assert torch.equal(files[taken], images[taken])
    chunks = [torch.arange(9), torch.tensor([], dtype=torch.int64), some]
    assert [*map(torch.Tensor.tolist, files.stream(chunks))] == [images[chunk].tolist() for chunk in chunks]
    with pytest.raises(IndexError):
        files[torch.tensor([NUMBER])]


def test_subset_is_the_source_of_its_images_and_shares_the_list(paths: list[Path]) -> None:
    files = lazy(paths)
    part = files.subset(torch.tensor([5, 30, 2])).subset(torch.tensor([2, 0]))
    assert torch.equal(part[:], files[torch.tensor([2, 5])])
    assert part.shape == (2, 3, 12, 10)
    assert isinstance(part, ImageFiles)
    assert part.names is files.names


def test_parts_have_one_form(paths: list[Path], tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    picture(0).convert("L").save(grey)
    assert [part.shape[1] for part in read_images([[grey], paths], root=tmp_path, options=LAZY)] == [3, 3]
    assert [tuple(part.shape) for part in read_images([[grey], [], [grey]], root=tmp_path, options=LAZY)] == [
        (1, 1, 12, 10),
        (0, 1, 12, 10),
        (1, 1, 12, 10),
    ]


@pytest.mark.usefixtures("threads")
def test_number_of_threads_changes_no_bit(paths: list[Path]) -> None:
    found = []
    for number in (1, 3, 8):
        torch.set_num_threads(number)
        found.append(torch.cat([*lazy(paths, image_size=9).stream(torch.arange(NUMBER).split(7))]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_batches_are_the_same(paths: list[Path]) -> None:
    labels, mine = torch.arange(NUMBER) % 4, torch.arange(3, 38)
    loaders = [BatchLoader(source, labels, mine, 8, "crop_flip", 5) for source in (lazy(paths), held(paths))]
    for first, second in zip(*loaders, strict=True):
        assert torch.equal(first[0], second[0])
        assert torch.equal(first[1], second[1])


def test_small_images_are_kept_in_memory_and_many_are_not(
    paths: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = paths[0].parents[1]
    assert decoded.IN_MEMORY_UP_TO == 2**30
    for bound, kind in ((NUMBER * 360, Tensor), (NUMBER * 360 - 1, ImageFiles)):
        monkeypatch.setattr(decoded, "IN_MEMORY_UP_TO", bound)
        with caplog.at_level(logging.INFO):
            (source,) = read_images([paths], root=root, options=ReadOptions())
        assert isinstance(source, kind)
    assert caplog.messages == [
        f"40 images of 10 x 12 pixels in {root} are decoded on demand; in memory they would take 0.0 MB"
    ]


# The size that is asked for


def test_image_is_covered_and_cropped_in_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, 8:16] = (10, 20, 30)
    Image.fromarray(stripes).save(tmp_path / "lying.png")
    Image.fromarray(stripes.swapaxes(0, 1).copy()).save(tmp_path / "standing.png")
    for name in ("lying", "standing"):
        images = held([tmp_path / f"{name}.png"], image_size=8)
        assert images.shape == (1, 3, 8, 8)
        assert (images == torch.tensor([10, 20, 30])[:, None, None]).all()
    assert (
        held([tmp_path / "lying.png"], image_size=(4, 4))[0, :, :, 1:3] == torch.tensor([10, 20, 30])[:, None, None]
    ).all()
    assert held([tmp_path / "lying.png"], image_size=(30, 2)).shape == (1, 3, 30, 2)


def test_scaling_is_antialiased_bilinear(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "0.png")
    images = held([tmp_path / "0.png"], image_size=10)
    whole = torch.nn.functional.interpolate(
        torch.from_numpy(values).permute(2, 0, 1)[None].double(), (10, 15), mode="bilinear", antialias=True
    )
    # 15 columns have no middle ten: half a pixel of the result is three of the image
    middle = torch.nn.functional.interpolate(
        torch.from_numpy(values[:, 10:50].copy()).permute(2, 0, 1)[None].double(),
        (10, 10),
        mode="bilinear",
        antialias=True,
    )
    assert (images.double() - middle)[..., 1:-1].abs().max() <= 1
    assert (images.double().mean() - whole.mean()).abs() < 2


def test_image_of_that_size_is_left_as_it_is(paths: list[Path]) -> None:
    assert torch.equal(held(paths, image_size=(12, 10)), held(paths))


def test_images_of_all_sizes_become_one(tmp_path: Path) -> None:
    sizes = [(1, 1), (3, 200), (200, 3), (64, 48), (333, 1000)]
    for i, size in enumerate(sizes):
        picture(i, *size).save(tmp_path / f"{i}.png")
    found = [tmp_path / f"{i}.png" for i in range(len(sizes))]
    assert held(found, image_size=(16, 24)).shape == (5, 3, 16, 24)
    with pytest.raises(
        ValueError, match=r"one size, 1 x 1 like 0\.png, got 200 x 3 for .*1\.png: --data\.image_size brings"
    ):
        held(found)


def test_narrow_strip_takes_no_memory_of_its_blown_up_self(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (60_000, 1)).save(tmp_path / "0.png")
    made = []
    resize = Image.Image.resize

    def noting(image: Image.Image, size: tuple[int, int], *arguments: object) -> Image.Image:
        made.append(size)
        return resize(image, size, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Image.Image, "resize", noting)
    assert held([tmp_path / "0.png"], image_size=32).shape == (1, 1, 32, 32)
    assert made == [(32, 32)]


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("image_size", [50, (40, 80)])
def test_large_photograph_is_decoded_smaller_and_looks_the_same(
    tmp_path: Path, orientation: int, image_size: int | tuple[int, int]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for suffix in ("jpg", "png"):  # a PNG is decoded whole
        picture(1, 900, 1300).save(tmp_path / f"0.{suffix}", exif=exif, **({"quality": 95} if suffix == "jpg" else {}))
    sizes = []
    load = decoding._seen

    def noting(image: Image.Image, *arguments: object) -> np.ndarray:
        sizes.append(image.size)
        return load(image, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_seen", noting)
        small, whole = (held([tmp_path / f"0.{suffix}"], image_size=image_size) for suffix in ("jpg", "png"))
    assert sizes[1] == (1300, 900)
    assert max(sizes[0]) < 1300
    assert min(sizes[0]) >= 2 * 50
    assert (small.int() - whole.int()).abs().max() <= 6


@pytest.mark.parametrize("seed", range(3))
def test_grey_jpeg_in_colour_data_is_the_same_reduced(tmp_path: Path, seed: int) -> None:
    picture(seed, 640, 640).convert("L").save(tmp_path / "0.jpg", quality=95)
    picture(seed, 16, 16).save(tmp_path / "1.png")
    grey = held([tmp_path / "0.jpg"], image_size=16)
    both = held([tmp_path / "0.jpg", tmp_path / "1.png"], image_size=16)
    assert torch.equal(both[0], grey[0].expand(3, -1, -1))


# Ahead, and no further


def test_stream_decodes_ahead_and_no_further(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    decode = ImageFiles._decode

    def noting(files: ImageFiles, rows: list[int], images: np.ndarray) -> None:
        begun.extend(rows)
        decode(files, rows, images)

    monkeypatch.setattr(ImageFiles, "_decode", noting)
    monkeypatch.setattr(decoded, "num_threads", lambda: 1)
    monkeypatch.setattr(decoded, "IMAGES", 4)
    files = lazy(paths)
    stream = files.stream(torch.arange(NUMBER).split(5))
    assert begun == []
    for step in range(3):
        next(stream)
        deadline = time.monotonic() + 30
        while len(begun) < 5 * (step + 3) and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.02)
        assert begun == list(range(5 * (step + 3)))  # this one and two more
    stream.close()


def test_chunks_of_one_image_keep_all_threads_busy(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "num_threads", lambda: 2)
    taken = 0

    def chunks() -> Iterator[Tensor]:
        nonlocal taken
        for i in range(NUMBER):
            taken += 1
            yield torch.tensor([i])

    stream = lazy(paths).stream(chunks())
    next(stream)
    assert taken == 2 * decoded.IMAGES * 2 + 1
    next(stream)
    assert taken == 2 * decoded.IMAGES * 2 + 2


@pytest.mark.parametrize("how", ["close", "forget", "error"])
def test_dropped_stream_leaves_nothing_to_do(paths: list[Path], how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go, count = threading.Event(), 0
    decode = ImageFiles._decode

    def waiting(files: ImageFiles, rows: list[int], images: np.ndarray) -> None:
        nonlocal count
        count += 1
        if rows[0] >= 5:
            go.wait(30)
        decode(files, rows, images)

    monkeypatch.setattr(ImageFiles, "_decode", waiting)
    monkeypatch.setattr(decoded, "num_threads", lambda: 1)
    stream = lazy(paths).stream(torch.arange(NUMBER).split(5))
    next(stream)
    if how == "close":
        stream.close()
    elif how == "error":
        with pytest.raises(KeyError):
            stream.throw(KeyError("the loop was left"))
    else:
        del stream
        gc.collect()
    go.set()
    decoded.thread_pool().submit(int).result(30)  # comes after what was waiting
    assert count <= 2
    assert torch.equal(lazy(paths)[:], held(paths))


def test_one_pool_serves_all_sources_and_outlives_them(paths: list[Path]) -> None:
    pool = decoded.thread_pool()
    lazy(paths)[:]
    lazy(paths, image_size=5)[:]
    gc.collect()
    assert decoded.thread_pool() is pool
    assert len(pool._threads) <= decoded.num_threads()


@pytest.mark.usefixtures("threads")
def test_pool_follows_the_number_of_threads(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoded, "usable_cores", lambda: 4)
    for number, expected in ((1, 1), (3, 3), (9, 4)):
        torch.set_num_threads(number)
        assert decoded.thread_pool()._max_workers == expected


# Other processes


def _sum(source: ImageFiles) -> int:
    return int(source[:].sum())


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda source: pickle.loads(pickle.dumps(source))])
def test_copy_is_as_good(paths: list[Path], how: object) -> None:
    files = lazy(paths)
    assert _sum(how(files)) == _sum(files)  # type: ignore[operator]
    assert how(files).fingerprint == files.fingerprint  # type: ignore[operator]


def _forked(source: ImageFiles, pipe: multiprocessing.connection.Connection) -> None:
    pipe.send(_sum(source))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_process_makes_its_own_threads(paths: list[Path]) -> None:
    files = lazy(paths)
    expected = _sum(files)  # the pool is there, and its threads are not in the child
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_forked, args=(files, theirs), daemon=True)
    child.start()
    assert mine.poll(60)
    assert mine.recv() == expected
    child.join(60)
    assert child.exitcode == 0


# What tells one data set from another


def test_fingerprint_is_of_paths_sizes_and_form(paths: list[Path], tmp_path: Path) -> None:
    files = lazy(paths)
    assert content(files) == files.fingerprint.encode()
    for i, path in enumerate(paths):
        copied = tmp_path / path.relative_to(paths[0].parents[1])
        copied.parent.mkdir(exist_ok=True)
        copied.write_bytes(path.read_bytes())
        os.utime(copied, (i, i))
    elsewhere = [tmp_path / path.relative_to(paths[0].parents[1]) for path in paths]
    assert lazy(elsewhere).fingerprint == files.fingerprint
    assert files.subset(torch.arange(NUMBER)).fingerprint == files.fingerprint
    others = [
        files.subset(torch.arange(NUMBER - 1)).fingerprint,
        lazy(paths[::-1]).fingerprint,
        lazy(paths, image_size=5).fingerprint,
        lazy(paths, image_size=(12, 10)).fingerprint,
    ]
    elsewhere[3].write_bytes(elsewhere[3].read_bytes() + b"\0")
    others.append(lazy(elsewhere).fingerprint)
    assert len({files.fingerprint, *others}) == 6


# What is wrong with a file


@pytest.mark.parametrize("options", [LAZY, HELD])
def test_missing_file_is_named_before_anything_is_decoded(
    paths: list[Path], options: ReadOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoded, "read_pixels", lambda *_: np.zeros((12, 10, 3)))
    monkeypatch.setattr(ImageFiles, "_decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"^Expected .*gone\.png to be a PNG, .* or TIFF image, got no such file\.$"):
        read_images([paths, [paths[0].parent / "gone.png"]], root=paths[0].parents[1], options=options)


def test_nothing_is_not_a_data_set(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to hold images, got none\.$"):
        open_images([], root=tmp_path, options=LAZY)


def test_damage_behind_the_header_is_named_by_the_first_file_of_the_chunk(tmp_path: Path) -> None:
    for i in range(40):
        picture(i, 64, 64).save(tmp_path / f"{i}.png")
    found = [tmp_path / f"{i}.png" for i in range(40)]
    files = open_images(found, root=tmp_path, options=LAZY)
    for i in (5, 21, 22, 38):
        found[i].write_bytes(found[i].read_bytes()[:400])
    for _ in range(3):
        stream = files.stream(torch.arange(40).split(16))
        with pytest.raises(
            ValueError, match=r"^Expected .*/5\.png to be a PNG, [^\n]* cannot be decoded \([^\n]*\)\.$"
        ):
            next(stream)
        with pytest.raises(ValueError, match=r"/22\.png"):
            files[torch.tensor([0, 22, 21, 5])]
    assert torch.equal(files[6:20], held(found[6:20]))  # the others are as good as before


def test_file_that_has_another_size_by_now_is_named(tmp_path: Path) -> None:
    for i in range(2):
        picture(i).save(tmp_path / f"{i}.png")
    files = open_images([tmp_path / "0.png", tmp_path / "1.png"], root=tmp_path, options=LAZY)
    picture(1, 5, 5).save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"one size, 10 x 12 like 0\.png, got 5 x 5 for .*1\.png"):
        files[:]
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png to be .* got no such file\.$"):
        files[:]
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"1\.png to be .* \(it is not a regular file\)\.$"):
        files[:]


def test_large_images_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(12):
        picture(i, 30, 30).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(decoding, "LARGE", 899)
    monkeypatch.setattr(decoded, "IMAGES", 1)
    inside, most, seen = 0, 0, decoding._seen

    def counting(*arguments: object) -> np.ndarray:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        time.sleep(0.005)
        try:
            return seen(*arguments)  # type: ignore[arg-type]
        finally:
            inside -= 1

    monkeypatch.setattr(decoding, "_seen", counting)
    monkeypatch.setattr(decoded, "num_threads", lambda: 4)
    found = [tmp_path / f"{i}.png" for i in range(12)]
    held(found)
    assert most == 1
    monkeypatch.setattr(decoding, "LARGE", 900)
    held(found)
    assert most > 1


def test_frames_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    picture(0).save(tmp_path / "0.gif", save_all=True, append_images=[picture(1)])
    passed = PassedOver(tmp_path)
    read_images([[tmp_path / "0.gif"]], root=tmp_path, options=LAZY, passed=passed)
    assert [*passed.found.values()] == [["0.gif"]]
    assert caplog.messages == []
    read_images([[tmp_path / "0.gif"]], root=tmp_path, options=LAZY)
    assert "files with further frames or pages, the first used: 1 (0.gif)" in caplog.text


@pytest.mark.parametrize("in_memory", [None, True, False])
@pytest.mark.parametrize("image_size", [10**6, 10**10])
def test_a_size_that_is_a_mistake_is_refused_before_memory_is_taken(
    paths: list[Path], image_size: int, in_memory: bool | None
) -> None:
    with pytest.raises(
        ValueError, match=rf"Expected \d+ images of {image_size} x {image_size} pixels .* to fit into memory"
    ):
        read_images([paths], root=paths[0].parents[1], options=ReadOptions(image_size=image_size, in_memory=in_memory))
