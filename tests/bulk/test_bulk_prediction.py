"""Prediction of many images: order, batches by size, unusable images, dying worker processes."""

import os
import pickle
import signal
import time
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter
from usage_utils import picture, write_boxes_checkpoint, write_checkpoint, write_coco_detector

from reldn_d2.bulk import ImageItem, image_loading, list_images, predict_images
from reldn_d2.bulk.image_loading import ImageLoading
from reldn_d2.predictor import RelationPredictor
from reldn_d2.pretrained import load_detector
from reldn_d2.pretrained.image_detectors import ImageDetector
from reldn_d2.scripts.entity_files import EntityFile, FileEntities
from reldn_d2.structures.scene_graph import SceneGraph
from reldn_d2.utils.image_io import ImageError


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return RelationPredictor.from_checkpoint(
        write_checkpoint(tmp_path_factory.mktemp("model")), "cpu"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of two sizes, every third of the second one, and three that cannot be used."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for seed in range(9):
        pixels = picture(90, 60, seed) if seed % 3 == 2 else picture(60, 90, seed)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    Image.fromarray(picture(seed=20)).save(folder / "sub/0.png")
    Image.fromarray(picture(seed=21)).save(folder / "sub/ü 中.png")
    Image.fromarray(picture(200, 300)).save(folder / "1_cut.jpg")
    (folder / "1_cut.jpg").write_bytes((folder / "1_cut.jpg").read_bytes()[:2000])
    (folder / "1_nothing.jpg").write_bytes(b"")
    (folder / "4_text.jpg").write_text("hello")
    return folder


NO_FILES = FileEntities(None, None)


def assert_same(graph, expected):
    assert graph.classes.tolist() == expected.classes.tolist()
    assert np.allclose(graph.boxes, expected.boxes, atol=1e-3)
    assert np.allclose(graph.scores, expected.scores, atol=1e-5)
    assert graph.file_name == expected.file_name


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_images_equals_single_predictions_in_order(workers, predictor, folder, monkeypatch):
    images = list_images([folder])
    sizes = []
    predict = predictor.predict_inputs

    def spy(inputs):
        assert len({x.record["image"].shape for x in inputs}) == 1
        sizes.append(len(inputs))
        return predict(inputs)

    monkeypatch.setattr(predictor, "predict_inputs", spy)
    results = list(predict_images(predictor, images, NO_FILES, 4, workers))
    monkeypatch.undo()
    assert [image for image, _ in results] == images and len(images) == 14
    # In the order of the files: 6 of one size and 3 of the other, then 2 more of the first size.
    assert sizes == [4, 3, 4]
    errors = {image.key: str(x) for image, x in results if isinstance(x, ImageError)}
    assert list(errors) == ["1_cut.jpg", "1_nothing.jpg", "4_text.jpg"]
    for (key, text), reason in zip(errors.items(), ["truncated", "is empty", "is not an image"]):
        assert text.startswith(f"{folder / key}: cannot be read as an image: ") and reason in text
    for image, graph in results:
        if image.key not in errors:
            assert_same(graph, predictor(image.path))


def test_image_loading_can_be_pickled(predictor, folder):
    """Some systems start worker processes without a copy of this one's memory."""
    entities = FileEntities(EntityFile(folder, {"0.png": {"boxes": [[0, 0, 9, 9]]}}), None)
    loading = ImageLoading(list_images([folder]), predictor.read_input, entities)
    data = pickle.dumps(loading)
    loaded = pickle.loads(data)[0]
    assert loaded.image.key == "0.png" and loaded.content.task == "sgcls"
    assert len(data) < 100_000  # no model


@pytest.fixture
def quick_timeout(monkeypatch):
    """Let DataLoader look for dead processes five times per second, not every five seconds."""
    wait = _MultiProcessingDataLoaderIter._try_get_data
    assert wait.__defaults__ == (5.0,)
    monkeypatch.setattr(wait, "__defaults__", (0.2,))


class Killer(FileEntities):
    """Ends the worker process that loads some images."""

    def __init__(self, *keys):
        super().__init__(None, None)
        self.keys, self.parent = keys, os.getpid()

    def __call__(self, file):
        if file in self.keys and os.getpid() != self.parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(file)


@pytest.mark.usefixtures("quick_timeout")
def test_predict_images_one_that_kills_its_process_is_an_error(predictor, folder, caplog):
    images = list_images([folder])
    results = list(predict_images(predictor, images, Killer("5.png"), 1, 2))
    assert [image for image, _ in results] == images
    errors = {image.key: str(x) for image, x in results if isinstance(x, ImageError)}
    assert len(errors) == 4 and "the process that reads it is killed each time" in errors["5.png"]
    assert caplog.text.count("A process that reads images was killed") == 1
    assert signal.getsignal(signal.SIGCHLD) != signal.SIG_DFL  # DataLoader's own is back


@pytest.mark.usefixtures("quick_timeout")
@pytest.mark.parametrize(
    "killers",
    [
        (3, 9),  # the second one when only some images before it have been predicted again
        (2, 3, 4, 5),
    ],
)
def test_predict_images_several_that_kill_their_process_are_errors(killers, predictor, folder):
    images = [ImageItem(str(i), str(folder / "0.png")) for i in range(12)]
    killer = Killer(*map(str, killers))
    results = list(predict_images(predictor, images, killer, 1, 2))
    assert [image for image, _ in results] == images
    assert [i for i, (_, x) in enumerate(results) if isinstance(x, ImageError)] == list(killers)


@pytest.mark.usefixtures("quick_timeout")
def test_predict_images_processes_that_always_die_raise(predictor, folder, monkeypatch):
    parent = os.getpid()

    class Deadly(list):
        def __getitem__(self, index):
            if os.getpid() != parent:
                os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(image_loading, "Subset", lambda _, indices: Deadly(indices))
    with pytest.raises(ChildProcessError, match="are killed, whatever they read .DataLoader"):
        list(predict_images(predictor, list_images([folder]), NO_FILES, 1, 1))


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_predict_images_lost_connection_to_a_process_is_its_death(
    predictor, folder, error, monkeypatch
):
    """Tensors of a process that dies may fail to arrive before DataLoader notices the death."""
    images = list_images([folder])
    iterate, failed = DataLoader.__iter__, []

    def lose(loader):
        if len(loader.dataset) > 1 and not failed:
            failed.append(True)
            raise error
        return iterate(loader)

    monkeypatch.setattr(DataLoader, "__iter__", lose)
    results = list(predict_images(predictor, images, FileEntities(None, None), 1, 2))
    assert failed and [image for image, _ in results] == images


def test_predict_images_detector_and_boxes(folder, tmp_path):
    model = RelationPredictor.from_checkpoint(
        write_boxes_checkpoint(tmp_path / "boxes"), "cpu", unknown_classes="leave_out"
    )
    yaml, weights = write_coco_detector(tmp_path / "coco")
    detect = load_detector(str(yaml), weights, "cpu", min_score=0.0)
    images = list_images([folder])[:5]
    results = list(predict_images(model, images, detect, 4, 1))
    for image, graph in results:
        if isinstance(graph, SceneGraph):
            assert_same(graph, model(image.path, **detect(image.path)))
            assert graph.left_out
    assert sum(isinstance(x, ImageError) for _, x in results) == 2
    boxes = {"boxes": [[0, 0, 30, 30], [20, 20, 50, 50]], "classes": ["person", "horse"]}
    entities = FileEntities(EntityFile(tmp_path / "b.json", {"0.png": boxes}), None)
    graph, error = (x for _, x in predict_images(model, [images[0], images[1]], entities, 2, 1))
    assert_same(graph, model(images[0].path, **boxes))
    assert "1.png: " in str(error) and "b.json has nothing for it (key '1.png')" in str(error)


def test_predict_images_failing_batch_is_repeated_one_by_one(predictor, folder, monkeypatch):
    images = [x for x in list_images([folder]) if x.key in ("0.png", "1.png", "3.png")]
    predict = predictor.predict_inputs

    def fail(inputs):
        if len(inputs) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        if inputs[0].record["file_name"].endswith("1.png"):
            raise ImageError("1.png: the model kept 3 of 4 given boxes")
        if inputs[0].record["file_name"].endswith("3.png"):
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return predict(inputs)

    monkeypatch.setattr(predictor, "predict_inputs", fail)
    good, bad, large = (x for _, x in predict_images(predictor, images, NO_FILES, 3))
    assert isinstance(good, SceneGraph) and "kept 3 of 4" in str(bad)
    assert str(large) == "3.png: the GPU has too little memory for this image"


def test_predict_images_model_that_fails_for_one_image_is_its_error(predictor, folder, monkeypatch):
    forward = predictor.model.forward

    def fail(inputs):
        outputs = forward(inputs)
        for x, output in zip(inputs, outputs):
            if x["file_name"].endswith("1.png"):
                output["relations"].scores[0] = np.nan
            if x["file_name"].endswith("3.png"):
                raise RuntimeError("cuDNN has\nno kernel")
        return outputs

    monkeypatch.setattr(predictor.model, "forward", fail)
    results = list(predict_images(predictor, list_images([folder]), NO_FILES, 3))
    errors = {image.key: str(x) for image, x in results if isinstance(x, ImageError)}
    assert len(results) == 14 and len(errors) == 5
    assert "1.png: the model fails: ValueError: Prediction of image None: NaN" in errors["1.png"]
    assert errors["3.png"] == "3.png: the model fails: RuntimeError: cuDNN has no kernel"


def test_predict_images_model_that_breaks_stops_the_run(predictor, folder, monkeypatch):
    """As after an error in a CUDA kernel: no later image can be predicted."""
    images = [x for x in list_images([folder]) if x.key[1:] == ".png"]
    predict, calls = predictor.predict_inputs, []

    def fail(inputs):
        calls.append(inputs)
        if len(calls) > 2:
            raise torch.cuda.OutOfMemoryError("another program took the memory")
        return predict(inputs)

    monkeypatch.setattr(predictor, "predict_inputs", fail)
    results = []
    with pytest.raises(torch.cuda.OutOfMemoryError, match="another program"):
        for _, result in predict_images(predictor, images, NO_FILES):
            results.append(result)
    assert len(results) == 2


@pytest.mark.parametrize("is_broken", [False, True])
def test_predict_images_detector_that_fails(is_broken, tmp_path, folder):
    model = RelationPredictor.from_checkpoint(
        write_boxes_checkpoint(tmp_path), "cpu", unknown_classes="leave_out"
    )

    def detect(rgb):
        if is_broken or rgb.shape[0] == 90:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return torch.tensor([[0, 0, 9, 9.0]]), torch.tensor([0]), torch.tensor([0.9])

    images = [x for x in list_images([folder]) if x.key in ("0.png", "1.png", "2.png", "3.png")]
    results = predict_images(model, images, ImageDetector(detect, ["person"], 0.5))
    if is_broken:
        with pytest.raises(torch.cuda.OutOfMemoryError):
            list(results)
    else:
        errors = [str(x) for _, x in results if isinstance(x, ImageError)]
        assert errors == ["2.png: the GPU has too little memory for this image"]


class SlowFiles(FileEntities):
    """Writes into a file when images are read, which takes some time."""

    def __init__(self, path):
        super().__init__(None, None)
        self.path = path

    def __call__(self, file):
        with log_time(self.path, "read"):
            time.sleep(0.05)
        return super().__call__(file)


@contextmanager
def log_time(path, what):
    start = time.monotonic()
    yield
    with open(path, "a") as file:
        file.write(f"{what} {start} {time.monotonic()}\n")


@pytest.mark.parametrize("workers", [0, 2])
def test_predict_images_workers_read_while_the_model_runs(
    workers, predictor, folder, tmp_path, monkeypatch
):
    predict = predictor.predict_inputs

    def predict_slowly(inputs):
        with log_time(tmp_path / "log", "predict"):
            time.sleep(0.05)
            return predict(inputs)

    monkeypatch.setattr(predictor, "predict_inputs", predict_slowly)
    images = [ImageItem(str(i), str(folder / "0.png")) for i in range(10)]
    slow = SlowFiles(tmp_path / "log")
    assert len(list(predict_images(predictor, images, slow, 1, workers))) == 10
    times: dict = {"read": [], "predict": []}
    for line in (tmp_path / "log").read_text().splitlines():
        what, *interval = line.split()
        times[what].append(tuple(map(float, interval)))
    assert len(times["read"]) == len(times["predict"]) == 10
    during = [x for x in times["read"] if any(a < x[1] and x[0] < b for a, b in times["predict"])]
    assert bool(during) == (workers > 0)


def test_predict_images_error_of_the_model_stops_the_run(predictor, folder, monkeypatch):
    monkeypatch.setattr(predictor, "predict_inputs", lambda inputs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(predict_images(predictor, list_images([folder]), NO_FILES))
    assert list(predict_images(predictor, [], NO_FILES)) == []
