"""Ray Data: the examples in docs/tutorials/ray-data.md, and the actor that runs the tokenizer in a user's pipeline."""

import io
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray

from jobs.actors.tokenizer_actor import TokenizerActor
from jobs.config import ConfigError
from tests.corpus import encoded, picture, write_tar
from tests.jobs.helpers import jpegs, rows_of, rows_without_ray, tokenize_without_ray
from tokenizer.autoencoder import Autoencoder
from tokenizer.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
PHOTOS = jpegs(5) + [(f"wide-{name}", data) for name, data in jpegs(4, 24, 64)]
BROKEN = PHOTOS[0][1][:200]


TUTORIAL = ROOT / "docs/tutorials/ray-data.md"


def code_in_tutorial() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE)


def run_tutorial(block: int) -> dict[str, Any]:
    """Runs a block as a script; returns its variables."""
    names: dict[str, Any] = {}
    exec(compile(code_in_tutorial()[block], TUTORIAL.name, "exec"), names)
    return names


@pytest.fixture
def demo(tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the samples and the tokenizer that the examples use."""
    write_tar(tmp_path / "samples/heldout/0.tar", [*PHOTOS[:3], ("broken.jpg", BROKEN), ("none.txt", b"no photo")])
    write_tar(tmp_path / "samples/heldout/1.tar", PHOTOS[3:])
    shutil.copytree(tokenizer, tmp_path / "runs/demo/tokenizers/vp_vae-K1024")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tokens_by_key(rows: list[dict[str, Any]], key: str = "key") -> dict[str, tuple]:
    return {row[key]: (row["tokens"], row["shape"]) for row in rows}


@pytest.mark.parametrize("name", ["read_tokens_with_ray_data", "tokenize_in_your_pipeline"])
def test_tutorial_shows_the_examples_as_they_are(name: str):
    _docstring, code = (ROOT / f"examples/{name}.py").read_text().split('"""\n\n', 1)
    assert code in code_in_tutorial()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tutorial_reads_all_committed_rows_and_no_others(demo: Path, tokenizer: str, capsys: pytest.CaptureFixture):
    output = tokenize_without_ray(f"{demo}/samples/heldout/*.tar", tokenizer, demo / "runs/demo/tokens")
    first = Path(output.tokens_url(output.commits()[0].name))
    (first.parent / "not-committed.parquet").write_bytes(first.read_bytes())
    rows = run_tutorial(0)["rows"]
    assert "uint8 array of shape (" in capsys.readouterr().out
    assert tokens_by_key(rows.take_all()) == tokens_by_key(rows_of(output.url).to_pylist())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_tutorial_pipeline_gives_the_tokens_of_tokenize(demo: Path, tokenizer: str, capsys: pytest.CaptureFixture):
    rows = run_tutorial(1)["tokenized"].take_all()
    assert "wide-0003 24 tokens of shape [3, 8]" in capsys.readouterr().out
    expected = rows_without_ray(f"{demo}/samples/heldout/*.tar", tokenizer).to_pylist()
    found = [row for row in rows if row["error"] is None]
    assert tokens_by_key(found, "__key__") == tokens_by_key(expected)
    bad = {row["__key__"]: row for row in rows if row["error"]}
    assert bad.keys() == {"broken", "none"}
    assert all(row["tokens"] is None for row in bad.values())


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(("column", "message"), [("image", "choose one of: key, jpg"), ("key", "must hold binary")])
def test_a_wrong_column_is_named_by_ray_data(tokenizer: str, column: str, message: str):
    photos = ray.data.from_items([{"key": name, "jpg": data} for name, data in PHOTOS])
    rows = photos.map_batches(
        TokenizerActor,
        fn_constructor_kwargs={"tokenizer": tokenizer, "column": column},
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    with pytest.raises(ray.exceptions.RayTaskError, match=message):
        rows.take_all()


# -- the actor, without Ray ---------------------------------------------------------------------------------------


def photos(*cells: bytes | None) -> pa.Table:
    return pa.table({"number": pa.array(range(len(cells)), pa.int16()), "image": pa.array(cells, pa.binary())})


ALL = photos(*[data for _, data in PHOTOS])


@pytest.fixture(scope="module")
def actor(tokenizer: str) -> TokenizerActor:
    return TokenizerActor(tokenizer, "image")


def test_pictures_of_several_sizes_keep_their_order_and_columns(actor: TokenizerActor, tokenizer: str, tmp_path: Path):
    expected = rows_without_ray(write_tar(tmp_path / "0.tar", PHOTOS), tokenizer)
    table = actor(ALL)
    assert table.select(["number", "image"]).equals(ALL)
    for name in ("tokens", "shape", "height", "width"):
        assert table[name].to_pylist() == expected[name].to_pylist()
        assert table[name].type == expected[name].type
    assert set(table["tokenizer_id"].to_pylist()) == {actor.tokenizer.id}
    assert table["error"].null_count == len(table)


def test_a_bad_picture_has_an_error_and_its_neighbours_have_their_tokens(actor: TokenizerActor):
    (_, first), (_, second), *_ = PHOTOS
    table = actor(photos(first, BROKEN, None, b"", second))
    broken, null, empty = table["error"].to_pylist()[1:4]
    assert broken == "the file is damaged, or of a kind that cannot be read (OSError: Truncated File Read)"
    assert null == "column 'image' has no bytes here"
    assert empty == "the file is empty"
    for name in ("tokens", "shape", "height", "width"):
        assert table[name].is_null().to_pylist() == [False, True, True, True, False]
    assert table["tokens"].take([0, 4]).equals(actor(photos(first, second))["tokens"])


@pytest.mark.parametrize("cells", [[], [None, None], [b"?"]])
def test_a_batch_without_any_picture_has_the_same_schema(actor: TokenizerActor, cells: list[bytes | None]):
    table = actor(photos(*cells))
    assert table.schema == actor(ALL).schema
    assert table["error"].null_count == 0


@pytest.mark.parametrize("batch", [ALL.to_pandas(), {"image": ALL["image"].to_numpy()}])
def test_pandas_and_numpy_batches_give_the_same_tokens(actor: TokenizerActor, batch: Any):
    assert actor(batch)["tokens"].equals(actor(ALL)["tokens"])


@pytest.mark.parametrize("missing", [None, np.nan])
def test_a_missing_cell_of_another_batch_format_is_an_error_of_its_row(actor: TokenizerActor, missing: Any):
    image = np.array([PHOTOS[0][1], missing], dtype=object)
    for batch in ({"image": image}, pd.DataFrame({"image": image}), {"image": np.array([missing] * 2, np.float32)}):
        assert actor(batch)["error"].to_pylist()[1] == "column 'image' has no bytes here"


def test_a_batch_that_has_a_column_of_that_name_is_refused(actor: TokenizerActor):
    with pytest.raises(ValueError, match="already has columns named height, error"):
        actor(ALL.append_column("height", ALL["number"]).append_column("error", ALL["number"]))


def test_decoded_pictures_are_refused(actor: TokenizerActor):
    with pytest.raises(ValueError, match="must hold binary, the bytes of whole files"):
        actor({"image": np.stack([picture(), picture()])})


def test_a_wrong_tokenizer_or_extension_is_answered_with_the_right_ones(demo: Path, tokenizer: str):
    for wrong in ("runs/demo/tokenizers", "runs/demo/tokenizers/vp_vae-K256"):
        with pytest.raises(ConfigError, match=r"choose one of: .*/runs/demo/tokenizers/vp_vae-K1024$"):
            TokenizerActor(wrong, "image")
    with pytest.raises(ConfigError, match="make one with `tokenmill codebook`"):
        TokenizerActor("nowhere/at/all", "image")
    with pytest.raises(ValueError, match="extension is 'mp3'; choose one of: jpg, jpeg, png"):
        TokenizerActor(tokenizer, "image", extension="mp3")
    assert TokenizerActor(tokenizer, "image", extension=".PNG").extension == "png"


def test_sound_has_its_own_size_columns(tmp_path: Path):
    soundfile = pytest.importorskip("soundfile")
    net = {"name": "seanet", "width": 4, "decoder_width": 4, "strides": [6, 4, 4], "dilations": [1], "channels": 8}
    quantizer = {"name": "fsq", "levels": [4, 4, 4]}
    Tokenizer(Autoencoder({"modality": "audio", "net": net, "quantizer": quantizer}), {}).save_pretrained(tmp_path)
    out = io.BytesIO()
    soundfile.write(out, 0.3 * np.sin(np.arange(8000) / 10), 8000, format="WAV")
    row, bad = TokenizerActor(str(tmp_path), "image")(photos(out.getvalue(), encoded(picture()))).to_pylist()
    assert (row["sample_rate"], row["num_samples"], row["shape"]) == (8000, 8000, [len(row["tokens"])])
    assert "not an audio file" in bad["error"]
