import hashlib
import json

import pytest

from megamoe.checkpoint.format import Manifest, Piece, StoredFile, TensorEntry, step_folder, step_folders
from megamoe.errors import CheckpointError

FILES = {
    name: StoredFile(99, "00") for name in ("config.json", "state.json", "a.safetensors", "b.safetensors")
}
PIECES = (Piece("a.safetensors", "x", 0, 4), Piece("b.safetensors", "x", 4, 6))


WEIGHT = TensorEntry((2, 3), "float32", PIECES)


def manifest(entry=WEIGHT, files=FILES, **more):
    return Manifest(files, {"weight": {"layers.0.w": entry} | more})


def changed(**changes):
    """The text of a manifest whose body was changed and whose digest was made right again."""
    body = json.loads(manifest().to_json()) | changes
    del body["sha256"]
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return json.dumps(body | {"sha256": hashlib.sha256(text.encode()).hexdigest()})


def test_text_gives_the_same_manifest_back():
    assert Manifest.from_json(manifest().to_json()) == manifest()


def test_a_tensor_without_elements_has_no_pieces():
    assert Manifest.from_json(manifest(TensorEntry((0, 3), "float32", ())).to_json())


@pytest.mark.parametrize(
    ("pieces", "problem"),
    [
        ((PIECES[0],), "pieces hold 4 elements"),
        ((PIECES[1],), "overlap or leave a gap at element 0"),
        ((PIECES[0], Piece("b.safetensors", "x", 3, 6)), "overlap or leave a gap at element 4"),
        ((PIECES[0], Piece("b.safetensors", "x", 5, 6)), "overlap or leave a gap at element 4"),
        ((PIECES[0], Piece("b.safetensors", "x", 4, 4), PIECES[1]), "overlap or leave a gap at element 4"),
        ((*PIECES, Piece("b.safetensors", "y", 6, 7)), "pieces hold 7 elements"),
        ((PIECES[1], PIECES[0]), "overlap or leave a gap at element 0"),
        ((Piece("a.safetensors", "x", 0, 3), Piece("a.safetensors", "x", 3, 6)), "used twice"),
        ((Piece("c.safetensors", "x", 0, 6),), "unlisted file 'c.safetensors'"),
    ],
)
def test_pieces_must_cover_a_tensor_exactly_once(pieces, problem):
    with pytest.raises(CheckpointError, match=problem):
        manifest(TensorEntry((2, 3), "float32", pieces))


def test_two_tensors_cannot_share_a_piece():
    with pytest.raises(CheckpointError, match="used twice"):
        manifest(twin=TensorEntry((6,), "float32", PIECES))


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/b", "..", ".hidden", "", "a\n", "manifest.json"])
def test_files_must_be_plain_names(name):
    with pytest.raises(CheckpointError, match="not the plain name"):
        manifest(files=FILES | {name: StoredFile(1, "00")})


@pytest.mark.parametrize("name", ["config.json", "state.json"])
def test_documents_must_be_listed(name):
    with pytest.raises(CheckpointError, match=f"does not list {name}"):
        manifest(files={key: value for key, value in FILES.items() if key != name})


def entry(shape=(6,), dtype="float32", pieces=None):
    pieces = [["a.safetensors", "x", 0, 6]] if pieces is None else pieces
    return {"weight": {"w": {"shape": list(shape), "dtype": dtype, "pieces": pieces}}}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"format": "zip"}, "format = 'zip'"),
        ({"version": 2}, "this megamoe reads 1"),
        ({"files": []}, "files = \\[\\]: expected dict"),
        ({"files": 4}, "files = 4: expected dict"),
        ({"files": {"config.json": {"bytes": "1", "sha256": "0"}}}, "bytes = '1': expected int"),
        ({"files": {"config.json": {"bytes": True, "sha256": "0"}}}, "bytes = True: expected int"),
        ({"files": {"config.json": 7}}, "bytes = None: expected int"),
        ({"tensors": None}, "tensors = None: expected dict"),
        ({"tensors": {"gradient": {}}}, "unknown kind of tensor 'gradient'"),
        ({"tensors": {"weight": []}}, "weight: expected tensors by name"),
        ({"tensors": {"weight": {"w": []}}}, "pieces = None: expected list"),
        ({"tensors": entry(dtype="complex64")}, "dtype = 'complex64'"),
        ({"tensors": entry(shape=(2.0, 3))}, "not sizes"),
        ({"tensors": entry(shape=(-2, -3))}, "not sizes"),
        ({"tensors": entry(shape=(True, 6))}, "not sizes"),
        ({"tensors": entry(pieces=[["a.safetensors", "x", 0]])}, "is not \\[file, key, start, stop\\]"),
        ({"tensors": entry(pieces=[["a.safetensors", "x", 0, 6.0]])}, "is not \\[file, key, start, stop\\]"),
        ({"tensors": entry(pieces=[{"file": "a"}])}, "is not \\[file, key, start, stop\\]"),
    ],
)
def test_wrong_fields_are_refused(changes, problem):
    with pytest.raises(CheckpointError, match=problem) as caught:
        Manifest.from_json(changed(**changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"format": NaN', "[" * 100_000])
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        Manifest.from_json(text)


def test_any_change_of_a_character_is_noticed():
    text = manifest().to_json()
    for position in range(0, len(text), 3):
        other = "7" if text[position] != "7" else "8"
        with pytest.raises(CheckpointError):
            Manifest.from_json(text[:position] + other + text[position + 1 :])


def test_step_folders_sort_as_numbers(tmp_path):
    for step in (400, 20, 12_345_678_901):
        (tmp_path / step_folder(step)).mkdir()
    for name in ("step-1", ".step-000000001.tmp", "step-000000002x", "best"):
        (tmp_path / name).mkdir()
    (tmp_path / step_folder(5)).touch()
    assert [step for step, _ in step_folders(tmp_path)] == [20, 400, 12_345_678_901]
    assert step_folders(tmp_path / "missing") == []
