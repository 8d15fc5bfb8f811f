"""Packed and mixed blocks: orders and their inverses, packing by hand, and epochs that other streams continue."""

import collections
import itertools
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline.corpus.shards import ShardList, find_shards
from pipeline.errors import OutputMismatch
from pipeline.sequences import Mixed, Packed, flatten, mix, pack, unflatten
from pipeline.sequences.fit import Piece, best_fit, concatenated
from pipeline.sequences.orders import ORDERS, num_codebooks
from pipeline.sequences.shares import Span, advanced, share
from pipeline.tokens import Output, TokenDataset, TokenRow, commit_shard
from tests.corpus import layout, picture, write_corpus, write_tokens
from tokenizer.autoencoder import Autoencoder
from tokenizer.tokenizer import Tokenizer

SIZES = (5, 0, 7, 9, 8)  # 29 rows of 6 or 9 tokens
EOS = 1024

# -- orders -------------------------------------------------------------------------------------------------------


FRAMES = np.array([[0, 1, 2], [5, 6, 7]])  # two codebooks of 8 codes, three frames


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("raster", [0, 13, 1, 14, 2, 15]),
        ("delayed", [0, -1, 1, 13, 2, 14, -1, 15]),
        ("layers", [0, 1, 2, 13, 14, 15]),
    ],
)
def test_residual_codes_by_hand(order: str, expected: list[int]):
    assert flatten(FRAMES, 2, 8, order).tolist() == expected


def test_a_picture_is_read_row_by_row():
    assert flatten(np.arange(6).reshape(2, 3)).tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("shape", "codebooks"), [((7,), 1), ((3, 5), 1), ((3, 4), 3), ((4, 2, 3), 4), ((2, 0), 2)])
def test_unflatten_is_the_inverse(order: str, shape: tuple[int, ...], codebooks: int):
    tokens = np.random.default_rng(0).integers(16, size=shape)
    sequence = flatten(tokens, codebooks, 16, order, pad=999)
    assert np.array_equal(unflatten(sequence, shape, codebooks, 16, order), tokens)


def test_a_sampled_token_of_another_codebook_is_named():
    with pytest.raises(ValueError, match="token 3 is not one of the codebook of its place"):
        unflatten(np.array([0, 3]), (2, 1), 2, 8)
    with pytest.raises(ValueError, match=r"5 tokens; a grid of \(2, 3\) in the order delayed has 8"):
        unflatten(np.zeros(5), (2, 3), 2, 8, "delayed")


def test_another_number_of_codebooks_is_named():
    with pytest.raises(ValueError, match=r"the shape is \(3, 2\); its first side must be 2, the number of codebooks"):
        flatten(FRAMES.T, 2, 8)


@pytest.mark.parametrize("order", ORDERS)
def test_a_residual_tokenizer_decodes_what_comes_back(order: str):
    net = {"name": "vqgan", "width": 8, "multipliers": [1, 2], "res_blocks": 1, "channels": 8, "attention": False}
    quantizer = {"name": "residual", "num_quantizers": 2, "base": {"name": "fsq", "levels": [5, 3]}}
    tokenizer = Tokenizer(Autoencoder({"modality": "image", "net": net, "quantizer": quantizer}), {})
    [tokens] = tokenizer.encode_batch([picture(8, 12)])
    codebooks = num_codebooks(tokens.shape, "image")
    sequence = flatten(tokens, codebooks, tokenizer.codebook_size, order)
    again = unflatten(sequence, tokens.shape, codebooks, tokenizer.codebook_size, order)
    assert codebooks == 2
    assert sorted(sequence[sequence >= 0] // tokenizer.codebook_size) == [0] * 24 + [1] * 24  # 4 x 6 frames
    assert np.array_equal(tokenizer.decode(again), tokenizer.decode(tokens))


# -- packing ------------------------------------------------------------------------------------------------------


def test_best_fit_by_hand():
    """8 fills a block; 5 + 3, not 5 + 2: the fullest block that has room; 20 is two full blocks and a rest of 4."""
    assert best_fit([5, 8, 2, 3, 20], 8) == [
        [Piece(0, 0, 5), Piece(3, 0, 3)],
        [Piece(1, 0, 8)],
        [Piece(2, 0, 2), Piece(4, 16, 20)],
        [Piece(4, 0, 8)],
        [Piece(4, 8, 16)],
    ]


def test_concatenating_by_hand():
    assert concatenated([5, 0, 8, 2], 8) == [
        [Piece(0, 0, 5), Piece(2, 0, 3)],
        [Piece(2, 3, 8), Piece(3, 0, 2)],
    ]


@pytest.mark.parametrize("fit", [best_fit, concatenated])
def test_every_token_is_in_one_block(fit):
    lengths = np.random.default_rng(0).integers(0, 50, 400).tolist()
    blocks = fit(lengths, 16)
    assert all(0 < sum(piece.stop - piece.start for piece in block) <= 16 for block in blocks)
    places = [(p.document, place) for block in blocks for p in block for place in range(p.start, p.stop)]
    assert sorted(places) == [(d, place) for d, length in enumerate(lengths) for place in range(length)]


def test_best_fit_cuts_no_document_that_fits():
    lengths = np.random.default_rng(1).integers(1, 17, 400).tolist()
    assert sum(map(len, best_fit(lengths, 16))) == 400


# -- blocks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("list"), SIZES)


def documents(blocks: Any) -> list[tuple[int, ...]]:
    """Whole documents, by their end token."""
    found = []
    for block in blocks:
        for number in range(block["documents"].max() + 1):
            tokens = tuple(block["tokens"][block["documents"] == number].tolist())
            assert block["positions"][block["documents"] == number].tolist() == list(range(len(tokens)))
            assert tokens[-1] == EOS
            found.append(tokens)
    return found


def rows_as_documents(output: Output) -> list[tuple[int, ...]]:
    return [(*row["tokens"].reshape(-1).tolist(), EOS) for row in TokenDataset(output.url)]


@pytest.mark.parametrize("window", [0, 6])
def test_blocks_hold_each_row_once(output: Output, window: int):
    packed = pack(TokenDataset(output.url, shuffle_window=window), 24, eos=EOS)
    assert sorted(documents(packed)) == sorted(rows_as_documents(output))


def test_epochs_have_other_orders(output: Output):
    packed = pack(TokenDataset(output.url, shuffle_window=6), 24, eos=EOS)
    first, second = documents(packed), documents(packed)
    assert first != second
    assert sorted(first) == sorted(second)
    packed.set_epoch(0)
    assert documents(packed) == first


def test_the_waste_is_the_share_of_padding(output: Output):
    packed = pack(TokenDataset(output.url), 24, eos=EOS)
    blocks = list(packed)
    padding = sum(int((block["documents"] == -1).sum()) for block in blocks)
    assert packed.waste == padding / (24 * len(blocks)) == packed.expected_waste()
    assert 24 * len(blocks) - padding == sum(map(len, rows_as_documents(output)))


def test_concatenated_blocks_are_the_tokens_in_order(output: Output):
    blocks = list(pack(TokenDataset(output.url), 16, bos=1025, eos=EOS, fit="concat"))
    tokens = np.concatenate([block["tokens"][block["documents"] >= 0] for block in blocks])
    assert tokens.tolist() == [t for document in rows_as_documents(output) for t in (1025, *document)]


def test_special_tokens_offset_and_condition(tmp_path: Path):
    [shard] = write_corpus(tmp_path / "in", (1,))
    output = Output.create(str(tmp_path / "out"), layout(passthrough=["cls"]), ShardList([shard]), {})
    row = TokenRow("0000", 0, np.array([[7, 9]]), {"height": 8, "width": 16}, {"cls": b"3"})
    commit_shard(output, shard, [row], [], seconds={}, now=0.0)
    dataset = TokenDataset(output.url, columns=("cls",))
    packed = pack(dataset, 6, bos=0, eos=1, offset=10, condition="cls", condition_offset=2000)
    [block] = packed
    assert block["tokens"].tolist() == [2003, 0, 17, 19, 1, 0]
    assert block["documents"].tolist() == [0, 0, 0, 0, 0, -1]
    packed = pack(dataset, 6, bos=0, eos=1, offset=10, condition="cls", condition_offset=2000, condition_size=4)
    assert packed.vocab_size == 2004
    assert [one["tokens"].tolist() for one in packed] == [block["tokens"].tolist()]
    [block] = pack(dataset, 6, bos=0, offset=10, condition=lambda row: [5, 6])
    assert block["tokens"].tolist() == [5, 6, 0, 17, 19, 0]


def test_residual_codes_have_numbers_of_their_own(tmp_path: Path):
    [shard] = write_corpus(tmp_path / "in", (1,))
    about = layout(modality="audio", codebook_size=8, preprocessing={"sample_rate": 16000})
    output = Output.create(str(tmp_path / "out"), about, ShardList([shard]), {})
    sound = {"sample_rate": 16000, "num_samples": 960}
    commit_shard(output, shard, [TokenRow("0000", 0, FRAMES, sound)], [], seconds={}, now=0.0)
    packed = pack(TokenDataset(output.url), 10, order="delayed", pad=16, eos=17)
    [block] = packed
    assert block["tokens"].tolist() == [0, 16, 1, 13, 2, 14, 16, 15, 17, 16]
    assert packed.vocab_size == 18


@pytest.mark.parametrize("order", ORDERS)
def test_documents_become_grids_again(tmp_path: Path, order: str):
    [shard] = write_corpus(tmp_path / "in", (1,))
    about = layout(modality="audio", codebook_size=8, preprocessing={"sample_rate": 16000})
    output = Output.create(str(tmp_path / "out"), about, ShardList([shard]), {})
    sounds = [np.random.default_rng(i).integers(8, size=(3, 4 + i)) for i in range(5)]
    size = {"sample_rate": 16000, "num_samples": 960}
    commit_shard(output, shard, [TokenRow(f"{i}", i, s, size) for i, s in enumerate(sounds)], [], seconds={}, now=0.0)
    ids = {"offset": 100, "bos": 0, "eos": 1, "pad": 2, "condition_offset": 3, "condition_size": 97}
    packed = pack(TokenDataset(output.url), 64, order=order, condition=lambda row: [50, 51, 3 + int(row["key"])], **ids)
    found = []
    for block in packed:
        for number in range(block["documents"].max() + 1):
            document = block["tokens"][block["documents"] == number]
            found.append((document[2] - 3, document))
    for i, document in found:
        assert np.array_equal(packed.grid(document, sounds[i].shape), sounds[i])
    assert sorted(i for i, _ in found) == [0, 1, 2, 3, 4]


def test_a_sample_that_does_not_fill_its_grid_is_refused(output: Output):
    packed = pack(TokenDataset(output.url), 24, eos=EOS, offset=2000)
    assert packed.grid([2001, 2002, EOS, 7], (1, 2)).tolist() == [[1, 2]]
    with pytest.raises(ValueError, match=r"3 tokens; a grid of \(1, 2\) in the order raster has 2"):
        packed.grid([2001, EOS, 2002], (1, 2))
    with pytest.raises(ValueError, match="0 tokens"):
        packed.grid([EOS], (1, 2))
    with pytest.raises(ValueError, match="is not one of the codebook of its place"):
        packed.grid([2001, EOS, 2002], (1, 3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bos": 5}, r"bos is 5; it must be 0 or more and not one of the codes, 0\.\.1023; choose 1024 or more"),
        ({"eos": -1}, "eos is -1; it must be 0 or more"),
        ({"order": "delayed"}, "the order delayed needs pad="),
        ({"order": "spiral"}, "order is 'spiral'; choose one of: raster, delayed, layers"),
        ({"fit": "worst"}, "fit is 'worst'; choose one of: best, concat"),
        ({"condition": "cls"}, r"condition is 'cls'; open the dataset with columns=\('cls',\)"),
        ({"block": 0}, "block is 0"),
        ({"offset": -1}, "offset is -1"),
        ({"pad": -1}, "pad is -1; it must be 0 or more"),
        ({"order": "delayed", "pad": 1023}, r"pad is 1023; .* not one of the codes, 0\.\.1023"),
        ({"order": "delayed", "pad": 1024, "eos": 1024}, "pad is 1024, like bos or eos"),
        ({"fit": "concat", "split": False}, "split is False, and fit is 'concat'"),
        ({"condition_offset": 1000, "condition_size": 9}, r"1000\.\.1008, and the codes 0\.\.1023; choose .* 1024 or"),
        ({"condition_offset": 1024, "condition_size": 9, "eos": 1030}, r"eos is 1030; .* 1024\.\.1032; choose 1033 or"),
    ],
)
def test_settings_that_do_not_fit_are_refused(output: Output, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        pack(TokenDataset(output.url), **{"block": 24, **settings})


def test_a_condition_that_is_no_integer_or_a_code_is_named(output: Output):
    dataset = TokenDataset(output.url, columns=("modality",))
    with pytest.raises(ValueError, match="modality of row 0000 is 'image'; a condition is an integer"):
        next(iter(pack(dataset, 24, condition="modality")))
    with pytest.raises(ValueError, match="condition of row 0000 is 7; it must be 0 or more and not one of the codes"):
        next(iter(pack(dataset, 24, condition=lambda row: [7])))
    settings = {"condition_offset": 2000, "condition_size": 10}
    with pytest.raises(ValueError, match=r"condition of row 0000 is 2010; it must be in 2000\.\.2009"):
        next(iter(pack(dataset, 24, condition=lambda row: [2000, 2010], **settings)))


def test_a_class_may_not_be_the_end_token_but_text_may_contain_it(output: Output):
    dataset = TokenDataset(output.url, columns=("source_index",))
    with pytest.raises(ValueError, match=r"condition of row 0000 is 1024; .* a special token, {'eos': 1024}"):
        next(iter(pack(dataset, 24, eos=EOS, condition="source_index", condition_offset=1024)))
    [block, *_] = pack(dataset, 24, eos=EOS, condition=lambda row: [EOS, 2000])
    assert block["tokens"][:2].tolist() == [EOS, 2000]


def test_the_vocabulary_holds_the_conditions(output: Output):
    dataset = TokenDataset(output.url, columns=("source_index",))
    settings = {"eos": EOS, "condition": "source_index", "condition_offset": 1025}
    assert pack(dataset, 24, **settings, condition_size=10).vocab_size == 1035
    with pytest.raises(ValueError, match="condition_size is not given"):
        _ = pack(dataset, 24, **settings).vocab_size


def test_a_document_longer_than_a_block_is_cut_or_refused(output: Output):
    dataset = TokenDataset(output.url)  # the first row has 6 tokens
    with pytest.raises(
        ValueError, match="row 0000 has 7 tokens, and block is 6; choose a block of at least 7, or split=True"
    ):
        next(iter(pack(dataset, 6, eos=EOS, split=False)))
    positions = [block["positions"][block["documents"] >= 0].tolist() for block in pack(dataset, 6, eos=EOS)]
    assert positions[0] == [0, 1, 2, 3, 4, 5]
    assert sum(places.count(6) for places in positions) == 29  # the place after the cut, once for each row


# -- mixing -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Output:
    return write_tokens(tmp_path_factory.mktemp("other"), (40, 50), tokenizer_id="tok-b")


def two(output: Output, other: Output, **settings) -> Mixed:
    """Both outputs; the tokens of the second come after those of the first and the end token."""
    parts = [
        pack(TokenDataset(output.url, **settings), 24, eos=EOS),
        pack(TokenDataset(other.url, **settings), 24, eos=EOS, offset=1025),
    ]
    return mix(parts, [1, 3], seed=1)


def test_a_mix_gives_each_row_of_every_part_once(output: Output, other: Output):
    blocks = list(two(output, other))
    for part, source in enumerate((output, other)):
        offset = 1025 * part
        expected = [(*(t + offset for t in row[:-1]), EOS) for row in rows_as_documents(source)]
        assert sorted(documents(b for b in blocks if b["part"] == part)) == sorted(expected)


def test_blocks_are_drawn_by_weight(output: Output, other: Output):
    parts = [pack(TokenDataset(other.url, seed=seed), 9, eos=EOS) for seed in (0, 1)]
    drawn = [block["part"] for block in itertools.islice(mix(parts, [1, 3]), 90)]
    assert 12 <= drawn.count(0) <= 33  # 22.5 are expected; the standard deviation is 4.1


def test_parts_that_share_token_numbers_are_refused(output: Output, other: Output):
    first, second = TokenDataset(output.url), TokenDataset(other.url)
    with pytest.raises(
        ValueError, match=r"codes 0\.\.1023 of part 0 and the codes 0\.\.1023 of part 1; .* offset=1024"
    ):
        mix([pack(first, 24), pack(second, 24)], [1, 1])
    with pytest.raises(
        ValueError, match=r"eos 1024 of part 0 and the codes 1024\.\.2047 of part 1; .* part 1 with offset="
    ):
        mix([pack(first, 24, eos=EOS), pack(second, 24, offset=1024)], [1, 1])
    with pytest.raises(ValueError, match=r"codes 0\.\.1023 of part 0 and the codes 5\.\.1028 of part 1"):
        mix([pack(first, 24), pack(first, 24, offset=5)], [1, 1])
    mix([pack(first, 24, eos=2048), pack(second, 24, offset=1024, eos=2048), pack(first, 24)], [1, 1, 1])


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"eos": 3000}, {"condition_offset": 3000, "condition_size": 12}, r"eos 3000 .* conditions 3000\.\.3011"),
        ({"bos": 3000}, {"eos": 3000}, r"bos 3000 of part 0 and the eos 3000 of part 1"),
        ({"eos": 3000}, {"order": "delayed", "pad": 3000}, r"eos 3000 of part 0 and the pad 3000 of part 1"),
        (
            {"condition_offset": 3000, "condition_size": 12},
            {"condition_offset": 3005, "condition_size": 12},
            r"conditions 3000\.\.3011 of part 0 and the conditions 3005\.\.3016 of part 1",
        ),
        ({"condition_offset": 3000}, {}, r"part 0 has a condition without condition_size"),
    ],
)
def test_parts_that_share_special_tokens_or_conditions_are_refused(
    output: Output, first: dict[str, Any], second: dict[str, Any], message: str
):
    def packed(settings: dict[str, Any], offset: int) -> Packed:
        by_class = {"condition": lambda row: [3000]} if "condition_offset" in settings else {}
        return pack(TokenDataset(output.url), 24, **settings, **by_class, offset=offset)

    with pytest.raises(ValueError, match=message):
        mix([packed(first, 0), packed(second, 1024)], [1, 1])


def test_parts_may_share_what_means_the_same(output: Output, other: Output):
    same: dict[str, Any] = {"condition": lambda row: [3000], "condition_offset": 3000, "condition_size": 12}
    parts = [pack(TokenDataset(output.url), 24, bos=2048, eos=2048, **same)]
    parts.append(pack(TokenDataset(other.url), 24, eos=2048, offset=1024, **same))
    assert len(list(mix(parts, [1, 1]))) > 2


def test_a_part_that_was_read_before_is_whole_in_a_mix(output: Output, other: Output):
    mixed, again = two(output, other), two(output, other)
    for part in again.parts:
        list(part)
    again = mix(again.parts, [1, 3], seed=1)
    assert [block["part"] for block in again] == [block["part"] for block in mixed]


def test_a_part_named_twice_or_of_another_rank_is_refused(output: Output):
    packed = pack(TokenDataset(output.url), 24)
    with pytest.raises(ValueError, match="a part is named twice"):
        mix([packed, packed], [1, 1])
    with pytest.raises(ValueError, match=r"\[\(0, 1\), \(1, 2\)\]; open all datasets with the same"):
        mix([packed, pack(TokenDataset(output.url, rank=1, world_size=2), 24)], [1, 1])


def test_a_small_part_is_repeated_by_weight_and_its_epochs_are_counted(output: Output, other: Output):
    """29 and 90 rows, drawn equally: the first part is read about three times while the second is read once."""
    parts = [pack(TokenDataset(output.url), 24, eos=EOS), pack(TokenDataset(other.url), 24, eos=EOS, offset=1025)]
    sizes = [len(list(part)) for part in parts]
    for part in parts:
        part.set_epoch(0)
    mixed = mix(parts, [1, 1], repeat=True)
    blocks = list(itertools.islice(mixed, 2 * sizes[1]))
    drawn = [sum(block["part"] == i for block in blocks) for i in (0, 1)]
    assert abs(drawn[0] - sizes[1]) < 3 * (2 * sizes[1] / 4) ** 0.5
    assert mixed.epochs == [(count - 1) // size for count, size in zip(drawn, sizes, strict=True)]
    first = [block for block in blocks if block["part"] == 0]
    for epoch in range(mixed.epochs[0]):
        of_epoch = documents(first[epoch * sizes[0] : (epoch + 1) * sizes[0]])
        assert sorted(of_epoch) == sorted(rows_as_documents(output))


def test_a_part_without_blocks_for_a_stream_cannot_be_repeated(output: Output):
    part = pack(TokenDataset(output.url, rank=99, world_size=100), 400, eos=EOS)
    with (
        pytest.warns(UserWarning, match="has no block in epoch"),
        pytest.raises(ValueError, match="part 0 has no block for stream 99 of 100"),
    ):
        next(iter(mix([part], [1], repeat=True)))


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1]])
def test_wrong_weights_are_refused(output: Output, weights: list[float]):
    parts = [pack(TokenDataset(output.url), 24)] * 2
    with pytest.raises(ValueError, match="each of the 2 parts needs one, above 0"):
        mix(parts, weights)


# -- streams and states -------------------------------------------------------------------------------------------


Streams = tuple[int, int]  # ranks, DataLoader workers of each


def places(streams: Streams) -> list[tuple[int, int, int, int]]:
    ranks, workers = streams
    return [(rank, ranks, worker, workers) for rank in range(ranks) for worker in range(max(1, workers))]


class Stream:
    """One stream of a run, read in this process as if it were a DataLoader worker of a rank."""

    def __init__(self, make, place: tuple[int, int, int, int], states: Any = None):
        rank, ranks, worker, workers = place
        self.worker = (worker, workers)
        with self.there():
            self.packed: Packed | Mixed = make(rank=rank, world_size=ranks)
            if states is not None:
                self.packed.load_state_dict(states)
            self.blocks: Iterator[dict[str, Any]] = iter(self.packed)

    def there(self) -> Any:
        patched = pytest.MonkeyPatch.context()
        context = patched.__enter__()
        for module in ("sequences.packed", "sequences.mixed", "tokens.dataset"):
            context.setattr(f"pipeline.{module}.worker_of", lambda: self.worker)
        return _Ends(patched)

    def read(self, count: int | None) -> list[dict[str, Any]]:
        with self.there():
            return list(itertools.islice(self.blocks, count))

    def state(self) -> dict[str, Any]:
        with self.there():
            return json.loads(json.dumps(self.packed.state_dict()))


class _Ends:
    def __init__(self, patched: Any):
        self.patched = patched

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.patched.__exit__(*error)


SHAPES = [((2, 0), (3, 0)), ((1, 4), (1, 0)), ((2, 2), (1, 3)), ((1, 0), (5, 2)), ((3, 1), (2, 0))]


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("kind", ["packed", "mixed"])
@pytest.mark.parametrize("shapes", SHAPES)
def test_another_number_of_streams_continues_an_epoch(
    output: Output, other: Output, kind: str, window: int, shapes: tuple[Streams, Streams]
):
    """Killed twice in mid-epoch, with streams that have read different numbers of blocks, up to all."""

    def make(**where) -> Packed | Mixed:
        settings = {"shuffle_window": window, **where}
        if kind == "packed":
            return pack(TokenDataset(output.url, **settings), 24, eos=EOS, rows=4)
        return two(output, other, **settings)

    expected = collections.Counter(documents(make()))
    blocks, states = [], None
    for streams, counts in ((shapes[0], (1, 0, 9)), (shapes[1], (0, 2, 1)), ((1, 0), (None,))):
        running = [Stream(make, place, states) for place in places(streams)]
        for stream, count in zip(running, itertools.cycle(counts), strict=False):
            blocks += stream.read(count)
        states = [stream.state() for stream in running]
    assert collections.Counter(documents(blocks)) == expected


@pytest.mark.parametrize("window", [0, 100])
def test_streams_share_a_window_if_there_are_few(output: Output, window: int):
    """29 rows are one window here. Every row once, and no stream without blocks."""

    def make(**where) -> Packed:
        return pack(TokenDataset(output.url, shuffle_window=window, **where), 24, eos=EOS)

    found = [Stream(make, place).read(None) for place in places((2, 2))]
    assert all(found)
    assert collections.Counter(documents(itertools.chain(*found))) == collections.Counter(rows_as_documents(output))


def test_a_stream_without_blocks_warns(output: Output):
    packed = pack(TokenDataset(output.url, rank=99, world_size=100), 400, eos=EOS)
    with pytest.warns(UserWarning, match="stream 99 of 100 .* has no block in epoch 0: .* use fewer workers"):
        assert list(packed) == []


def test_shares_are_all_blocks_once_however_often_they_are_divided():
    """Windows of 5, 0, 7 and 3 blocks, read by 3 streams, then 7, then 2, each a little."""
    sizes, rng, found = [5, 0, 7, 3], random.Random(0), []
    left = [Span(0, len(sizes))]
    for streams in (3, 7, 2, 1):
        rest = []
        for stream in range(streams):
            spans = share(left, stream, streams)
            windows = [
                [(w, b) for b in range(s.first, sizes[w], s.step)] for s in spans for w in range(s.start, s.stop)
            ]
            read = rng.randint(0, len(windows)) if streams > 1 else len(windows)
            begun = rng.randint(0, len(windows[read])) if read < len(windows) else 0
            found += [*itertools.chain(*windows[:read]), *(windows[read][:begun] if begun else [])]
            rest += advanced(spans, read, begun)
        left = rest
    assert left == []
    assert sorted(found) == [(w, b) for w, size in enumerate(sizes) for b in range(size)]


def test_streams_of_different_epochs_continue(output: Output):
    """Two streams train by steps, and one is an epoch ahead. A third reads both epochs to their ends."""

    def make(**where) -> Packed:
        return pack(TokenDataset(output.url, shuffle_window=4, **where), 24, eos=EOS)

    ahead, behind = (Stream(make, place) for place in places((2, 0)))
    found = ahead.read(None) + behind.read(1)
    ahead.blocks = iter(ahead.packed)
    found += ahead.read(2)
    resumed = Stream(make, (0, 1, 0, 0), [ahead.state(), behind.state()])
    found += resumed.read(None)
    resumed.blocks = iter(resumed.packed)
    found += resumed.read(None)
    assert resumed.packed.epoch == 2
    assert collections.Counter(documents(found)) == collections.Counter(rows_as_documents(output) * 2)


@pytest.mark.parametrize("shapes", [((2, 0), (3, 0)), ((1, 4), (1, 0))])
def test_a_repeating_mix_continues_on_other_streams(output: Output, other: Output, shapes: tuple[Streams, Streams]):
    """Killed twice; the streams are in different epochs of the small part. Every epoch has each row once."""

    def make(**where) -> Mixed:
        parts = [
            pack(TokenDataset(one.url, shuffle_window=4, **where), 24, eos=EOS, offset=offset)
            for one, offset in ((output, 0), (other, 1025))
        ]
        return mix(parts, [3, 1], repeat=True)

    blocks, states = [], None
    for streams, counts in ((shapes[0], (9, 4)), (shapes[1], (5, 17, 2))):
        running = [Stream(make, place, states) for place in places(streams)]
        for stream, count in zip(running, itertools.cycle(counts), strict=False):
            blocks += stream.read(count)
        states = [stream.state() for stream in running]
    rest = pack(TokenDataset(output.url, shuffle_window=4), 24, eos=EOS)
    rest.load_state_dict([state["mixed"][0] for state in states])
    last = max(state["mixed"][0]["epoch"] for state in states)
    found = documents(block for block in blocks if block["part"] == 0)
    while rest.epoch <= last:
        found += documents(rest)
    assert last > 0
    assert collections.Counter(found) == collections.Counter(rows_as_documents(output) * (last + 1))


@pytest.mark.parametrize("kind", ["packed", "mixed"])
def test_one_state_continues_exactly(output: Output, other: Output, kind: str):
    def make(**where) -> Packed | Mixed:
        settings = {"shuffle_window": 6, **where}
        return pack(TokenDataset(output.url, **settings), 24) if kind == "packed" else two(output, other, **settings)

    undisturbed = [block["tokens"].tolist() for block in make()]
    for cut in range(0, len(undisturbed), 3):
        first = Stream(make, (0, 1, 0, 0))
        found = first.read(cut)
        found += Stream(make, (0, 1, 0, 0), first.state()).read(None)
        assert [block["tokens"].tolist() for block in found] == undisturbed


def test_a_state_of_other_settings_or_streams_is_refused(output: Output):
    def make(**where) -> Packed:
        return pack(TokenDataset(output.url, **where), 24, eos=EOS)

    state = Stream(make, (0, 2, 0, 0)).state()
    with pytest.raises(OutputMismatch, match="saved with eos=1024; this one has eos=None"):
        pack(TokenDataset(output.url), 24).load_state_dict(state)
    with pytest.raises(OutputMismatch, match=r"belongs to stream 0 of 2 .* this is 0 of 1; give the states of all"):
        Stream(make, (0, 1, 0, 0), state).read(1)
    with pytest.raises(OutputMismatch, match=r"one state for each of 2 streams; it holds those of \[0\]"):
        make().load_state_dict([state])


@pytest.mark.parametrize("kind", ["packed", "mixed"])
def test_dataloader_workers_read_each_row_once_and_other_epochs(output: Output, other: Output, kind: str):
    dataset = pack(TokenDataset(output.url, shuffle_window=6), 24, eos=EOS)
    packed = dataset if kind == "packed" else two(output, other, shuffle_window=6)
    loader = DataLoader(packed, batch_size=None, num_workers=2, persistent_workers=True)
    packed.set_epoch(3)
    found = documents(_arrays(loader))
    again = pack(TokenDataset(output.url, shuffle_window=6), 24, eos=EOS)
    again.set_epoch(3)
    if kind == "packed":
        assert sorted(found) == sorted(documents(again))
    packed.set_epoch(3)
    assert documents(_arrays(loader)) == found
    with pytest.raises(OutputMismatch, match="use torchdata's StatefulDataLoader"):
        packed.state_dict()


class WithStates(IterableDataset):
    """Blocks with the state of their worker after them, which is what StatefulDataLoader keeps."""

    def __init__(self, packed: Packed | Mixed):
        self.packed = packed

    def __iter__(self) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        return ((block, self.packed.state_dict()) for block in self.packed)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")  # on machines with fewer cores
@pytest.mark.parametrize("kind", ["packed", "mixed"])
def test_one_process_continues_after_four_real_workers(output: Output, other: Output, kind: str):
    def make() -> Packed | Mixed:
        settings = {"shuffle_window": 6}
        return pack(TokenDataset(output.url, **settings), 24, eos=EOS) if kind == "packed" else two(output, other)

    loader = DataLoader(WithStates(make()), batch_size=None, num_workers=4)
    items = list(itertools.islice(loader, 6))
    states = {worker: state for worker, (_, state) in zip([0, 1, 2, 3, 0, 1], items, strict=True)}
    resumed = make()
    resumed.load_state_dict({"workers": list(states.values())})
    found = [*_arrays(block for block, _ in items), *resumed]
    assert collections.Counter(documents(found)) == collections.Counter(documents(make()))


def _arrays(loader: Iterable[dict[str, Any]]) -> Iterator[dict[str, np.ndarray]]:
    return ({name: np.asarray(value) for name, value in block.items()} for block in loader)


def test_an_empty_output_has_no_blocks(tmp_path: Path):
    output = write_tokens(tmp_path, (0,))
    packed = pack(TokenDataset(output.url), 24)
    assert list(packed) == []
    assert packed.waste == packed.expected_waste() == 0
    assert len(find_shards(str(tmp_path / "in/*.tar")).shards) == 1


# -- torchdata ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["rows", "packed", "mixed"])
def test_torchdata_resumes_exactly_and_on_other_numbers_of_workers(output: Output, other: Output, kind: str):
    """The real StatefulDataLoader with two worker processes, stopped in mid-epoch."""

    def make() -> Any:
        dataset = TokenDataset(output.url, shuffle_window=6)
        if kind == "rows":
            return dataset
        return pack(dataset, 24, eos=EOS) if kind == "packed" else two(output, other, shuffle_window=6)

    def loader(dataset: Any) -> StatefulDataLoader:
        return StatefulDataLoader(dataset, batch_size=None, num_workers=2)

    undisturbed = [np.asarray(item["tokens"]).tolist() for item in loader(make())]
    first = loader(make())
    begun = [np.asarray(item["tokens"]).tolist() for item in itertools.islice(first, 5)]
    state = first.state_dict()
    same = loader(make())
    same.load_state_dict(state)
    assert begun + [np.asarray(item["tokens"]).tolist() for item in same] == undisturbed
    alone = make()
    alone.load_state_dict([state])
    rest = [np.asarray(item["tokens"]).tolist() for item in alone]
    assert sorted(begun + rest) == sorted(undisturbed)


def first_tokens(items: Iterable[dict[str, Any]]) -> list[list[int]]:
    """What identifies each row or block of batches."""
    return [np.asarray(tokens).tolist() for item in items for tokens in item["tokens"]]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", ["rows", "packed", "mixed"])
def test_batches_of_torchdata_continue_after_any_of_them(output: Output, other: Output, kind: str, workers: int):
    """Also after the last batch of a worker, which has then read all of its share: nothing of it comes again."""

    def loader() -> StatefulDataLoader:
        dataset: Any = TokenDataset(output.url, shuffle_window=6)
        if kind != "rows":
            dataset = pack(dataset, 24, eos=EOS) if kind == "packed" else two(output, other, shuffle_window=6)
        return StatefulDataLoader(dataset, batch_size=4, num_workers=workers, collate_fn=collate_padded)

    undisturbed = first_tokens(loader())
    steps = len(list(loader()))
    for stopped in range(max(0, steps - 3), steps + 1):
        running, resumed = loader(), loader()
        begun = first_tokens(itertools.islice(running, stopped))
        resumed.load_state_dict(running.state_dict())
        rest = first_tokens(resumed)
        assert rest == undisturbed[len(begun) :]
    assert steps > 2


def collate_padded(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Tokens in one array, filled up with -1."""
    longest = max(item["tokens"].size for item in items)
    rows = [np.pad(item["tokens"].ravel(), (0, longest - item["tokens"].size), constant_values=-1) for item in items]
    return {"tokens": np.stack(rows)}


def test_a_state_between_two_snapshots_is_refused(output: Output):
    loader = StatefulDataLoader(TokenDataset(output.url), batch_size=None, num_workers=1, snapshot_every_n_steps=4)
    list(itertools.islice(loader, 6))
    with pytest.raises(OutputMismatch, match="snapshot_every_n_steps above 1"):
        TokenDataset(output.url).load_state_dict([loader.state_dict()])


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_weight_that_is_none_is_refused(output: Output, weight: float):
    parts = [pack(TokenDataset(output.url, seed=seed), 24) for seed in (0, 1)]
    with pytest.raises(ValueError, match="each of the 2 parts needs one, above 0"):
        mix(parts, [weight, 1])
