"""The HTML pages: what they say, that names cannot become markup, and how they behave in a browser."""

import base64
import functools
import http.server
import json
import re
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.__main__ import main
from jobs.codebook import write_codebook
from jobs.compare import plan, results_of, run_planned
from jobs.config import Config, load_config
from jobs.evaluate import EvaluateWorker, merged, numbers_of, write_report
from jobs.reports import comparison
from jobs.reports.pages import charts
from jobs.reports.pages.cards import cards_of
from jobs.reports.pages.document import card_of, json_for_script
from jobs.reports.pages.example import Example, Extremes, example_of
from jobs.reports.pages.filmstrip import MOST_FRAMES, Filmstrip
from jobs.reports.pages.index import write_index
from jobs.reports.pages.metrics import METRICS, metric, ranking
from jobs.reports.pages.pictures import as_array, error_map, flat_patches, psnr
from jobs.reports.pages.sounds import as_waveform, sound_cards
from jobs.reports.pages.training import LIVE_FILE, TrainingFacts, names_of
from jobs.reports.training import TrainReport
from pipeline.corpus.shards import find_shards
from tests.browser import CHROMIUM, Browser, chromium
from tests.corpus import encoded, picture, write_tar
from tests.jobs.helpers import here, save_tiny_tokenizer, tokenize_without_ray
from tests.sounds import sweep, wav
from tokenizer.autoencoder import Autoencoder
from tokenizer.clustering.latents import InMemory
from tokenizer.modalities.base import build_modality
from tokenizer.tokenizer import Tokenizer

HOSTILE = "<script>alert(1)<'\"&>"  # a key; a slash would make it a folder
NUM_PICTURES, NUM_CLIPS = 32, 6
LIMIT = 5_000_000  # bytes of a page
SEANET = {"name": "seanet", "width": 4, "decoder_width": 4, "strides": [6, 4, 4], "dilations": [1], "channels": 8}


# -- pages of real runs, without Ray --------------------------------------------------------------------------------


def evaluated(folder: Path, tokenizer: str, members: list[tuple[str, bytes]], num_examples: int, **metrics) -> str:
    """Writes the report of `evaluate` to folder/run/reports; returns the text of the page."""
    write_tar(folder / "in/0.tar", members)
    config = load_config(
        [f"run={folder}/run", f"data.shards={folder}/in/*.tar", f"evaluate.num_examples={num_examples}"]
    )
    config.command = f"tokenmill evaluate '{HOSTILE}'"
    inputs, loaded = find_shards(config.data.shards), Tokenizer.from_pretrained(tokenizer)
    worker = here(EvaluateWorker, tokenizer, metrics=metrics, num_examples=num_examples, num_extremes=2)
    found = [worker.process(shard) for shard in inputs.shards]
    assert not any(result.failure for result in found)
    whole, extremes, results = merged(found, inputs.shards, loaded, 2)
    numbers = numbers_of(whole, results, loaded, inputs.id)
    base = write_report(tokenizer, config, numbers, whole, results, extremes, loaded)
    return Path(f"{base}.html").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def pictures(folder: Path) -> str:
    """The page of an evaluation on 32 pictures, two of them with hostile keys."""
    tokenizer = save_tiny_tokenizer(folder / "run/tokenizers/tiny")
    keys = [HOSTILE, "</script><b>", *(f"photo-{i}" for i in range(NUM_PICTURES - 2))]
    keys = [key.replace("/", "\u2215") for key in keys]  # looks like a slash, but makes no folder
    members = [(f"{key}.png", encoded(picture(64 + i % 3 * 16, 96, seed=i))) for i, key in enumerate(keys)]
    return evaluated(folder, tokenizer, members, NUM_PICTURES)


@pytest.fixture(scope="module")
def clips(folder: Path) -> str:
    """The page of an evaluation on clips, with an untrained net."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"modality": "audio", "net": SEANET, "quantizer": {"name": "fsp", "codebook_size": 64}}
        autoencoder = Autoencoder(settings).eval()
        with torch.no_grad():
            autoencoder.quantizer.fit(InMemory(torch.randn(500, autoencoder.quantizer.in_dim)), None, seed=0)
    place = folder / "audio/run/tokenizers/sounds"
    Tokenizer(autoencoder, {}).save_pretrained(place)
    sounds = [sweep(seconds=1 + i / 4) * (0.2 + i / 10) for i in range(NUM_CLIPS)]
    members = [(f"{HOSTILE if i == 0 else f'clip-{i}'}.wav", wav(sound)) for i, sound in enumerate(sounds)]
    return evaluated(folder / "audio", str(place), members, NUM_CLIPS, slow=False)


def examples(step: int) -> list[Example]:
    """Two crops and noisier versions of them: less noise at later steps."""
    modality = build_modality("image", {})
    originals = [picture(32, 32, seed=i) for i in range(2)]
    noise = np.random.default_rng(step).integers(0, max(1, 100 // step), (32, 32, 3))
    pairs = [(array, np.clip(array + noise, 0, 255).astype(np.uint8)) for array in originals]
    return [example_of(modality, HOSTILE if i == 0 else f"crop-{i}", pair) for i, pair in enumerate(pairs)]


def trained(run: Path, *, steps: int = 30, close: bool = True) -> TrainReport:
    """The report of a training whose log we write: it has curves, a filmstrip, and a skipped sample."""
    facts = TrainingFacts(str(run), steps, "vp_vae, 64 codes", "in/*.tar", f"tokenmill train '{HOSTILE}'")
    report = TrainReport(str(run), [], 0, facts)
    for step in range(10, 31, 10):
        row = {"step": step, "loss": 1 / step, "psnr": 10.0 + step, "heldout_psnr": 9.0 + step, "bad_samples": 1}
        report.log(row | {"seconds_per_step": 0.5, "samples_per_s": 8.0, "data_wait_share": 0.1})
        report.show(examples(step), step)
    report.skipped = [{"shard": "0.tar", "index": 0, "key": HOSTILE, "reason": f"is no picture: {HOSTILE}"}]
    report.close() if close else report.write()
    return report


@pytest.fixture(scope="module")
def training(folder: Path) -> str:
    trained(folder / "run")
    return (folder / "run/reports/train.html").read_text()


def comparison_config(folder: Path) -> Config:
    write_tar(folder / "compare/0.tar", [(f"{i}.png", encoded(picture(32, 32, seed=i))) for i in range(8)])
    config = load_config([
        *(f"run={folder}/run", f"data.shards={folder}/compare/0.tar", f"compare.heldout={folder}/compare/0.tar"),
        *("model.net={name: resnet32, channels: 8, res_blocks: 1}", "train.steps=2", "train.batch_size=4"),
        *("train.crop_size=32", "train.warmup_steps=1", "compare.sizes=[16,64]", "compare.seeds=[0,1]"),
        "compare.num_examples=3",
    ])  # fmt: skip
    config.compare.methods = {HOSTILE: {"quantizer": {"name": "vq_vae"}}, "FSQ": {"quantizer": {"name": "fsq"}}}
    return config


@pytest.fixture(scope="module")
def compared(folder: Path) -> str:
    """The page of a comparison of two methods at two sizes with two seeds, each trained for two steps."""
    config = comparison_config(folder)
    planned = plan(config, str(folder / "run"), "corpus")
    arrays = {name: np.stack([picture(32, 32, seed=i) for i in range(8)]) for name in ("train", "heldout")}
    for one in planned:
        run_planned(one, arrays, "cpu", cpus=1, report=lambda row: None)
    originals = [encoded(array) for array in arrays["heldout"][:3]]
    comparison.write_report(str(folder / "run"), results_of(planned), originals, config)
    return (folder / "run/reports/compare.html").read_text()


@pytest.fixture(scope="module")
def codebook(folder: Path, pictures: str) -> str:
    tokenizer = Tokenizer.from_pretrained(folder / "run/tokenizers/tiny")
    autoencoder = tokenizer.autoencoder
    latents = InMemory(torch.randn(500, 2, generator=torch.Generator().manual_seed(0)))
    config = load_config([f"run={folder}/run", f"data.shards={folder}/in/*.tar"])
    write_codebook(autoencoder, latents, 16, {}, config, f"{folder}/run/tokenizers/again-K16")
    return (folder / "run/reports/codebook-again-K16.html").read_text()


@pytest.fixture(scope="module")
def index(folder: Path, pictures: str, training: str, compared: str, codebook: str) -> str:
    write_index(str(folder / "run/reports"))
    return (folder / "run/reports/index.html").read_text()


PAGES = ("pictures", "clips", "training", "compared", "codebook", "index", "viewed")


@pytest.fixture
def page(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


class Outline(HTMLParser):
    """The elements of a page and the values that could load something."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


# -- every page -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_a_page_is_one_file_that_loads_nothing(page: str):
    outline = Outline(page)
    assert "link" in outline.tags  # the empty icon
    assert [one for one in outline.links if not one.startswith(("data:", "#")) and ":" in one] == []
    assert set(re.findall(r"url\((?!\$)([^)]*)\)", page)) == set()
    assert len(page.encode()) < LIMIT


@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_a_hostile_name_is_text_and_no_markup(page: str):
    """Three scripts are ours: the summary, the codes and the code of the page."""
    assert "<script>alert(1)" not in page
    assert "</script><b>" not in page
    assert 2 <= Outline(page).tags.count("script") <= 3


def test_hostile_names_are_shown_as_they_are(pictures: str, clips: str, training: str, compared: str):
    for text in (pictures, clips, training, compared):
        assert HOSTILE in Outline(text).texts or any(HOSTILE in one for one in Outline(text).texts)


@pytest.mark.parametrize("page", PAGES, indirect=True)
def test_a_page_says_what_made_it_and_when(page: str):
    assert re.search(r"Made 20\d\d-\d\d-\d\d \d\d:\d\d UTC with tokenmill [\d.]+, torch [\w.+]+", page)


def test_json_in_a_script_cannot_end_it():
    text = str(json_for_script({"key": "</script><!--&"}))
    assert not set("<>&") & set(text)
    assert json.loads(text) == {"key": "</script><!--&"}


# -- evaluate -------------------------------------------------------------------------------------------------------


def test_the_page_of_pictures_says_how_good_it_is_against_what_and_on_what(folder: Path, pictures: str):
    numbers = json.loads((folder / "run/reports/evaluate-tiny.json").read_text())
    assert f"On 32 samples the reconstructions reach PSNR {numbers['psnr']:.2f} dB" in pictures
    assert f"{24 / numbers['bits_per_pixel']:,.0f} times less than 8-bit RGB" in pictures
    assert "if each 8 x 8 patch of the first 32 samples had its mean colour" in pictures
    for fact in (numbers["tokenizer_id"], numbers["input_manifest_id"], f"{folder}/in/*.tar", "64 codes"):
        assert fact in pictures


def test_each_picture_is_there_once_with_its_own_psnr(pictures: str):
    """Computed here from the pixels in the page, which are those of the samples."""
    cards = pictures.split('<figure class="pair')[1:]
    assert len(cards) == NUM_PICTURES
    for card in cards:
        urls = re.findall(r'<img src="data:image/webp;base64,([^"]+)"', card)[:2]
        original, other = (as_array(base64.b64decode(url)).astype(float) for url in urls)
        expected = -10 * np.log10(np.mean((original - other) ** 2) / 255**2)
        assert float(re.findall(r"PSNR <b>([\d.]+) dB", card)[0]) == pytest.approx(expected, abs=0.006)


def test_the_page_of_clips_has_both_players_of_each(clips: str):
    assert clips.count('<figure class="clip') == NUM_CLIPS
    assert clips.count("<audio controls") == 2 * NUM_CLIPS
    assert "lossless (FLAC, 16 bits)" in clips


def test_players_hold_the_sound_itself():
    original, other = sweep(seconds=1.0), 0.5 * sweep(seconds=1.0)
    [card], how = sound_cards([(wav(original), wav(other))])
    assert "lossless" in how
    for url, expected in zip(card["players"], (original, other), strict=True):
        waveform, rate = as_waveform(base64.b64decode(url.partition(",")[2]))
        np.testing.assert_allclose(waveform, expected.reshape(-1), atol=2 / 32768)
        assert rate == 16_000


def test_many_long_clips_are_compressed_and_the_page_stays_small():
    rng = np.random.default_rng(0)
    noise = [wav(0.3 * rng.standard_normal(10 * 16_000).clip(-3, 3)) for _ in range(2)]
    cards, how = sound_cards([(noise[0], noise[1])] * 16)
    assert "Vorbis" in how
    urls = [url for card in cards if card["players"] for url in card["players"]]
    assert len(urls) > 0
    assert sum(map(len, urls)) < LIMIT * 0.8


def value_of(value: float, place: str) -> tuple[float, str, object]:
    return value, place, lambda: Example(place, "image/png", (), ())


def test_extremes_are_the_best_and_worst_in_any_order():
    offered = [value_of(v, f"{v}") for v in (3.0, 1.0, 2.0, 5.0, 4.0)] + [value_of(float("nan"), "nan")]
    for order in (offered, offered[::-1]):
        halves = [Extremes(2), Extremes(2)]
        for i, one in enumerate(order):
            halves[i % 2].offer(*one)
        halves[0].merge(halves[1])
        assert [v for v, _, _ in halves[0].low] == [1.0, 2.0]
        assert [v for v, _, _ in halves[0].high] == [5.0, 4.0]


def test_equal_values_are_ordered_by_their_place():
    one, other = Extremes(1), Extremes(1)
    for place in ("b", "a", "c"):
        one.offer(*value_of(1.0, place))
    for place in ("c", "b", "a"):
        other.offer(*value_of(1.0, place))
    assert one.low[0][1] == other.low[0][1] == one.high[0][1] == "a"


def test_a_flat_patch_has_its_mean_colour_also_at_the_border():
    array = np.zeros((3, 4, 3), dtype=np.uint8)
    array[:2, :2] = 100
    array[0, 0] = 0  # the mean of 0, 100, 100, 100
    flat = flat_patches(array, 2)
    assert flat.shape == array.shape
    assert flat[:2, :2].tolist() == [[[75] * 3] * 2] * 2
    assert not flat[:, 2:].any()


def test_psnr_solved_by_hand():
    assert psnr(np.zeros((2, 2, 3)), np.full((2, 2, 3), 25.5)) == pytest.approx(20.0)


def test_no_error_is_black_and_a_large_one_is_bright():
    original = np.zeros((1, 2, 3), dtype=np.uint8)
    other = np.array([[[0, 0, 0], [64, 64, 64]]], dtype=np.uint8)
    black, bright = error_map(original, other)[0].astype(int)
    assert black.sum() < 20
    assert bright.sum() > 500


def test_cards_of_no_examples_are_empty():
    assert cards_of([]).cards == []


# -- numbers --------------------------------------------------------------------------------------------------------


def test_a_value_and_its_spread_have_the_same_digits():
    assert metric("mse").with_spread(0.003791, 0.0000363) == "0.00379 ± 0.00004"
    assert metric("psnr").with_spread(24.749, 0.041) == "24.75 ± 0.04"
    assert metric("psnr").with_spread(24.749, float("nan")) == "24.75"
    assert metric("perplexity").with_spread(13123.1, 92.2) == "13,123.1 ± 92.2"


def test_what_is_not_defined_is_a_dash():
    assert metric("pesq").text(float("nan")) == metric("pesq").text(None) == "-"


def test_every_number_of_quality_has_a_direction_and_an_explanation():
    for name in (
        "psnr",
        "ssim",
        "mse",
        "pesq",
        "stoi",
        "si_sdr",
        "mel_distance",
        "cvu",
        "perplexity",
        "bits_per_pixel",
    ):
        assert metric(name).better, name
        assert metric(name).about, name
    assert all(one.label for one in METRICS.values())


def test_samples_are_ranked_by_the_quality_that_was_measured():
    assert ranking(["mse", "psnr", "ssim"]) == "psnr"
    assert ranking(["mse", "si_sdr", "mel_distance", "pesq", "stoi"]) == "pesq"
    assert ranking([]) is None
    assert metric("rfid-inception-full-originals").better < 0


# -- train ----------------------------------------------------------------------------------------------------------


def test_a_held_out_number_shares_the_curve_of_the_same_number_in_training(training: str):
    rows = [{"step": 1, "psnr": 1.0, "heldout_psnr": 2.0, "heldout_stoi": 0.5}]
    assert names_of(rows) == ["psnr", "heldout_stoi"]
    assert training.count("<svg") == 5  # loss, psnr, and three of speed
    assert "held out</li>" in training


def test_the_filmstrip_has_a_picture_of_each_step_and_the_original(training: str):
    film = training[training.index('class="film"') : training.index('id="samples"')]
    assert re.findall(r"<th>step (\d+)</th>", film) == ["10", "20", "30"]
    assert film.count("<img") == 2 * (3 + 1)


def test_skipped_samples_are_listed_with_their_reasons(training: str):
    assert "Skipped samples: 1" in training
    assert any("is no picture" in text for text in Outline(training).texts)


def test_a_long_training_keeps_few_frames_with_the_first_and_the_last():
    film = Filmstrip()
    for step in range(1, 101):
        film.add(examples(step), step)
    assert len(film.frames) <= MOST_FRAMES
    assert {1, 100} <= film.frames.keys()


def test_a_run_that_resumes_keeps_the_frames_up_to_its_checkpoint(tmp_path: Path):
    trained(tmp_path)
    assert sorted(TrainReport(str(tmp_path), [], 20).film.frames) == [10, 20]


def test_the_live_file_has_the_same_parts_as_the_page(tmp_path: Path):
    report = trained(tmp_path, close=False)
    live = json.loads((tmp_path / "reports" / LIVE_FILE).read_text())
    assert (live["running"], live["step"]) == (True, 30)
    text = (tmp_path / "reports/train.html").read_text()
    assert all(part in text for part in live["parts"].values())
    report.close()
    assert json.loads((tmp_path / "reports" / LIVE_FILE).read_text())["running"] is False


# -- compare and index ----------------------------------------------------------------------------------------------


def test_the_best_value_of_each_size_is_marked(folder: Path, compared: str):
    rows = json.loads((folder / "run/reports/compare.json").read_text())["tables"]["heldout"]
    for size in (16, 64):
        best = max(row["psnr"] for row in rows if row["K"] == size)
        assert f'<td class="number best" data-value="{best}">' in compared


def test_a_comparison_says_which_method_is_best_and_by_how_much(folder: Path, compared: str):
    rows = json.loads((folder / "run/reports/compare.json").read_text())["tables"]["heldout"]
    best, second = sorted((row for row in rows if row["K"] == 64), key=lambda row: -row["psnr"])
    lead = next(text for text in Outline(compared).texts if "has the best PSNR" in text and text[0] != "{")
    assert lead.startswith(
        f"{best['method']} has the best PSNR at K = 64: {best['psnr']:.2f} ± {best['psnr_sd']:.2f} dB"
    )
    assert f"{second['psnr']:.2f}" in lead


def test_all_methods_show_the_same_samples(compared: str):
    gallery = compared[compared.index('id="gallery"') :].partition("</table>")[0]
    assert gallery.count("data-original=") == 3
    assert gallery.count("data-pair=") == 3 * 4  # two methods at two sizes


def test_plots_have_error_bars_where_there_are_seeds(compared: str):
    assert compared.count('class="whisker') >= 4


def test_the_index_links_every_page_with_its_numbers(folder: Path, index: str):
    pages = {file.name for file in (folder / "run/reports").glob("*.html")} - {"index.html"}
    assert len(pages) == 4
    assert pages <= set(Outline(index).links)
    card = card_of((folder / "run/reports/evaluate-tiny.html").read_bytes())
    assert card is not None
    assert card["numbers"]["PSNR"] in index


def test_the_index_also_lists_a_page_of_an_earlier_version(tmp_path: Path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports/train.html").write_text("<!doctype html><title>old</title>")
    write_index(str(tmp_path / "reports"))
    assert "train.html" in Outline((tmp_path / "reports/index.html").read_text()).links


# -- view -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def viewed(folder: Path, pictures: str) -> str:
    """The page of an output of 7 rows and a quarantined sample, of which it shows 5."""
    members = [(f"{i}.png", encoded(picture(40, 48, seed=i))) for i in range(4)]
    shards = [
        [(f"{HOSTILE}.png", encoded(picture(40, 48))), *members],
        [("4.png", encoded(picture(40, 64))), ("5.png", b"no")],
    ]
    for number, samples in enumerate([*shards, [("6.png", encoded(picture(40, 48, seed=6)))]]):
        write_tar(folder / f"view/{number}.tar", samples)
    tokenizer = str(folder / "run/tokenizers/tiny")
    tokenize_without_ray(f"{folder}/view/*.tar", tokenizer, folder / "run/tokens")
    assert main(["view", f"{folder}/run/tokens", f"tokenizer={tokenizer}", "view.limit=5"]) == 0
    return (folder / "run/tokens-view.html").read_text()


def test_the_gallery_says_what_it_shows_of_what(viewed: str):
    assert "The output has 7 rows in 3 shards, and one sample is in quarantine." in viewed
    assert "Usage and lengths are those of all rows; 5 random rows of these shards are shown." in viewed
    assert viewed.count('<figure class="pair') == 5


def test_a_picture_of_the_gallery_is_what_its_tokens_decode_to(folder: Path, viewed: str):
    tokenizer = Tokenizer.from_pretrained(folder / "run/tokenizers/tiny")
    card = viewed.split('<figure class="pair')[1]
    tokens = np.array(json.loads(re.findall(r'data-tokens="([^"]+)"', card)[0]))
    columns = int(re.findall(r'data-columns="(\d+)"', card)[0])
    shown = as_array(base64.b64decode(re.findall(r'<img src="data:image/png;base64,([^"]+)"', card)[0]))
    np.testing.assert_array_equal(tokenizer.decode(tokens.reshape(-1, columns)), shown)


def test_the_gallery_lists_quarantined_samples_with_their_reasons(viewed: str):
    table = viewed[viewed.index('id="quarantined"') :]
    assert '<td class="mono">5</td><td>decode</td>' in table
    assert "not a picture that we can read" in table


def test_viewing_an_output_without_rows_is_a_mistake(folder: Path, pictures: str, tmp_path: Path, capsys):
    tokenizer = str(folder / "run/tokenizers/tiny")
    write_tar(tmp_path / "in/0.tar", [("0.png", b"no picture")])
    tokenize_without_ray(f"{tmp_path}/in/*.tar", tokenizer, tmp_path / "out")
    assert main(["view", f"output={tmp_path}/out", f"tokenizer={tokenizer}"]) == 2
    assert "has no rows yet" in capsys.readouterr().err


# -- charts ---------------------------------------------------------------------------------------------------------


def test_ticks_are_round_numbers_inside_of_the_axis():
    assert charts.Axis(0.0, 10.0, (0, 1)).ticks() == [0.0, 2.5, 5.0, 7.5, 10.0]
    assert charts.Axis(256, 16384, (0, 1), log=True).ticks() == [256, 512, 1024, 2048, 4096, 8192, 16384]


def test_skewed_usage_has_a_logarithmic_axis_and_even_usage_a_linear_one():
    even, skewed = np.full(100, 7), np.array([10_000, *[1] * 99])
    assert ">0.01</text>" not in str(charts.usage_chart(even))
    assert {">0.1</text>", ">1</text>", ">10</text>"} <= set(
        re.findall(r">[\d.]+</text>", str(charts.usage_chart(skewed)))
    )


def test_a_long_line_is_thinned_and_keeps_its_ends():
    thin = charts.thinned(charts.Series("", [float(i) for i in range(5000)], [float(i) for i in range(5000)]))
    assert len(thin.x) <= charts.MOST_POINTS
    assert (thin.x[0], thin.x[-1]) == (0.0, 4999.0)


def test_a_histogram_counts_every_finite_value():
    chart = str(charts.histogram([1.0, 1.0, 2.0, float("nan")], "x"))
    assert sum(int(n) for n in re.findall(r": (\d+)</title>", chart)) == 3


# -- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with chromium() as found:
        yield found


FILES = {
    "pictures": "run/reports/evaluate-tiny.html",
    "clips": "audio/run/reports/evaluate-sounds.html",
    "training": "run/reports/train.html",
    "compared": "run/reports/compare.html",
    "codebook": "run/reports/codebook-again-K16.html",
    "index": "run/reports/index.html",
    "viewed": "run/tokens-view.html",
}


def opened(browser: Browser, folder: Path, name: str, request: pytest.FixtureRequest, **size) -> Browser:
    request.getfixturevalue(name)
    browser.open(f"file://{folder}/{FILES[name]}", **size)
    return browser


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_has_no_error_requests_nothing_and_fits_the_screen(browser, folder, name, width, dark, request):
    opened(browser, folder, name, request, width=width, dark=dark)
    assert browser.problems == []
    assert [url for url in browser.requests if not url.startswith(("data:", f"file://{folder}"))] == []
    assert len([url for url in browser.requests if url.startswith("file:")]) == 1
    assert browser.run("document.documentElement.scrollWidth") <= width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == dark
    assert browser.run("[...document.images].every(image => image.complete && image.naturalWidth > 0)")


def test_the_colours_can_be_switched_by_keyboard(browser, folder, request):
    opened(browser, folder, "index", request)
    browser.run("document.querySelector('.theme').focus()")
    seen = set()
    for _ in range(3):  # light, dark, and as the system, which is light
        browser.press("Enter")
        seen.add(browser.run("getComputedStyle(document.body).backgroundColor"))
    assert len(seen) == 2


def test_a_table_sorts_by_its_numbers(browser, folder, request):
    opened(browser, folder, "compared", request)
    browser.run("document.querySelectorAll('#table-1 thead th')[2].querySelector('button').click()")
    found = browser.run(
        "[...document.querySelectorAll('#table-1 tbody tr')].map(row => Number(row.cells[2].dataset.value))"
    )
    assert len(found) == 4
    assert found == sorted(found, reverse=True)  # the best PSNR first


def test_a_picture_enlarges_and_the_slider_cuts_it(browser, folder, request):
    opened(browser, folder, "pictures", request)
    browser.run("document.querySelector('.frame').click()")
    assert browser.run("document.querySelector('dialog').open")
    assert browser.run("document.querySelector('.stage .top').style.clipPath") == "inset(0px 0px 0px 50%)"
    browser.run(
        "const s = document.querySelector('.viewer footer input'); s.value = 20; s.dispatchEvent(new Event('input'))"
    )
    assert browser.run("document.querySelector('.stage .top').style.clipPath") == "inset(0px 0px 0px 20%)"
    first = browser.run("document.querySelector('.viewer .key').textContent")
    browser.press("ArrowRight")
    assert browser.run("document.querySelector('.viewer .key').textContent") != first
    browser.press("f")
    browser.until("document.querySelector('.stage .top').hidden", 10)  # it flickers
    browser.press("Escape")
    assert not browser.run("document.querySelector('dialog').open")


def test_a_token_shows_its_number_and_patch(browser, folder, request):
    opened(browser, folder, "pictures", request)
    token = browser.run(
        """(() => { const image = document.querySelector('img[data-tokens]'); image.scrollIntoView({block: 'center'});
        const box = image.getBoundingClientRect();
        image.dispatchEvent(new PointerEvent('pointermove', {clientX: box.left + 1, clientY: box.top + 1}));
        return JSON.parse(image.dataset.tokens)[0]; })()"""
    )
    assert browser.run("document.querySelector('.tip').innerText").startswith(f"token {token}\n")
    assert "data:image/webp" in browser.run("document.querySelector('.tip i').style.backgroundImage")


def test_samples_can_be_ordered_by_quality(browser, folder, request):
    opened(browser, folder, "pictures", request)
    browser.run(
        "const o = document.querySelector('select.order'); o.value = 'best'; o.dispatchEvent(new Event('change'))"
    )
    ranks = browser.run("[...document.querySelectorAll('.pair')].map(card => Number(card.dataset.rank))")
    assert ranks == sorted(ranks, reverse=True)
    assert len(set(ranks)) > 10


def test_a_clip_switches_sides_at_the_same_position(browser, folder, request):
    opened(browser, folder, "clips", request)
    browser.run(
        "window.clip = document.querySelector('.pair-of-sounds'); window.sounds = clip.querySelectorAll('audio')"
    )
    assert not browser.run("clip.querySelector('.players').checkVisibility()")
    browser.run("sounds.forEach(sound => { sound.playbackRate = 0.1; })")  # so that a busy machine sees it play
    browser.run("clip.querySelector('.switcher button').click()")
    browser.until("sounds[0].currentTime > 0.2", 60)
    browser.run("window.at = sounds[0].currentTime; clip.querySelectorAll('.switcher button')[2].click()")
    browser.until("!sounds[1].paused && sounds[0].paused", 30)
    assert browser.run("sounds[1].currentTime >= at - 0.01")
    assert browser.run("clip.querySelector('[aria-pressed=true]').textContent") == "reconstruction"
    browser.run("clip.pauseClip()")
    assert browser.problems == []


def test_the_gallery_can_be_filtered_by_shard(browser, folder, request):
    opened(browser, folder, "viewed", request)
    browser.run(
        "const f = document.querySelector('select.filter'); f.value = '1.tar'; f.dispatchEvent(new Event('change'))"
    )
    seen = browser.run(
        "[...document.querySelectorAll('[data-shard]')].filter(e => !e.hidden).map(e => e.dataset.shard)"
    )
    assert seen
    assert set(seen) == {"1.tar"}


def test_methods_can_be_compared_with_the_original(browser, folder, request):
    opened(browser, folder, "compared", request)
    browser.run("document.querySelector('#gallery .frame').click()")
    sources = browser.run("[...document.querySelectorAll('.stage img')].map(image => image.src)")
    assert sources[0] == browser.run("document.querySelector('[data-original=\"0\"] img').src")
    assert sources[1] != sources[0]


def test_a_page_that_is_open_follows_the_training(browser, tmp_path):
    """Served by http, the page takes new numbers from the small file beside it."""
    report = trained(tmp_path, steps=100, close=False)
    handler = functools.partial(Quiet, directory=str(tmp_path / "reports"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/train.html")
        assert browser.run("document.querySelector('#live-status').innerText").startswith("Training: step 30 of 100")
        report.log({**report.history[-1], "step": 40, "loss": 0.005})
        report.write_live()
        browser.until("document.querySelector('#live-status').innerText.startsWith('Training: step 40 of 100')", 60)
        server.shutdown()
    assert browser.problems == []
    report.close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        """Prints nothing."""
