import numpy as np
import pytest
import torch
from PIL import Image

from earlyexit_ssd import ExitRouter
from earlyexit_ssd.errors import DataError, EarlyExitError
from earlyexit_ssd.pipeline.demo import demonstrate, look, photo_paths, picture_paths
from tests.modeling.conftest import small_model


@pytest.fixture
def photo(tmp_path):
    """90 x 60 as stored, upright 60 x 90."""
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "room.jpg", exif=exif)
    return tmp_path / "room.jpg"


def routed_model(*thresholds: float):
    model = small_model().eval()
    model.router = ExitRouter(2, thresholds=thresholds)
    return model


def test_a_folder_stands_for_its_pictures(tmp_path, caplog):
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "inside.png").mkdir()
    single = tmp_path / "notes.txt"
    assert photo_paths([single, str(tmp_path)]) == [single, tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert f"{tmp_path}: 1 files left out, which are no photos; the first: {single}" in caplog.messages
    with pytest.raises(DataError, match=r"inside\.png: no picture in this folder; name photos"):
        photo_paths([tmp_path / "inside.png"])


def test_no_picture_replaces_another_or_a_photo(tmp_path):
    photos = [
        tmp_path / "x" / "dog.jpg",
        tmp_path / "y" / "dog.png",
        tmp_path / "y" / "Dog.jpg",
        tmp_path / "out" / "cat.png",
        tmp_path / "out" / "cow.PNG",  # the same file as cow.png where the disk does not tell cases apart
    ]
    names = [path.name for path in picture_paths(photos, tmp_path / "out")]
    assert names == ["dog.png", "dog_2.png", "Dog_3.png", "cat_2.png", "cow_2.png"]
    assert all(path.parent == tmp_path / "out" for path in picture_paths(photos, tmp_path / "out"))


@pytest.mark.parametrize(("thresholds", "index", "name"), [((0.0, 1.0), 0, "exit8"), ((1.0, 0.0), 1, "exit12")])
def test_the_exit_taken_is_the_one_reported(photo, thresholds, index, name):
    model = routed_model(*thresholds)
    answer = look(model, photo, 0.0)
    assert (answer.exit_index, answer.exit_name) == (index, name)
    assert 0 < answer.confidence < 1
    assert answer.ms > 0
    image = torch.from_numpy(np.array(Image.open(photo).transpose(Image.Transpose.ROTATE_270))).permute(2, 0, 1) / 255
    with torch.no_grad():
        expected = model.detections(model.exit_outputs([image]), index)[0]
    scores = [score for _, score, _ in answer.found]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == len(expected["scores"]) > 0
    assert scores == pytest.approx(expected["scores"].sort(descending=True).values.tolist(), abs=1e-5)
    assert {name for name, *_ in answer.found} <= {"chair", "table"}
    assert max(box[3] for *_, box in answer.found) > 60  # upright it is 90 high


def test_scores_below_are_left_out(photo):
    model = routed_model(0.0, 0.0)
    scores = [score for _, score, _ in look(model, photo, 0.0).found]
    middle = scores[len(scores) // 2]
    assert [score for _, score, _ in look(model, photo, middle).found] == [one for one in scores if one >= middle]
    assert look(model, photo, 1.0).found == ()
    for score in (-0.1, 1.5):
        with pytest.raises(EarlyExitError, match=f"score {score}: expected"):
            next(demonstrate([photo], "chair", photo.parent / "out", score=score))


def test_without_a_router_the_full_path_answers(photo):
    answer = look(small_model().eval(), photo, 0.5)
    assert (answer.exit_index, answer.exit_name, answer.confidence) == (2, "full", None)


def test_pictures_of_one_exit_and_of_all(photo):
    model = routed_model(0.0, 0.0)
    # 8 px around tiles, a line of 30 px; the upright photo fills the tile's height.
    assert look(model, photo, 0.5).picture.size == (640 + 16, 640 + 38)
    assert look(model, photo, 0.5, all_exits=True).picture.size == (3 * 328 + 8, 320 + 38)


def test_what_is_no_photo(tmp_path):
    with pytest.raises(DataError, match=r"none\.jpg: no such photo"):
        look(small_model().eval(), tmp_path / "none.jpg", 0.5)
