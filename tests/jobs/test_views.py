"""Several crops of each sample: where they lie in pictures and sounds, and their way through the commands.

The key 0001 with seed 0 has these places (tests/pipeline/test_views.py computes them by hand):
view 0: top 0.1401, left 0.0532; view 1: top 0.0401, left 0.5929, mirrored.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PIL

from jobs.__main__ import main
from jobs.artifacts import token_layout
from jobs.audit import AuditWorker
from jobs.config import Config, TokensConfig
from jobs.config.schema import ViewsConfig
from jobs.retry import Recovered, RetryWorker
from jobs.shards import DecodedSample, _whole_samples, crop_views, decode_sample, encode_shard
from jobs.status import summarise
from pipeline.corpus.samples import Sample
from pipeline.corpus.shards import find_shards
from pipeline.tokens import Output, Quarantined, TokenDataset, TokenRow
from pipeline.tokens.schema import to_parquet
from pipeline.tokens.verify import verify
from pipeline.tokens.views import Views
from tests.corpus import encoded, picture, tar_bytes
from tests.jobs.helpers import here, tokenize_without_ray
from tests.sounds import by_soundfile, sweep
from tokenizer.modalities.audio.modality import Audio
from tokenizer.modalities.audio.waveform import AudioConfig
from tokenizer.modalities.image.modality import Image, ImageConfig
from tokenizer.tokenizer import Tokenizer

VIEWS = Views(count=2, crop=16, flip=True, seed=0)
OPTIONS = TokensConfig(views=ViewsConfig(count=2, crop=16, flip=True))
SETTINGS = ("tokens.views.count=2", "tokens.views.crop=16", "tokens.views.flip=true")
PICTURE = picture(40, 48, seed=1)
LARGE = picture(120, 120, seed=2)  # more pixels than 2,000


def crops(data: bytes, name: str, modality: Image | Audio, views: Views) -> list[DecodedSample]:
    whole = decode_sample(Sample(0, "0001", {name: data}), modality)
    assert isinstance(whole, DecodedSample)
    found = crop_views(whole, modality, views)
    assert isinstance(found, list)
    return found


@pytest.fixture
def shards(tmp_path: Path) -> str:
    """One shard of 5 pictures of 3 sizes."""
    pictures = {"0001": PICTURE, "0002": LARGE, "0003": picture(16, 16, 3), "0004": picture(40, 48, 4), "5": PICTURE}
    path = tmp_path / "a.tar"
    path.write_bytes(tar_bytes([(f"{key}.png", encoded(image)) for key, image in pictures.items()]))
    return str(path)


# -- crops ----------------------------------------------------------------------------------------------------------


def test_crops_of_a_picture_are_the_boxes_computed_by_hand():
    first, second = crops(encoded(PICTURE), "png", Image(ImageConfig()), VIEWS)
    # tops of 40 - 16 + 1 = 25 rows: 3.50 and 1.003; lefts of 48 - 16 + 1 = 33 columns: 1.76 and 19.57
    assert np.array_equal(first.decoded.array, PICTURE[3:19, 1:17])
    assert np.array_equal(second.decoded.array, PICTURE[1:17, 19:35][:, ::-1])
    assert [first.view, second.view] == [0, 1]
    assert first.decoded.size == second.decoded.size == {"height": 40, "width": 48}


def test_a_depth_map_of_half_the_size_gets_the_same_relative_crops():
    y, x = np.mgrid[:200, :240].astype(np.uint8)
    depth = np.stack([y, x, x], axis=-1)  # each pixel holds its own position
    photo = depth.repeat(2, axis=0).repeat(2, axis=1)
    modality, views = Image(ImageConfig()), Views(count=50, crop=128, flip=True, seed=0)
    large = crops(encoded(photo), "png", modality, views)
    small = crops(encoded(depth), "png", modality, replace(views, crop=64))
    for one, other in zip(large, small, strict=True):
        assert np.abs(one.decoded.array[::2, ::2].astype(int) - other.decoded.array).max() <= 1  # in pixels


def test_crops_of_a_sound_are_cut_in_time():
    sound = sweep(16000, 1.0)
    data = by_soundfile(sound, 16000, "WAV", "FLOAT")
    found = crops(data, "wav", Audio(AudioConfig(16000)), Views(count=2, crop=0.25, flip=False, seed=0))
    starts = [1680, 481]  # 0.14007 and 0.040138 of 16000 - 4000 + 1 = 12001 samples: 1680.98 and 481.69
    for one, start in zip(found, starts, strict=True):
        assert np.array_equal(one.decoded.array, sound[start : start + 4000])


def test_a_small_picture_is_enlarged_and_a_short_sound_is_followed_by_silence_and_both_are_noted():
    small = crops(encoded(picture(8, 12)), "png", Image(ImageConfig()), VIEWS)
    assert [one.decoded.array.shape for one in small] == [(16, 16, 3)] * 2
    assert [one.decoded.notes for one in small] == [["smaller than tokens.views.crop, enlarged first"], []]
    sound = sweep(16000, 0.1)
    data = by_soundfile(sound, 16000, "WAV", "FLOAT")
    short = crops(data, "wav", Audio(AudioConfig(16000)), Views(count=2, crop=0.25, flip=False, seed=0))
    assert np.array_equal(short[0].decoded.array, np.pad(sound, ((0, 2400), (0, 0))))
    assert short[0].decoded.notes == ["shorter than tokens.views.crop, followed by silence"]


def test_a_picture_that_would_exceed_the_limits_when_it_is_enlarged_is_quarantined():
    modality = Image(ImageConfig())
    whole = decode_sample(Sample(0, "0001", {"png": encoded(picture(1, 2000))}), modality)
    assert isinstance(whole, DecodedSample)
    found = crop_views(whole, modality, VIEWS)
    assert isinstance(found, Quarantined)
    assert found.message == "32000x16, enlarged for tokens.views.crop=16: a side exceeds max_side=16384"


# -- rows -----------------------------------------------------------------------------------------------------------


def test_the_rows_are_the_tokens_of_the_crops_whatever_the_batch(shards: str, tokenizer: str):
    frozen, [shard] = Tokenizer.from_pretrained(tokenizer), find_shards(shards).shards
    rows = encode_shard(shard, frozen, OPTIONS, views=VIEWS).rows
    assert [(row.key, row.view) for row in rows[:4]] == [("0001", 0), ("0001", 1), ("0002", 0), ("0002", 1)]
    assert np.array_equal(rows[0].tokens, frozen.encode(PICTURE[3:19, 1:17]))
    assert np.array_equal(rows[1].tokens, frozen.encode(np.ascontiguousarray(PICTURE[1:17, 19:35][:, ::-1])))
    one_by_one = encode_shard(shard, frozen, replace(OPTIONS, batch_budget=1e-6, decode_threads=1), views=VIEWS).rows
    few = encode_shard(shard, frozen, OPTIONS, views=VIEWS, only={0, 3}).rows
    assert [(row.place, row.tokens.tolist()) for row in one_by_one] == [
        (row.place, row.tokens.tolist()) for row in rows
    ]
    assert [row.tokens.tolist() for row in few] == [row.tokens.tolist() for row in (*rows[:2], *rows[6:8])]


def test_a_sample_with_a_bad_view_is_quarantined_once_and_as_a_whole():
    rows = [
        TokenRow("a", 0, np.zeros(1, int), {}, view=0),
        *(TokenRow("b", 1, np.zeros(1, int), {}, view=v) for v in (0, 1)),
    ]
    bad = [
        Quarantined("a", 0, "encode", "BadSample", "view 1: NaN"),
        Quarantined("a", 0, "encode", "BadSample", "view 2: NaN"),
    ]
    assert _whole_samples(rows, bad) == (rows[1:], bad[:1])


def test_an_output_without_views_does_not_state_them(shards: str, tokenizer: str, tmp_path: Path):
    output = tokenize_without_ray(shards, tokenizer, tmp_path / "out")
    assert "views" not in output.about()["layout"]
    assert "views" not in Config().to_dict()["tokens"]
    assert Config(tokens=OPTIONS).to_dict()["tokens"]["views"] == {"count": 2, "crop": 16, "flip": True, "seed": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 2}, r"tokens\.views\.crop is not set; .* tokens\.views\.crop=256"),
        ({"crop": 16}, r"tokens\.views\.count is not set; .* tokens\.views\.count=10"),
        ({"count": -1, "crop": 16}, r"tokens\.views\.count is -1; it must be 0 or more"),
        ({"count": 32769, "crop": 16}, r"tokens\.views\.count is 32769; it must be 32768 or less"),
        ({"count": 2, "crop": 16.5}, r"tokens\.views\.crop is 16\.5; it must be a whole number of pixels from 1 to"),
        (
            {"count": 2, "crop": 9000},
            r"tokens\.views\.crop is 9000; it must be a whole number of pixels from 1 to 8000",
        ),
    ],
)
def test_wrong_options_are_refused(tokenizer: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        token_layout(Tokenizer.from_pretrained(tokenizer), TokensConfig(views=ViewsConfig(**options)))


@pytest.mark.parametrize(
    ("crop", "flip", "message"),
    [(1.0, True, "flip is for pictures"), (9.0, False, "is 9.0 seconds; .* max_seconds, 8")],
)
def test_sounds_have_no_mirrored_views_and_none_beyond_their_limit(crop: float, flip: bool, message: str):
    with pytest.raises(ValueError, match=message):
        Audio(AudioConfig(16000, max_seconds=8)).check_views(crop, flip)


def test_a_cache_of_latents_has_no_views():
    with pytest.raises(ValueError, match=r"leave out tokens\.latents or tokens\.views"):
        TokensConfig(latents="RUN/latents", views=ViewsConfig(count=2, crop=16))


# -- commands -------------------------------------------------------------------------------------------------------


@pytest.fixture
def output(shards: str, tokenizer: str, tmp_path: Path) -> Output:
    """Sample 1 is in quarantine."""
    return tokenize_without_ray(shards, tokenizer, tmp_path / "out", replace(OPTIONS, max_pixels=2000))


def test_a_retry_takes_the_views_from_the_output_and_the_audit_reproduces_them(output: Output, tokenizer: str):
    [shard] = output.inputs()
    found = here(RetryWorker, tokenizer, output_url=output.url).process(shard)
    assert found == Recovered(shard, num_recovered=1)
    assert verify(output, deep=True).problems == []
    drawn = {shard.name: [1, 6, 7], f"{shard.name}+1": [0]}
    compared = here(AuditWorker, tokenizer, output_url=output.url, drawn=drawn).process(shard)
    assert (compared.failure, compared.num_rows, compared.differing) == (None, 4, [])


def test_each_view_is_decoded_to_a_file(output: Output, tokenizer: str, tmp_path: Path):
    arguments = ["decode", f"output={output.url}", f"tokenizer={tokenizer}", f"decode.output={tmp_path}/png"]
    assert main([*arguments, "decode.keys=[0001,0003]"]) == 0
    files = sorted(file.name for file in (tmp_path / "png").iterdir())
    assert files == [
        f"a-{index:06d}-{key}-view{view}.png" for index, key in ((0, "0001"), (2, "0003")) for view in (0, 1)
    ]
    frozen = Tokenizer.from_pretrained(tokenizer)
    expected = frozen.decode(frozen.encode(np.ascontiguousarray(PICTURE[1:17, 19:35][:, ::-1])))
    assert np.array_equal(np.asarray(PIL.open(tmp_path / "png/a-000000-0001-view1.png")), expected)


def test_a_view_that_is_no_multiple_of_the_factor_is_decoded_without_padding(
    shards: str, tokenizer: str, tmp_path: Path
):
    options = TokensConfig(views=ViewsConfig(count=1, crop=13))
    output = tokenize_without_ray(shards, tokenizer, tmp_path / "odd", options)
    assert main(["decode", f"output={output.url}", f"tokenizer={tokenizer}", f"decode.output={tmp_path}/png"]) == 0
    assert {PIL.open(file).size for file in (tmp_path / "png").iterdir()} == {(13, 13)}


def test_status_counts_samples(output: Output):
    summary = summarise(output)
    assert (summary["samples"], summary["quarantined"]) == (4, 1)
    assert summary["tokens"] == 8 * 2 * 2


def damage(output: Output, missing: int) -> None:
    """Removes a row of the first shard."""
    path = Path(output.tokens_url(output.inputs()[0].name))
    table = pq.read_table(path)
    path.write_bytes(to_parquet(pa.concat_tables([table[:missing], table[missing + 1 :]])))


def test_a_missing_view_is_repaired_by_verify_and_the_same_tokenize(output: Output, shards: str, tokenizer: str):
    before = Path(output.tokens_url(output.inputs()[0].name)).read_bytes()
    damage(output, missing=3)
    assert main(["verify", f"output={output.url}", "verify.repair=true"]) == 3
    assert output.commits() == []
    tokenize_without_ray(shards, tokenizer, output.url, replace(OPTIONS, max_pixels=2000))
    assert Path(output.tokens_url(output.inputs()[0].name)).read_bytes() == before
    assert main(["verify", f"output={output.url}", "verify.deep=true"]) == 0


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_views_from_tokenize_over_retry_to_decode(
    shards: str, tokenizer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, frozen = f"output={tmp_path}/out", f"tokenizer={tokenizer}"
    tokenize = ["tokenize", f"data.shards={shards}", frozen, out, *SETTINGS, "tokens.max_pixels=2000"]
    assert main([*tokenize, "tokens.max_bad_fraction=0.15"]) == 4  # 1 of 5 samples; of rows it would be 1 of 9
    assert "tokenize: 4 samples (8 rows, 2 views each) in 1 of 1 shards, 1 quarantined" in capsys.readouterr().out
    assert main(["verify", out, "verify.deep=true"]) == 0
    assert "8 rows (2 views of each sample), 1 quarantined" in capsys.readouterr().out
    assert main([*tokenize, "tokens.views.seed=3"]) == 2
    assert "views.seed is 0 there and 3 here" in capsys.readouterr().err

    assert main(["retry", out, frozen]) == 0
    assert "retry: recovered 1 samples" in capsys.readouterr().out
    assert main(["verify", out, "verify.deep=true"]) == 0
    assert len(TokenDataset(f"{tmp_path}/out")) == 10
    assert main(["decode", out, frozen, f"decode.output={tmp_path}/png"]) == 0
    assert len(list((tmp_path / "png").iterdir())) == 10

    damage(Output.open(f"{tmp_path}/out"), missing=3)
    assert main(["verify", out, "verify.deep=true"]) == 3
    assert main(["verify", out, "verify.repair=true"]) == 3
    again = capsys.readouterr().out.splitlines()[-2]  # the command to run now
    assert all(f"tokens.views.{setting}" in again for setting in ("count=2", "crop=16", "flip=True"))
